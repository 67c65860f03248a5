"""From the normal form to the canonical op, as nodes of the graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target, map_arg

from qfuse.constants import Constants
from qfuse.inductor import copy_origin, fake_value
from qfuse.normal_form import Axis, Factor, QLinear, transposed_input

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.qfuse


class Emitter:
    """Inserts nodes in front of one node, computes their fake values, and can take all of them back."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self._graph, self._before = graph, before
        self.nodes: list[Node] = []

    def call(self, target: Target, *args: Any, **kwargs: Any) -> Node:
        """Insert a call of `target`."""
        assert callable(target)
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        self.nodes.append(node)
        fake_args, fake_kwargs = map_arg((args, kwargs), fake_value)
        node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def convert(self, node: Node, dtype: torch.dtype) -> Node:
        """Insert a conversion, unless `node` has the dtype."""
        return node if fake_value(node).dtype is dtype else self.call(prims.convert_element_type.default, node, dtype)

    def reshape(self, node: Node, shape: Sequence[int]) -> Node:
        """Insert a reshape, unless `node` has the rank."""
        return node if len(fake_value(node).shape) == len(shape) else self.call(aten.reshape.default, node, list(shape))

    def take_back(self) -> None:
        """Erase every inserted node; none of them may be in use."""
        for node in reversed(self.nodes):
            self._graph.erase_node(node)


def replace_by_int8_linear(form: QLinear, lowering: str, x_dtype: torch.dtype, constants: Constants) -> None:
    """Compute `form.value` by `qfuse::int8_linear`, with an activation of `x_dtype`; all or nothing."""
    emit = Emitter(form.anchor.graph, form.value)
    try:
        result = _int8_linear(emit, form, lowering, x_dtype, constants)
        assert fake_value(result).shape == fake_value(form.value).shape
        assert fake_value(result).dtype == fake_value(form.value).dtype
    except Exception:
        emit.take_back()
        raise
    copy_origin(form.anchor, emit.nodes)
    form.value.replace_all_uses_with(result)


def _int8_linear(emit: Emitter, form: QLinear, lowering: str, x_dtype: torch.dtype, constants: Constants) -> Node:
    x, x_zero_point = _activation(emit, form, x_dtype)
    weight = _weight(emit, form, constants)
    sums = emit.call(ops.pack_column_sums.default, weight)
    x_scale, w_scale = _scales(emit, form, constants)
    bias = _combined(emit, form, aten.add.Tensor, form.biases, neutral=0.0) if form.biases else None
    result = emit.call(
        ops.int8_linear.default, x, weight, sums, x_scale, w_scale, bias, x_zero_point, form.dtype, lowering
    )
    for view in form.views:
        result = emit.call(view.target, result, *view.args[1:], **view.kwargs)
    return result


def _weight(emit: Emitter, form: QLinear, constants: Constants) -> Node:
    """Return the weight as [N, K]; contiguous where freezing does the copy."""
    weight = transposed_input(form.weight_t) or emit.call(aten.permute.default, form.weight_t, [1, 0])
    if weight in constants and not fake_value(weight).is_contiguous():
        return emit.call(aten.clone.default, weight, memory_format=torch.contiguous_format)
    return weight


def _activation(emit: Emitter, form: QLinear, dtype: torch.dtype) -> tuple[Node, int]:
    """Return the activation and its zero point in the signedness that the lowering is fast in.

    x + 128 maps int8 onto uint8, and the zero point goes along. What is uint8 already stays so.
    """
    if fake_value(form.x).dtype is dtype or dtype is not torch.uint8:
        return form.x, form.x_zero_point
    wide = emit.convert(form.x, torch.int32)
    shifted = emit.call(aten.add.Tensor, wide, 128)
    return emit.convert(shifted, torch.uint8), form.x_zero_point + 128


def _scales(emit: Emitter, form: QLinear, constants: Constants) -> tuple[Node, Node]:
    """Return x_scale and w_scale. Scalars go where they cost least: constants to the columns, others to the rows."""
    rows, columns = list(form.factors(Axis.ROW)), list(form.factors(Axis.COLUMN))
    for scalar in form.factors(Axis.SCALAR):
        folds = not isinstance(scalar.operand, Node) or scalar.operand in constants
        (columns if folds else rows).append(scalar)
    combine = functools.partial(_combined, emit, form, aten.mul.Tensor, neutral=1.0)
    return combine(rows), combine(columns)


def _combined(
    emit: Emitter, form: QLinear, op: torch._ops.OpOverload, factors: Sequence[Factor], neutral: float
) -> Node:
    """Combine operands to one float32 vector by `op`; [neutral] where there are none."""
    vectors = [_vector(emit, f.operand) for f in factors if isinstance(f.operand, Node)]
    numbers = [f.operand for f in factors if not isinstance(f.operand, Node)]
    if not vectors:
        device = fake_value(form.x).device
        vectors = [emit.call(aten.full.default, [1], neutral, dtype=torch.float32, device=device)]
    combined = vectors[0]
    for operand in (*vectors[1:], *numbers):
        combined = emit.call(op, combined, operand)
    return combined


def _vector(emit: Emitter, operand: Node) -> Node:
    """Flatten an operand that varies over one axis, to float32."""
    return emit.convert(emit.reshape(operand, [-1]), torch.float32)
