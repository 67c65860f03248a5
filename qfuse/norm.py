"""The third pass: a LayerNorm or RMSNorm in front of a quantization becomes one kernel with it, on CPU.

Apart, norm and quantization read each row several times. A norm is read upwards from its result v, the input of
`qfuse::quantize_rows`: (x − mean) · (variance + eps)^-½ · weight + bias. Conversions between floats are looked through
on the way, for the kernel computes in float32, and rounds once, to v's dtype: what the graph rounds in between is not
rounded, and what overflows there in float16 does not.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target

from qfuse import norm_op  # noqa: F401  registers the op
from qfuse.inductor import copy_origin, fake_value
from qfuse.match import assertions, erase_assertions
from qfuse.normal_form import (
    FLOATS,
    columns,
    equal,
    is_of_rows,
    is_tensor,
    reshaped_input,
    same_shape,
    unexpanded,
    widened_input,
)
from qfuse.rewrite import Emitter

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.qfuse
log = logging.getLogger(__name__)

#: The kernel keeps rows in the stack of its thread, see `normalize` in `lowerings/cpp/row_norm.h`.
_LONGEST_ROW = 1 << 16


@dataclass(frozen=True)
class Norm:
    """(x − mean(x)) · (variance(x) + eps)^-½ · weight + bias, over the last dimension.

    x: [..., K], float. weight, bias: K floats, or none. is_centered: otherwise the mean is taken as 0.
    """

    x: Node
    eps: float
    is_centered: bool
    weight: Node | None = None
    bias: Node | None = None

    @staticmethod
    def of(v: Node) -> Norm | None:
        """Read `v` as a norm, or return None."""
        for scaled, bias in _without_vector(v, aten.add.Tensor):
            for normalized, weight in _without_vector(scaled, aten.mul.Tensor):
                if (norm := _normalized(normalized)) is not None:
                    return replace(norm, weight=weight, bias=bias)
        return None


def fuse_norms(graph: Graph) -> int:
    """Merge norms into the `qfuse::quantize_rows` of `graph` that read them, in place; return how many there were."""
    fused = sum([_fuse(node) for node in graph.find_nodes(op="call_function", target=ops.quantize_rows.default)])
    if fused:
        graph.eliminate_dead_code()
        log.info("%d norms in one kernel with the quantization behind them", fused)
    return fused


def _fuse(quantize: Node) -> bool:
    try:
        reason = _merge(quantize)
    except Exception:
        log.debug("qfuse failed at the norm in front of %s", quantize, exc_info=True)
        return False
    if reason:
        log.debug("what is in front of %s stays apart: %s", quantize, reason)
    return reason is None


def _merge(quantize: Node) -> str | None:
    """Merge the norm in front of one quantization with it, or return why not."""
    rows, program = quantize.args
    assert isinstance(rows, Node)
    v = _unreshaped(rows)
    norm = Norm.of(v)
    if norm is None:
        return "it is no norm"
    if fake_value(norm.x).dtype not in FLOATS:
        return f"it is one of {fake_value(norm.x).dtype}"
    if fake_value(v).device.type != "cpu":
        return "on GPUs Inductor merges them"
    if not isinstance(k := columns(v), int) or not 0 < k <= _LONGEST_ROW:
        return f"a row has {k} elements"
    if len([d for d in fake_value(v).shape if not isinstance(d, int)]) > 1 and not same_shape(norm.x, v):
        return "more than one size is symbolic, and x has another shape"
    computed = _computed(v, norm)
    if (user := _other_user(computed)) is not None:
        return f"{user} uses what the norm computes on the way"
    emit = Emitter(v.graph, v)
    try:
        x = emit.reshape(norm.x, [-1, k])
        weight, bias = (c and emit.reshape(c, [k]) for c in (norm.weight, norm.bias))
        dtype = fake_value(v).dtype
        results = emit.call(ops.norm_quantize_rows.default, x, weight, bias, norm.eps, norm.is_centered, dtype, program)
        normalized = emit.call(operator.getitem, results, 0)
        new = {v: emit.reshape(normalized, _sizes(v, norm.x, emit))}
        for item in quantize.users:
            match item.args:
                case _, int() as position:
                    new[item] = emit.call(operator.getitem, results, 1 + position)
        if not all(same_shape(*pair) for pair in new.items()):
            raise RuntimeError(f"{fake_value(new[v])} cannot replace {fake_value(v)}")
    except Exception:
        emit.take_back()
        raise
    copy_origin(v, emit.nodes)
    erase_assertions(computed)
    for old, replacement in new.items():
        old.replace_all_uses_with(replacement)
    return None


def _sizes(v: Node, x: Node, emit: Emitter) -> list[Any]:
    """Return the sizes of `v` as operands of a reshape: symbolic ones are x's, or the one that is left."""
    shape = fake_value(v).shape
    if same_shape(x, v):
        return [d if isinstance(d, int) else emit.call(aten.sym_size.int, x, i) for i, d in enumerate(shape)]
    return [d if isinstance(d, int) else -1 for d in shape]


