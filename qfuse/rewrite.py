"""From the normal form to the canonical op, as nodes of the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target, map_arg

from qfuse.constants import Constants
from qfuse.inductor import copy_origin, fake_value
from qfuse.match import assertions, erase_assertions
from qfuse.normal_form import (
    Axis,
    ColumnSums,
    Dim,
    Factor,
    Product,
    QLinear,
    Range,
    equal,
    same_shape,
    transposed_input,
)
from qfuse.provider import Provider
from qfuse.reasons import Decline

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.qfuse

#: Converting these to float32 is exact.
_NARROW_FLOATS = (torch.bfloat16, torch.float16)


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

    def reshape(self, node: Node, shape: Sequence[Dim]) -> Node:
        """Insert a reshape, unless `node` has the rank; callers only remove dimensions, or flatten."""
        return node if len(fake_value(node).shape) == len(shape) else self.call(aten.reshape.default, node, list(shape))

    def take_back(self) -> None:
        """Erase every inserted node; none of them may be in use."""
        for node in reversed(self.nodes):
            self._graph.erase_node(node)


def replace_by_int8_linear(
    form: QLinear,
    provider: Provider,
    x_dtype: torch.dtype,
    constants: Constants,
    check: Callable[[QLinear, Node, Constants], str | None] | None = None,
) -> Decline | None:
    """Compute `form.value` by `qfuse::int8_linear`, with an activation of `x_dtype`; all or nothing.

    check: given the form, the fused op's node and the constants, says why it must not be used, or None.
    """
    emit = Emitter(form.anchor.graph, form.value)
    try:
        result = _Rewriter(emit, form, constants).result(provider, x_dtype)
        if not same_shape(result, form.value) or fake_value(result).dtype != form.dtype:
            raise RuntimeError(f"{fake_value(result)} cannot replace {fake_value(form.value)}")
        reason = check(form, result, constants) if check else None
        if reason is not None:
            emit.take_back()
            return Decline(reason, form.value)
    except Exception:
        emit.take_back()
        raise
    copy_origin(form.anchor, emit.nodes)
    erase_assertions(_intermediates(form))
    form.value.replace_all_uses_with(result)
    return None


def _intermediates(form: QLinear) -> Iterator[Node]:
    """Return what is computed no longer."""
    node = form.anchor
    while node is not form.value:
        yield node
        (node,) = (user for user in node.users if user not in assertions(node))


class _Rewriter:
    """Emits the canonical op of one form."""

    def __init__(self, emit: Emitter, form: QLinear, constants: Constants) -> None:
        self.emit, self.form, self.constants = emit, form, constants
        self.weight = self._weight()
        self.column_sums = emit.call(ops.pack_column_sums.default, self.weight)

    def result(self, provider: Provider, x_dtype: torch.dtype) -> Node:
        """Emit the op, and the views behind it."""
        x, x_zero_point = self._activation(x_dtype)
        x_scale, w_scale = self._by_side(self.form.scales)
        bias, offset_rows, offset_columns = self._offsets()
        weight = self.emit.call(ops.pack_int8_weight.default, self.weight) if provider.packs_weight else self.weight
        result = self.emit.call(
            ops.int8_linear.default,
            x,
            weight,
            self.column_sums,
            x_scale or self._one(),
            w_scale or self._one(),
            bias,
            offset_rows,
            offset_columns,
            x_zero_point,
            self.form.dtype,
            provider.name,
        )
        *batch, _, n = fake_value(self.form.anchor).shape  # a batch of one
        if batch and not (self.form.row_slices or self.form.column_slices):  # of matrices alone
            result = self.emit.call(aten.reshape.default, result, [*batch, -1, n])
        for view in self.form.views:
            result = self.emit.call(view.target, result, *view.args[1:], **view.kwargs)
        return result

    def _weight(self) -> Node:
        """Return the weight as [N, K]; contiguous where freezing does the copy."""
        weight = self.form.weight
        if self.form.k_axis == 0:
            weight = transposed_input(weight) or self.emit.call(aten.permute.default, weight, [1, 0])
        weight = self._cut(weight, self.form.column_slices)
        if weight in self.constants and not fake_value(weight).is_contiguous():
            return self.emit.call(aten.clone.default, weight, memory_format=torch.contiguous_format)
        return weight

    def _activation(self, dtype: torch.dtype) -> tuple[Node, int]:
        """Return the activation, [M, K], and its zero point, in the signedness that the lowering is fast in.

        x + 128 maps int8 onto uint8, modulo 256, and the zero point goes along. What is uint8 already stays so.
        Inductor vectorizes arithmetic on bytes that are reinterpreted, and not (torch 2.13) conversions from int32.
        """
        form, emit = self.form, self.emit
        x = emit.reshape(emit.convert(form.x, form.x_dtype), [-1, form.k])
        x = self._cut(x, form.row_slices)
        if form.x_dtype is dtype or dtype is not torch.uint8:
            return x, form.x_zero_point
        return emit.call(aten.add.Tensor, emit.call(aten.view.dtype, x, torch.uint8), 128), form.x_zero_point + 128

    def _offsets(self) -> tuple[Node | None, list[Node], list[Node]]:
        """Return the sum of what does not vary over rows, and the other offsets, each as rows times columns."""
        bias: Node | None = None
        rows, columns = [], []
        for offset in self.form.offsets:
            of_rows, of_columns = self._by_side(offset)
            if of_rows is None or equal(fake_value(of_rows).shape[0], 1):
                sides = [side for side in (of_rows, of_columns) if side is not None]
                summand = functools.reduce(functools.partial(self.emit.call, aten.mul.Tensor), sides)
                bias = summand if bias is None else self.emit.call(aten.add.Tensor, bias, summand)
            else:
                rows.append(of_rows)
                columns.append(of_columns or self._one())
        return bias and self._unconverted(bias), rows, columns

    def _unconverted(self, bias: Node) -> Node:
        """Return what `bias` was converted from, where freezing does not fold it: lowerings convert what they read."""
        if bias.target is prims.convert_element_type.default and bias not in self.constants:
            (source,) = bias.all_input_nodes
            return source if fake_value(source).dtype in _NARROW_FLOATS and source not in self.constants else bias
        return bias

    def _by_side(self, product: Product) -> tuple[Node | None, Node | None]:
        """Multiply the factors of rows, and those of columns, to a float32 vector each; None where there are none.

        Scalars go where they cost least: constants to the columns, where freezing folds them, others to the rows.
        """
        rows: Node | None = None
        columns: Node | None = None
        for factor in sorted(product, key=lambda f: not isinstance(f.operand, Node | ColumnSums)):  # numbers last
            live = isinstance(factor.operand, Node) and factor.operand not in self.constants
            if factor.axis is Axis.ROW or (factor.axis is Axis.SCALAR and live):
                rows = self._times(rows, factor)
            else:
                columns = self._times(columns, factor)
        return rows, columns

    def _times(self, product: Node | None, factor: Factor) -> Node:
        operand = self._operand(factor)
        if factor.inverse:
            return self.emit.call(aten.div.Tensor, product or self._one(), operand)
        if product is None:
            return operand if isinstance(operand, Node) else self.emit.call(aten.mul.Tensor, self._one(), operand)
        return self.emit.call(aten.mul.Tensor, product, operand)

    def _operand(self, factor: Factor) -> Node | int | float:
        """Return a factor as a float32 vector, or as a number."""
        if isinstance(factor.operand, ColumnSums):
            return self.emit.convert(self.emit.reshape(self.column_sums, [-1]), torch.float32)
        if not isinstance(factor.operand, Node):
            return factor.operand
        # A number on the CPU meets tensors of every device, but a vector on the CPU does not.
        if fake_value(factor.operand).device != fake_value(self.form.x).device:
            return self.emit.call(aten.mul.Tensor, self._one(), factor.operand)
        vector = self.emit.convert(self.emit.reshape(factor.operand, [-1]), torch.float32)
        return self._cut(vector, factor.slices)

    def _cut(self, node: Node, slices: Sequence[Range]) -> Node:
        for kept in slices:
            node = self.emit.call(aten.slice.Tensor, node, 0, kept.start, kept.end)
        return node

    def _one(self) -> Node:
        return self.emit.call(aten.full.default, [1], 1.0, dtype=torch.float32, device=fake_value(self.form.x).device)
