"""The algebra that leads from an integer matmul to a quantized linear, one operator a class.

A step looks at one user of the current value. It returns the form of that user, or a `Decline` that says why the user
is no part of a quantized linear. It must be exact, apart from rounding that the fused op does not do: whatever the
step returns has to equal the graph's value for every input.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.node import Target

from qfuse.compensation import is_column_shaped, zero_point_of
from qfuse.constants import Constants, is_zero
from qfuse.inductor import fake_value
from qfuse.normal_form import (
    FLOATS,
    MINUS_ONE,
    PERMUTES,
    RESHAPES,
    Axis,
    Product,
    QLinear,
    Range,
    is_tensor,
    product_of,
    reshaped_input,
    same_shape,
)
from qfuse.reasons import Decline

aten, prims = torch.ops.aten, torch.ops.prims


_FLOAT32 = torch.finfo(torch.float32)


class Step(abc.ABC):
    """One rule of the algebra."""

    #: The operators whose nodes this step understands.
    targets: ClassVar[tuple[Target, ...]]

    @abc.abstractmethod
    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """Return the form of `node`, a user of `form.value`, or say why it has none."""


@functools.cache
def steps_by_target(steps: tuple[Step, ...]) -> dict[Target, Step]:
    """Index `steps` by operator; each operator has one meaning.

    Raises:
        ValueError: two steps claim the same operator.
    """
    table: dict[Target, Step] = {}
    for step in steps:
        for target in step.targets:
            if target in table:
                raise ValueError(f"{target} is claimed by {table[target]} and by {step}")
            table[target] = step
    return table


class Convert(Step):
    """to(float)(v) = v, without the rounding, and without the overflow to inf that float16 adds.

    An unscaled integer sum may have been computed in float, and be converted to an integer.
    """

    targets = (prims.convert_element_type.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        dtype = fake_value(node).dtype
        is_integer = not form.scales and not form.offsets
        if dtype in FLOATS or (is_integer and dtype in (torch.int32, torch.int64)):
            return replace(form, value=node)
        return Decline(f"converted to {dtype}, which is not a float that the fused op can return", node)


class View(Step):
    """view(v): the same elements, in the same order, in another shape."""

    targets = RESHAPES + PERMUTES

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if reshaped_input(node) is form.value:
            return form.viewed(node)
        return Decline("the dimensions of the result are permuted", node)


class Expand(Step):
    """expand(v) to its own shape is v."""

    targets = (aten.expand.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if same_shape(node, form.value):
            return replace(form, value=node)
        return Decline("the result is repeated by expand", node)


class Slice(Step):
    """v[a:b] or v[:, a:b]: a linear of fewer rows or fewer columns, where producers have padded the matmul."""

    targets = (aten.slice.Tensor,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        given = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | node.kwargs
        dim, start, end = given.get("dim", 0), given.get("start", 0), given.get("end")
        if given.get("step", 1) != 1 or not isinstance(start, int) or not isinstance(end, int):
            return Decline("sliced by something else than numbers, or with a step", node)
        if len(fake_value(form.value).shape) != 2 or not form.has_columns_last:
            return Decline("sliced while it is no matrix of rows and columns", node)
        axis = Axis.COLUMN if dim in (1, -1) else Axis.ROW
        return form.sliced(axis, Range(start, end), node)


class Multiply(Step):
    """v · s, for a scale s that varies over rows, over columns, or over neither, or is a product of such."""

    targets = (aten.mul.Tensor, aten.mul.Scalar)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        other = _other_operand(form, node, node.args[:2])
        scale = other if isinstance(other, Decline) else _as_product(form, node, other, "scale")
        return scale if isinstance(scale, Decline) else _scaled(form, scale, node)


class Divide(Step):
    """v / s, for a scale s as in `Multiply`."""

    targets = (aten.div.Tensor, aten.div.Scalar)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        dividend, divisor, *_ = node.args
        if dividend is not form.value or divisor is form.value or node.kwargs:
            return Decline("divides something, or by itself", node)
        scale = _as_product(form, node, divisor, "divisor")
        if isinstance(scale, Decline):
            return scale
        return _scaled(form, tuple(replace(factor, inverse=True) for factor in scale), node)


class Negate(Step):
    """−v."""

    targets = (aten.neg.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if not fake_value(node).dtype.is_floating_point:
            return Decline("negated before the conversion to float", node)
        return form.scaled((MINUS_ONE,), node)


class Add(Step):
    """v + b, for a bias b of columns, or any product of rows and columns."""

    targets = (aten.add.Tensor, aten.add.Scalar)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if node.kwargs or len(node.args) > 2:
            return Decline("added with a factor (alpha)", node)
        other = _other_operand(form, node, node.args)
        if isinstance(other, Decline):
            return other
        if not fake_value(node).dtype.is_floating_point:
            return _corrected(form, node, other, -1, constants)
        offset = _as_product(form, node, other, "summand")
        return offset if isinstance(offset, Decline) else _plus(form, offset, node, constants)


class Addcmul(Step):
    """b + v · s: a scale and a bias in one operator, which Inductor does not decompose."""

    targets = (aten.addcmul.default,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        bias, *product = node.args
        if node.kwargs.get("value", 1) != 1:
            return Decline("addcmul with a factor (value)", node)
        other = _other_operand(form, node, product)
        scale = other if isinstance(other, Decline) else _as_product(form, node, other, "scale")
        if isinstance(scale, Decline):
            return scale
        offset = Decline("added to itself", node) if bias is form.value else _as_product(form, node, bias, "summand")
        if isinstance(offset, Decline):
            return offset
        return _plus(form.scaled(scale, node), offset, node, constants)


class Subtract(Step):
    """acc − z · Σk w: the activation has the zero point z. v − c and c − v: an offset, as in `Add`."""

    targets = (aten.sub.Tensor,)

    def apply(self, form: QLinear, node: Node, constants: Constants) -> QLinear | Decline:
        """See `Step.apply`."""
        if node.kwargs or len(node.args) > 2:
            return Decline("subtracted with a factor (alpha)", node)
        minuend, subtrahend = node.args
        if not fake_value(node).dtype.is_floating_point:
            if minuend is not form.value:
                return Decline("the accumulator is subtracted from something", node)
            return _corrected(form, node, subtrahend, 1, constants)
        other = _other_operand(form, node, node.args)
        offset = other if isinstance(other, Decline) else _as_product(form, node, other, "subtrahend")
        if isinstance(offset, Decline):
            return offset
        if minuend is form.value:
            return _plus(form, (MINUS_ONE, *offset), node, constants)
        return _plus(form.scaled((MINUS_ONE,), node), offset, node, constants)


#: Every rule, for any family to take.
ALGEBRA: tuple[Step, ...] = (
    Convert(),
    View(),
    Expand(),
    Slice(),
    Multiply(),
    Divide(),
    Negate(),
    Add(),
    Addcmul(),
    Subtract(),
)


def _other_operand(form: QLinear, node: Node, operands: Iterable[object]) -> object | Decline:
    """Return the one of two operands that is not the current value."""
    others = [o for o in operands if o is not form.value]
    return others[0] if len(others) == 1 else Decline("combined with itself", node)


def _as_product(form: QLinear, node: Node, operand: object, what: str) -> Product | Decline:
    """Read an operand as a product of factors, against the current value."""
    if not isinstance(operand, Node | int | float) or (isinstance(operand, Node) and not is_tensor(operand)):
        return Decline(f"the {what} is no tensor and no number that is known", node)
    if not fake_value(node).dtype.is_floating_point:
        return Decline(f"combined with an integer {what} before the conversion to float", node)
    if fake_value(node).dtype not in FLOATS:
        return Decline(f"computed in {fake_value(node).dtype}, which the fused op does not do", node)
    if not form.has_columns_last:
        shape = tuple(fake_value(form.value).shape)
        return Decline(f"the {what} is applied to a result reshaped to {shape}, across its {form.n} columns", node)
    if not same_shape(node, form.value):
        return Decline(f"the {what} changes the shape to {tuple(fake_value(node).shape)}", node)
    product = product_of(operand, form.value)
    if product is not None:
        return product
    shape = tuple(fake_value(operand).shape) if isinstance(operand, Node) else ()
    against = tuple(fake_value(form.value).shape)
    return Decline(f"the {what} of shape {shape} varies over neither rows nor columns of {against}", node)


def _scaled(form: QLinear, product: Product, node: Node) -> QLinear | Decline:
    """Multiply by a product, unless the numbers in it and before it, which are multiplied first, leave float32."""
    numbers = 1.0
    for factor in (*form.scales, *product):
        if isinstance(factor.operand, int | float) and factor.operand:
            numbers = numbers / factor.operand if factor.inverse else numbers * factor.operand
    if not _FLOAT32.tiny <= abs(numbers) <= _FLOAT32.max:
        return Decline(f"the numbers that scale the result multiply to {numbers}, outside of float32", node)
    return form.scaled(product, node)


def _plus(form: QLinear, offset: Product, node: Node, constants: Constants) -> QLinear:
    """Add an offset, unless it is zero: producers remove zero points that are not there."""
    if any(is_zero(factor.operand, constants) for factor in offset):
        return replace(form, value=node)
    return form.plus(offset, node)


def _corrected(form: QLinear, node: Node, correction: object, sign: int, constants: Constants) -> QLinear | Decline:
    """Read acc − sign · correction, in integers, as a matmul whose activation has a zero point."""
    if not isinstance(correction, Node) or not is_tensor(correction):
        return Decline("a number is subtracted from the accumulator, or added to it", node)
    if not same_shape(node, form.value):
        return Decline(f"the correction changes the shape to {tuple(fake_value(node).shape)}", node)
    if not form.has_columns_last or not is_column_shaped(correction, form):
        return Decline("what corrects the accumulator does not vary over columns alone", node)
    z = zero_point_of(correction, form, constants)
    if z is None or abs(z) > 255:
        return Decline("what corrects the accumulator is not a multiple of the weight's column sums", node)
    corrected = replace(form, x_zero_point=form.x_zero_point + sign * z, value=node)
    if not corrected.stays_in_int32:
        return Decline(f"with the zero point {corrected.x_zero_point}, {form.k} products might leave int32", node)
    return corrected