def _computed(v: Node, norm: Norm) -> list[Node]:
    """Return v and what it is computed from, but for x, which may be converted, and the columns."""
    found, waiting = {v: None}, [v]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in (norm.weight, norm.bias) and _unconverted(operand) is not norm.x and operand not in found:
                found[operand] = None
                waiting.append(operand)
    return list(found)


def _other_user(computed: list[Node]) -> Node | None:
    """Return a node that uses one of `computed`, but the first, and thus would have it computed twice."""
    for node in computed[1:]:
        for user in node.users:
            if user not in computed and user not in assertions(node):
                return user
    return None


def _normalized(node: Node) -> Norm | None:
    """Read (x − mean) · (variance + eps)^-½, or x · (mean of squares + eps)^-½."""
    for deviation, root in _in_both_orders(node, aten.mul.Tensor):
        if is_tensor(deviation) and is_tensor(root) and is_of_rows(root, deviation):
            for variance, eps in _in_both_orders(_inverse_root_of(root), aten.add.Tensor, aten.add.Scalar):
                if is_tensor(variance) and isinstance(eps, int | float):
                    if (x := _centered(deviation, variance)) is not None:
                        return Norm(x, float(eps), is_centered=True)
                    if (x := _uncentered(deviation, variance)) is not None:
                        return Norm(x, float(eps), is_centered=False)
    return None


def _inverse_root_of(node: Node) -> Node | None:
    node = _looked_through(node)
    return node.all_input_nodes[0] if node.target is aten.rsqrt.default else None


def _centered(deviation: Node, variance: Node) -> Node | None:
    """Return x, if `deviation` is x minus its mean, and `variance` is x's."""
    deviation = _looked_through(deviation)
    if deviation.target is not aten.sub.Tensor or deviation.kwargs:
        return None
    x, mean = deviation.args
    if not is_tensor(x) or not is_tensor(mean) or not is_of_rows(mean, x):
        return None
    x = _unconverted(x)
    return x if _moment_of(variance, 0) is x and _moment_of(mean, 1) is x else None


def _moment_of(node: Node, which: int) -> Node | None:
    """Return what `node` is the variance (0) or the mean (1) of, as `aten.var_mean` returns them."""
    node = _looked_through(node)
    if node.target is not operator.getitem or node.args[1] != which:
        return None
    x = _reduced(node.all_input_nodes[0], aten.var_mean.correction, correction=0, keepdim=True)
    return x and _unconverted(x)


def _uncentered(x: Node, variance: Node) -> Node | None:
    """Return x, if `variance` is the mean of its squares."""
    square = _reduced(_looked_through(variance), aten.mean.dim, True)
    if square is None:
        return None
    square = _looked_through(square)
    if square.target is aten.pow.Tensor_Scalar and square.args[1] == 2:
        factors = square.args[:1]
    elif square.target is aten.mul.Tensor and not square.kwargs:
        factors = square.args
    else:
        return None
    x = _unconverted(x)
    return x if all(is_tensor(f) and _unconverted(f) is x for f in factors) else None


def _reduced(node: Node, target: Target, *options: object, **named: object) -> Node | None:
    """Return what `node` reduces over the last dimension, if it is a call of `target` with these options."""
    if node.target is not target or node.args[2:] != options or node.kwargs != named:
        return None
    match node.args:
        case Node() as x, [int() as dim], *_ if dim in (-1, fake_value(x).dim() - 1):
            return x
    return None


def _in_both_orders(node: Node | None, *targets: Target) -> Iterator[tuple[Any, Any]]:
    """Return the operands of a commutative operator in both orders; nothing if it is none of `targets`."""
    node = node and _looked_through(node)
    if node is not None and node.target in targets and not node.kwargs and fake_value(node).dtype in FLOATS:
        match node.args:
            case a, b:
                yield a, b
                yield b, a


def _without_vector(node: Node, target: Target) -> Iterator[tuple[Node, Node | None]]:
    """Return what columns are added to, or multiplied by, and the columns; and `node` itself, without any."""
    yield node, None
    for inner, vector in _in_both_orders(node, target):
        if is_tensor(inner) and is_tensor(vector := unexpanded(vector)) and _is_of_columns(vector, inner):
            yield inner, vector


def _is_of_columns(values: Node, node: Node) -> bool:
    """Tell whether `values` has one float for each column of `node`, and is broadcast over it."""
    *leading, last = fake_value(values).shape or (0,)
    is_vector = equal(last, columns(node)) and all(equal(d, 1) for d in leading)
    return is_vector and fake_value(values).dtype in FLOATS


def _unreshaped(node: Node) -> Node:
    """Look through reshapes that keep the last dimension."""
    while (inner := reshaped_input(node)) is not None and equal(columns(inner), columns(node)):
        node = inner
    return node


def _unconverted(node: Node) -> Node:
    """Look through reshapes that keep the last dimension, and conversions that lose nothing."""
    while (inner := widened_input(node := _unreshaped(node))) is not None:
        node = inner
    return node


def _looked_through(node: Node) -> Node:
    """Look through reshapes that keep the last dimension, and conversions between floats."""
    while (node := _unreshaped(node)).target is prims.convert_element_type.default:
        (inner,) = node.all_input_nodes
        if not all(fake_value(n).dtype in FLOATS for n in (inner, node)):
            break
        node = inner
    return node
