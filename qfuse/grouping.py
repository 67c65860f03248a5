"""The fourth pass: linears of one activation become one linear of all their columns, and slices of its result.

Query, key and value read the same quantized activation. Together they are one kernel instead of three, with more
columns to share among threads, which counts most where there are few rows. A linear that a pointwise operator follows
stays alone, because Inductor fuses that into the kernel of a linear, but not into a slice of it: with gate and up as
one linear, a decoder is slower (docs/cpu.md).

Only packed weights are joined, which are those on CPU. On a GPU it would be a guess: launches saved against slices that
what follows has to read with strides, and nobody has measured which is more.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch
from torch.fx import Graph, Node

from qfuse.constants import Constants, ancestors
from qfuse.inductor import copy_origin, fake_value
from qfuse.normal_form import permutation, reshaped_input
from qfuse.rewrite import Emitter

aten, ops = torch.ops.aten, torch.ops.qfuse
log = logging.getLogger(__name__)

#: The packed layout holds this many columns together, see `qfuse::pack_int8_weight`.
_PANEL = 64


def group_linears(graph: Graph) -> int:
    """Group the linears of `graph` that have packed weights, in place; return how many groups there are."""
    linears = graph.find_nodes(op="call_function", target=ops.int8_linear.default)
    packed = [n for n in linears if _weight(n).target is ops.pack_int8_weight.default]
    if len(packed) < 2:
        return 0
    constants = Constants(graph)
    groups: dict[Hashable, list[Node]] = {}
    for node in packed:
        if all(operand in constants for operand in _of_columns(node)) and not _stays_alone(node):
            groups.setdefault(_shared(node), []).append(node)
    merged = sum([_try_to_merge(group) for group in groups.values() if len(group) > 1])
    if merged:
        graph.eliminate_dead_code()
    return merged


def _try_to_merge(group: list[Node]) -> bool:
    try:
        _merge(group)
    except Exception:
        log.debug("qfuse failed to group %s", group, exc_info=True)
        return False
    log.debug("grouped %s", group)
    return True


def _weight(linear: Node) -> Node:
    weight = linear.args[1]
    assert isinstance(weight, Node)
    return weight


def _of_columns(linear: Node) -> list[Node]:
    """Return the operands that differ between the linears of a group."""
    _, weight, column_sums, _, w_scale, bias, _, offset_columns, *_ = linear.args
    operands = (weight, column_sums, w_scale, bias, *offset_columns)  # type: ignore[misc]
    return [operand for operand in operands if isinstance(operand, Node)]


def _shared(linear: Node) -> Hashable:
    """Return what the linears of a group have in common."""
    x, _, _, x_scale, _, _, offset_rows, _, *rest = linear.args
    return _key(x), _key(x_scale), tuple(map(_key, offset_rows)), tuple(map(str, rest))  # type: ignore[arg-type]


def _key(value: object, depth: int = 8) -> Hashable:
    """Return what is equal for two nodes that compute the same by the same operators."""
    if isinstance(value, list | tuple):
        return tuple(_key(one, depth) for one in value)
    if not isinstance(value, Node):
        return type(value), repr(value)  # 1, 1.0 and True are equal, and not the same
    if value.op != "call_function" or depth == 0 or value.is_impure():
        return value
    return value.target, _key(value.args, depth - 1), repr(value.kwargs)


def _stays_alone(linear: Node) -> bool:
    """Tell whether a slice of a larger result would be worse than a result of its own.

    Inductor fuses a pointwise operator, if it is all that is done with the result, into the kernel of a linear, but not
    into a slice of it. And what leaves the graph has to have the strides that eager gives it.
    """
    waiting = [linear]
    users: list[Node] = []
    while waiting:
        for user in waiting.pop().users:
            if reshaped_input(user) is not None or permutation(user) is not None:
                waiting.append(user)
            else:
                users.append(user)
    if any(user.op == "output" or user.target is aten.as_strided.default for user in users):
        return True
    return len(users) == 1 and _is_pointwise(users[0])


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _merge(group: list[Node]) -> None:
    first, *others = group
    for node in others:  # what they are made of has to be there before the first
        for operand in _of_columns(node):
            for needed in ancestors(operand, ()):
                if needed.op != "placeholder" and needed > first:
                    first.prepend(needed)
    emit = Emitter(first.graph, first)
    try:
        x, _, _, x_scale, _, _, offset_rows, _, *rest = first.args
        joined = _Columns(emit, group)
        result = emit.call(
            ops.int8_linear.default,
            x,
            emit.call(aten.cat.default, [_weight(node) for node in group]),
            joined.of(2, dim=1),
            x_scale,
            joined.of(4),
            None if all(node.args[5] is None for node in group) else joined.of(5),
            offset_rows,
            [joined.of(7, i) for i in range(len(offset_rows))],  # type: ignore[arg-type]
            *rest,
        )
        starts = [sum(joined.padded[:i]) for i in range(len(group))]
        parts = [
            emit.call(aten.slice.Tensor, result, 1, start, start + n)
            for start, n in zip(starts, joined.sizes, strict=True)
        ]
    except Exception:
        emit.take_back()
        raise
    copy_origin(first, emit.nodes)
    for node, part in zip(group, parts, strict=True):
        node.replace_all_uses_with(part)


class _Columns:
    """Joins operands of columns, each filled up to whole panels, as the packed weights are."""

    def __init__(self, emit: Emitter, group: list[Node]) -> None:
        self.emit, self.group = emit, group
        self.sizes = [int(fake_value(node).shape[1]) for node in group]
        self.padded = [-(-n // _PANEL) * _PANEL for n in self.sizes]

    def of(self, argument: int, item: int | None = None, dim: int = 0) -> Node:
        """Join one argument, or one item of a list, of all linears."""
        parts = []
        for node, n, padded in zip(self.group, self.sizes, self.padded, strict=True):
            operand = node.args[argument] if item is None else node.args[argument][item]  # type: ignore[index]
            if operand is None:  # no bias: zeros made of a weight, because freezing folds no `full`
                operand = self.emit.call(aten.mul.Tensor, self.emit.reshape(node.args[2], [n]), 0)  # type: ignore[arg-type]
                operand = self.emit.convert(operand, torch.float32)
            assert isinstance(operand, Node)
            parts.append(self._filled(operand, n, padded, dim))
        return self.emit.call(aten.cat.default, parts, dim)

    def _filled(self, operand: Node, n: int, padded: int, dim: int) -> Node:
        if fake_value(operand).is_floating_point():
            operand = self.emit.convert(operand, torch.float32)
        if fake_value(operand).shape[dim] != n:
            operand = self.emit.call(aten.expand.default, operand, [n])
        return operand if n == padded else self.emit.call(aten.constant_pad_nd.default, operand, [0, padded - n], 0)
