"""Reading a float tensor as what it was dequantized from: (q − zero point) · scales.

Producers that emulate integers in float write quantize → dequantize → matmul. The product of two such tensors is an
integer matmul, if their values are integers, provably: int8 by dtype, or rounded and clamped to the range of int8. One
thing is not proven: that no activation is NaN, which has no integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from qfuse.constants import Constants
from qfuse.inductor import fake_value, real_tensors
from qfuse.normal_form import WIDE_FLOATS, Axis, Factor, Product, equal, product_of, reshaped_input, same_shape

aten, prims = torch.ops.aten, torch.ops.prims

#: Wider than q, and narrow enough to wrap around.
_INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Dequantized:
    """(q − zero_point) · scales.

    q: (*rows, K), of dtype `dtype`, or float with integer values in its range. dtype: int8 or uint8.
    scales, zero_point: of rows or of neither, as they broadcast against q; zero_point None where there is none.
    largest: the absolute value that no q − zero_point exceeds.
    """

    q: Node
    dtype: torch.dtype
    scales: Product = ()
    zero_point: Factor | None = None
    largest: float = 255


def dequantized(tensor: Node, axis: Axis, constants: Constants) -> Dequantized | None:
    """Read `tensor`, (*rows, columns), as dequantized integers whose scales vary over `axis` or not at all."""
    node = tensor
    scales: list[Factor] = []
    zero_point: Factor | None = None
    passed: list[Node] = []
    largest = 255.0
    while True:
        passed.append(node)
        if (inner := _same_columns(node)) is not None:
            node = inner
            continue
        if fake_value(node).dtype in (torch.int8, torch.uint8):
            return Dequantized(node, fake_value(node).dtype, tuple(scales), zero_point, largest)
        match node.target, node.args:
            case prims.convert_element_type.default, (Node() as inner, _) if _widens(inner, node):
                node = inner
            case aten.where.self, (Node() as condition, chosen, other):
                branch = _known_branch(condition, chosen, other, constants)
                if branch is None or not same_shape(branch, node):
                    return None
                node = branch
            case aten.mul.Tensor, (a, b) if zero_point is None and fake_value(node).dtype in WIDE_FLOATS:
                scaled, factor = (a, b) if isinstance(a, Node) and same_shape(a, node) else (b, a)
                scale = _factors(factor, scaled, node, axis)
                if scale is None or not isinstance(scaled, Node):
                    return None
                node, scales = scaled, [*scales, *scale]
            case aten.div.Tensor, (Node() as inner, factor) if zero_point is None:
                scale = _factors(factor, inner, node, axis)
                if scale is None:
                    return None
                node, scales = inner, [*scales, *(replace(f, inverse=True) for f in scale)]
            case aten.sub.Tensor, (Node() as inner, shift) if zero_point is None and not node.kwargs:
                found = _factors(shift, inner, node, axis)
                low, high = _bounds(shift, constants)
                if found is None or len(found) != 1 or not _hold(passed, -128 - high, 255 - low):
                    return None
                node, (zero_point,), largest = inner, found, max(128 + high, 255 - low)
            case _:
                dtype = _integer_dtype(node)
                return None if dtype is None else Dequantized(node, dtype, tuple(scales), zero_point, largest)


def _same_columns(node: Node) -> Node | None:
    """Return what `node` is a reshape of, through any number of them, if both have the same last dimension."""
    last = fake_value(node).shape[-1:]
    inner = reshaped_input(node)
    while inner is not None:
        shape = fake_value(inner).shape
        if shape and equal(shape[-1], last[0]):
            return inner
        inner = reshaped_input(inner)
    return None


def _factors(operand: object, inner: object, node: Node, axis: Axis) -> Product | None:
    """Read an operand that is applied to `inner`, giving `node`, as factors of `axis` or of neither."""
    if not isinstance(operand, Node | int | float) or not isinstance(inner, Node) or not same_shape(inner, node):
        return None
    product = product_of(operand, node)
    return product if product and all(f.axis in (axis, Axis.SCALAR) for f in product) else None


def _widens(inner: Node, node: Node) -> bool:
    """Tell whether a conversion changes no integer of at most 8 bits (and, of scaled values, only the rounding)."""
    return fake_value(node).dtype in WIDE_FLOATS or (
        fake_value(node).dtype in _INTEGERS and not fake_value(inner).is_floating_point()
    )


def _bounds(operand: object, constants: Constants) -> tuple[float, float]:
    """Return the least and the largest value that an operand may have."""
    if isinstance(operand, Node) and operand in constants:
        with real_tensors():
            values = constants.value(operand).double()
            return (values.min().item(), values.max().item()) if values.numel() else (0.0, 0.0)
    interval = _interval(operand)
    return interval.low, interval.high


def _hold(nodes: Iterable[Node], low: float, high: float) -> bool:
    """Tell whether the dtypes of those of `nodes` that are integers hold `low` and `high`."""
    integers = [torch.iinfo(dtype) for node in nodes if (dtype := fake_value(node).dtype) in _INTEGERS]
    return all(info.min <= low and high <= info.max for info in integers)


def _known_branch(condition: Node, chosen: object, other: object, constants: Constants) -> Node | None:
    """Return the branch that a constant condition takes everywhere."""
    if condition not in constants:
        return None
    with real_tensors():
        value = constants.value(condition)
        branch = chosen if value.all() else other if not value.any() else None
    return branch if isinstance(branch, Node) else None


def _integer_dtype(node: Node) -> torch.dtype | None:
    """Return the 8-bit dtype that holds every value of a float tensor exactly, if that can be proven."""
    interval = _interval(node)
    for dtype in (torch.int8, torch.uint8):
        info = torch.iinfo(dtype)
        if interval.integer and info.min <= interval.low and interval.high <= info.max:
            return dtype
    return None


@dataclass(frozen=True)
class _Interval:
    """What is known of all values of a tensor: their bounds, and whether they are integers."""

    low: float = -math.inf
    high: float = math.inf
    integer: bool = False

    def __neg__(self) -> _Interval:
        return _Interval(-self.high, -self.low, self.integer)

    def __add__(self, other: _Interval) -> _Interval:
        return _Interval(self.low + other.low, self.high + other.high, self.integer and other.integer)

    def minimum(self, other: _Interval) -> _Interval:
        return _Interval(min(self.low, other.low), min(self.high, other.high), self.integer and other.integer)

    def clamped(self, low: object, high: object) -> _Interval:
        low = -math.inf if low is None else low
        high = math.inf if high is None else high
        if not isinstance(low, int | float) or not isinstance(high, int | float):
            return _Interval()
        integer = self.integer and all(math.isinf(bound) or float(bound).is_integer() for bound in (low, high))
        return _Interval(min(max(self.low, low), high), min(max(self.high, low), high), integer)

    def rounded(self, dtype: torch.dtype) -> _Interval:
        """Return bounds of the same values, rounded to a float dtype: integers remain integers."""
        with real_tensors():
            low, high = torch.tensor([self.low, self.high], dtype=torch.float64).to(dtype).tolist()
        return _Interval(low, high, self.integer)


def _interval(node: object, depth: int = 16) -> _Interval:
    """Bound the values of `node`, by interval arithmetic over at most `depth` operators."""
    if isinstance(node, int | float):
        return _Interval(node, node, float(node).is_integer())
    if not isinstance(node, Node) or not isinstance(fake_value(node), torch.Tensor) or depth == 0:
        return _Interval()
    dtype = fake_value(node).dtype
    if dtype in (torch.int8, torch.uint8):
        return _Interval(torch.iinfo(dtype).min, torch.iinfo(dtype).max, True)
    if dtype in WIDE_FLOATS:
        return _exact_interval(node, depth).rounded(dtype)
    if dtype in _INTEGERS:
        exact, info = _exact_interval(node, depth), torch.iinfo(dtype)
        if info.min <= exact.low and exact.high <= info.max:
            return _Interval(math.floor(exact.low), math.ceil(exact.high), True)  # truncated, if it was a float
        return _Interval(info.min, info.max, True)  # it may have wrapped around, to anything
    return _Interval()


def _exact_interval(node: Node, depth: int) -> _Interval:
    """Bound what `node` computes, before it is rounded, truncated or wrapped to its dtype."""
    match node.target, node.args:
        case aten.round.default, (inner,):
            of = _interval(inner, depth - 1)
            low, high = (b if math.isinf(b) else float(round(b)) for b in (of.low, of.high))
            return _Interval(low, high, integer=True)
        case aten.clamp_min.default, (inner, low):
            return _interval(inner, depth - 1).clamped(low, None)
        case aten.clamp_max.default, (inner, high):
            return _interval(inner, depth - 1).clamped(None, high)
        case aten.clamp.default, (inner, *bounds) if not node.kwargs:
            return _interval(inner, depth - 1).clamped(*bounds, *[None] * (2 - len(bounds)))
        case prims.convert_element_type.default, (inner, _):
            return _interval(inner, depth - 1)
        case aten.neg.default, (inner,):
            return -_interval(inner, depth - 1)
        case aten.add.Tensor, (a, b) if not node.kwargs:
            return _interval(a, depth - 1) + _interval(b, depth - 1)
        case aten.sub.Tensor, (a, b) if not node.kwargs:
            return _interval(a, depth - 1) + -_interval(b, depth - 1)
        case aten.minimum.default, (a, b):
            return _interval(a, depth - 1).minimum(_interval(b, depth - 1))
        case aten.maximum.default, (a, b):
            return -(-_interval(a, depth - 1)).minimum(-_interval(b, depth - 1))
        case (aten.full.default, (_, number)) | (aten.scalar_tensor.default, (number,)):
            return _interval(number)
        case _ if (reshaped := reshaped_input(node)) is not None:
            return _interval(reshaped, depth - 1)
    return _Interval()
