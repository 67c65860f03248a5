"""The algebra that leads from an integer matmul to a quantized linear, one operator a class.

A step looks at one user of the current value. It returns the form of that user, or a `Decline` that says why the user
is no part of a quantized linear. It must be exact, apart from rounding that the fused op does not do: whatever the
step returns has to equal the graph's value for every input.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.node import Target

from qfuse.compensation import is_column_shaped, zero_point_of
from qfuse.constants import Constants
from qfuse.inductor import fake_value
from qfuse.normal_form import Axis, Factor, Operand, QLinear, broadcast_axis, equal, same_shape, unexpanded
from qfuse.reasons import Decline

aten, prims = torch.ops.aten, torch.ops.prims

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Step(abc.ABC):
    """One rule of the algebra."""

    #: The operators whose nodes this step understands.
    targets: ClassVar[tuple[Target, ...]]

    @abc.abstractmethod
    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """Return the form of `node`, a user of `form.value`, or say why it has none."""


def steps_by_target(steps: Iterable[Step]) -> dict[Target, Step]:
    """Index `steps` by operator; each operator has one meaning."""
    table: dict[Target, Step] = {}
    for step in steps:
        for target in step.targets:
            if target in table:
                raise ValueError(f"{target} is claimed by {table[target]} and by {step}")
            table[target] = step
    return table


class Convert(Step):
    """to(float)(v) = v, without the rounding: the fused op keeps float32 until its end."""

    targets = (prims.convert_element_type.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        dtype = fake_value(node).dtype
        if dtype in FLOATS:
            return replace(form, value=node)
        return Decline(f"converted to {dtype}, which is not a float that the fused op can return", node)


class View(Step):
    """view(v), as long as the last dimension stays N: then it still runs over the columns."""

    targets = (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
    )

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        shape = fake_value(node).shape
        if shape and equal(shape[-1], form.n):
            return form.viewed(node)
        return Decline(f"reshaped to {tuple(shape)}: the last dimension is no longer N = {form.n}", node)


class Expand(Step):
    """expand(v) to its own shape is v."""

    targets = (aten.expand.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if same_shape(node, form.value):
            return replace(form, value=node)
        return Decline("the result is repeated by expand", node)


class Multiply(Step):
    """v · s, for a scale s that varies over rows, over columns, or over neither."""

    targets = (aten.mul.Tensor, aten.mul.Scalar)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        scale = _as_factor(form, node, "scale")
        if isinstance(scale, Decline):
            return scale
        if form.biases:
            return Decline("scaled after the bias was added", node)
        return form.scaled(scale, node)


class Add(Step):
    """v + b, for a bias b that varies over columns."""

    targets = (aten.add.Tensor, aten.add.Scalar)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            return Decline("added with a factor (alpha)", node)
        bias = _as_factor(form, node, "summand")
        if isinstance(bias, Decline):
            return bias
        return _with_bias(form, bias, node)


class Addcmul(Step):
    """b + v · s: a scale and a bias in one operator, which Inductor does not decompose."""

    targets = (aten.addcmul.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        bias, *product = node.args
        if node.kwargs.get("value", 1) != 1:
            return Decline("addcmul with a factor (value)", node)
        scale = _classify(form, node, product, "scale")
        if isinstance(scale, Decline):
            return scale
        if form.biases:
            return Decline("scaled after the bias was added", node)
        summand = _classify(form, node, [form.value, bias], "summand")
        if isinstance(summand, Decline):
            return summand
        return _with_bias(form.scaled(scale, node), summand, node)


class Subtract(Step):
    """acc − z · Σk w: the activation has the zero point z."""

    targets = (aten.sub.Tensor,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        minuend, correction, *alpha = node.args
        if minuend is not form.value or not isinstance(correction, Node) or alpha or node.kwargs:
            return Decline("subtracted from something, or with a factor (alpha)", node)
        if fake_value(node).dtype is not torch.int32:
            return Decline("something is subtracted after the conversion to float", node)
        if not is_column_shaped(correction, form):
            return Decline("what is subtracted from the accumulator does not vary over columns alone", node)
        z = zero_point_of(correction, form, constants)
        if z is None:
            return Decline(
                "what is subtracted from the accumulator is not a multiple of the weight's column sums", node
            )
        return replace(form, x_zero_point=form.x_zero_point + z, value=node)


#: Every rule, for any family to take.
ALGEBRA: tuple[Step, ...] = (Convert(), View(), Expand(), Multiply(), Add(), Addcmul(), Subtract())


def _with_bias(form: QLinear, bias: Factor, node: Node) -> QLinear | Decline:
    if bias.axis is Axis.ROW:
        return Decline("what is added varies over rows, so it is no bias", node)
    if not form.scales:
        return Decline("added before the first scale", node)
    return form.biased(bias, node)


def _as_factor(form: QLinear, node: Node, what: str) -> Factor | Decline:
    return _classify(form, node, node.args[:2], what)


def _classify(form: QLinear, node: Node, operands: Sequence[object], what: str) -> Factor | Decline:
    """Return the one of two `operands` that is not the current value, with its axis."""
    others = [o for o in operands if o is not form.value]
    if len(operands) != 2 or len(others) != 1 or not isinstance(others[0], Node | int | float):
        return Decline(f"combined with itself, or with something that is no {what}", node)
    if not fake_value(node).dtype.is_floating_point:
        return Decline(f"combined with an integer {what} before the conversion to float", node)
    if fake_value(node).dtype not in FLOATS:
        return Decline(f"computed in {fake_value(node).dtype}, which the fused op does not do", node)
    if not same_shape(node, form.value):
        return Decline(f"the {what} changes the shape to {tuple(fake_value(node).shape)}", node)
    operand: Operand = unexpanded(others[0])
    if isinstance(operand, Node):
        tensor = fake_value(operand)
        if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
            return Decline(f"the {what} is not a float tensor", node)
    axis = broadcast_axis(operand, form.value)
    if axis is None:
        shape = tuple(fake_value(operand).shape) if isinstance(operand, Node) else ()
        against = tuple(fake_value(form.value).shape)
        return Decline(f"the {what} of shape {shape} varies over neither rows nor columns of {against}", node)
    return Factor(operand, axis)
