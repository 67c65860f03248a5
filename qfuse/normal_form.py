"""The normal form of a quantized linear, and the algebra of broadcasting that builds it.

Every int8 producer computes the same thing, written in a hundred ways:

    y[m, n] = Σk (x[m, k] − x_zero_point) · w[n, k] · (scales of m, of n, of neither) + (offsets)

where an offset is a product of factors of m, of n, or of neither: a bias, or the term that removes a zero point, which
is Σk w[n, k] times something of m. A match is a value of `QLinear`. Steps (`qfuse.steps`) update it while the graph is
walked from the matmul downwards; patterns name it; lowerings compute it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch.fx import Node

from qfuse.inductor import fake_value, statically_known_true

aten, prims = torch.ops.aten, torch.ops.prims

Dim = int | torch.SymInt

#: What the fused op can return.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: Floats that hold every 8-bit integer, and whose rounding is rounding: float8 is a quantization of its own.
WIDE_FLOATS = (*FLOATS, torch.float64)


class ColumnSums:
    """Σk w[n, k], as an operand: [N]."""


COLUMN_SUMS = ColumnSums()

#: A factor: a tensor in the graph, a number, or the weight's column sums.
Operand = Node | int | float | ColumnSums


class Axis(enum.Enum):
    """What an operand varies over when it is broadcast against the matmul's result [M, N]."""

    ROW = "row"  # one value for each m: a per-token scale
    COLUMN = "column"  # one value for each n: a per-channel scale, a bias
    SCALAR = "scalar"  # one value for all: a per-tensor scale


@dataclass(frozen=True)
class Range:
    """The part of a dimension that a slice keeps, as `aten.slice` takes it."""

    start: int
    end: int


@dataclass(frozen=True)
class Factor:
    """An operand together with what it varies over. ROW has M elements, COLUMN has N, SCALAR has one.

    inverse: it divides. slices: what has been cut out of it, after it was applied.
    """

    operand: Operand
    axis: Axis
    inverse: bool = False
    slices: tuple[Range, ...] = ()

    def sliced(self, axis: Axis, kept: Range) -> Factor:
        """Return what is left of this factor when the result is cut along `axis`."""
        return replace(self, slices=(*self.slices, kept)) if self.axis is axis else self


Product = tuple[Factor, ...]


@dataclass(frozen=True)
class QLinear:
    """A node of the graph, read as a quantized linear.

    anchor: the matmul, [M, N].
    value: the node that this form equals; a reshape of [M, N], most often (*rows, N).
    x: (*rows, K), of dtype x_dtype, or float and proven to hold integers of that range. x_dtype: int8 or uint8.
    weight: int8, [N, K] if k_axis is 1, [K, N] if it is 0.
    scales: the factors of the integer sum. offsets: what is added to it, each a product.
    views: the nodes that changed the shape, in order, to be replayed on the result.
    row_slices, column_slices: what was cut out of the result.
    """

    anchor: Node
    value: Node
    x: Node
    x_dtype: torch.dtype
    weight: Node
    k_axis: int
    x_zero_point: int = 0
    scales: Product = ()
    offsets: tuple[Product, ...] = ()
    views: tuple[Node, ...] = ()
    row_slices: tuple[Range, ...] = ()
    column_slices: tuple[Range, ...] = ()

    @property
    def m(self) -> Dim:
        """Rows of the result; may be symbolic."""
        return math.prod(fake_value(self.value).shape) // self.n if self.n else 0

    @property
    def k(self) -> Dim:
        """The dimension that is summed over."""
        return fake_value(self.weight).shape[self.k_axis]

    @property
    def n(self) -> Dim:
        """Columns of the result."""
        n = fake_value(self.weight).shape[1 - self.k_axis]
        for kept in self.column_slices:
            n = len(range(n)[kept.start : kept.end])
        return n

    @property
    def has_columns_last(self) -> bool:
        """Whether the last dimension of `value` is that of the columns, so that operands broadcast against it."""
        shape = fake_value(self.value).shape
        return bool(shape) and equal(shape[-1], self.n)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `value`: what the fused op has to return."""
        return fake_value(self.value).dtype

    @property
    def is_complete(self) -> bool:
        """Whether this is a dequantized result, and not an intermediate of one."""
        return self.dtype in FLOATS and bool(self.scales)

    @property
    def is_asymmetric(self) -> bool:
        """Whether an offset varies over rows, or with the weight, as what removes a zero point of rows does."""
        return any(f.axis is Axis.ROW or f.operand is COLUMN_SUMS for offset in self.offsets for f in offset)

    @property
    def stays_in_int32(self) -> bool:
        """Whether Σk (x − x_zero_point) · w does, whatever the integers are."""
        x = torch.iinfo(self.x_dtype)
        return self.sums_fit(torch.int32, max(abs(bound - self.x_zero_point) for bound in (x.min, x.max)))

    def sums_fit(self, dtype: torch.dtype, largest: float) -> bool:
        """Tell whether integers of `dtype` hold each Σk d · w where no |d| exceeds `largest`, and w is int8."""
        return largest * 128 * self.k <= torch.iinfo(dtype).max

    def factors(self, axis: Axis) -> Product:
        """Return the scales that vary over `axis`."""
        return tuple(f for f in self.scales if f.axis is axis)

    def scaled(self, product: Product, value: Node) -> QLinear:
        """Return the form of `value`, which is this one times `product`."""
        offsets = tuple((*offset, *product) for offset in self.offsets)
        return replace(self, scales=(*self.scales, *product), offsets=offsets, value=value)

    def plus(self, offset: Product, value: Node) -> QLinear:
        """Return the form of `value`, which is this one plus `offset`."""
        return replace(self, offsets=(*self.offsets, offset), value=value)

    def viewed(self, value: Node) -> QLinear:
        """Return the form of `value`, which has the same elements in another shape."""
        return replace(self, views=(*self.views, value), value=value)

    def sliced(self, axis: Axis, kept: Range, value: Node) -> QLinear:
        """Return the form of `value`, a part of this one, which is [M, N], along `axis`."""
        return replace(
            self,
            value=value,
            views=(),
            scales=tuple(f.sliced(axis, kept) for f in self.scales),
            offsets=tuple(tuple(f.sliced(axis, kept) for f in offset) for offset in self.offsets),
            row_slices=(*self.row_slices, kept) if axis is Axis.ROW else self.row_slices,
            column_slices=(*self.column_slices, kept) if axis is Axis.COLUMN else self.column_slices,
        )


def equal(a: Dim, b: Dim) -> bool:
    """Tell whether two sizes are equal for every input; never adds a guard."""
    return statically_known_true(a == b)


def columns(node: Node) -> Dim:
    """Return the last size of `node`; 0, if it has no dimensions."""
    shape = fake_value(node).shape
    return shape[-1] if shape else 0


def is_of_rows(values: Node, node: Node) -> bool:
    """Tell whether `values` has one value for each row of `node`, and is broadcast over it."""
    return same_sizes(fake_value(values).shape, (*fake_value(node).shape[:-1], 1))


def is_tensor(operand: object) -> TypeGuard[Node]:
    """Tell whether `operand` is a tensor of the graph, and no number, which may be a node as well: a symbolic one."""
    return isinstance(operand, Node) and isinstance(fake_value(operand), torch.Tensor)


def same_sizes(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Tell whether two shapes are equal for every input."""
    return len(a) == len(b) and all(map(equal, a, b))


def same_shape(a: Node, b: Node) -> bool:
    """Tell whether two nodes are tensors that have equal shapes for every input."""
    if not is_tensor(a) or not is_tensor(b):
        return False
    return same_sizes(fake_value(a).shape, fake_value(b).shape)


def broadcast_axis(operand: Operand, value: Node) -> Axis | None:
    """Classify `operand` by how it broadcasts against `value` of shape (*rows, N); None if it is none of the three.

    Only sizes decide, aligned from the right as broadcasting aligns them, so M == N is not ambiguous: [M, 1] varies
    over rows and [N] or [1, N] over columns, whatever the sizes are. `unexpanded` looks through an `expand` before.
    """
    if not isinstance(operand, Node):
        return Axis.SCALAR
    shape = list(fake_value(operand).shape)
    rows, n = _without_leading_ones(fake_value(value).shape[:-1]), fake_value(value).shape[-1]
    if all(equal(d, 1) for d in shape):
        return Axis.SCALAR
    leading, last = _without_leading_ones(shape[:-1]), shape[-1]
    if not leading and equal(last, n):
        return Axis.COLUMN
    if equal(last, 1) and same_sizes(leading, rows):
        return Axis.ROW
    return None


def _without_leading_ones(dims: torch.Size | list[Dim]) -> list[Dim]:
    dims = list(dims)
    while dims and equal(dims[0], 1):
        del dims[0]
    return dims


def unexpanded(operand: Operand) -> Operand:
    """Look through `expand`: it broadcasts against anything just as its input does."""
    while isinstance(operand, Node) and operand.target is aten.expand.default:
        operand = operand.args[0]  # type: ignore[assignment]
    return operand


def product_of(operand: Operand, value: Node) -> Product | None:
    """Read `operand`, broadcast against `value`, as a product of factors of rows, of columns and of neither.

    Conversions of the whole product are looked through: their rounding is not done. Products of integers are not, for
    they may wrap around.
    """
    if isinstance(operand, Node) and not isinstance(fake_value(operand), torch.Tensor):
        return None  # a symbolic number
    for candidate in (unexpanded(operand), operand):
        if (axis := broadcast_axis(candidate, value)) is not None:
            return (Factor(candidate, axis),)
    operand = unexpanded(operand)
    assert isinstance(operand, Node)
    if fake_value(operand).dtype not in WIDE_FLOATS:
        return None
    match operand.target, operand.args:
        case prims.convert_element_type.default, (Node() as inner, _):
            return product_of(inner, value)
        case aten.neg.default, (Node() as inner,):
            negated = product_of(inner, value)
            return None if negated is None else (MINUS_ONE, *negated)
        case aten.mul.Tensor, (Node() | int() | float() as a, Node() | int() | float() as b):
            left, right = product_of(a, value), product_of(b, value)
            return None if left is None or right is None else (*left, *right)
    return None


MINUS_ONE = Factor(-1.0, Axis.SCALAR)


#: Operators that may give their input another shape and leave the order of its elements.
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
    aten.alias.default,
)
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)


def reshaped_input(node: Node) -> Node | None:
    """Return what `node` is a reshape of, element by element in the same order, or None.

    A permutation is one as well if it moves dimensions of size one alone.
    """
    inner = node.args[0] if node.args else None
    if not isinstance(inner, Node):
        return None
    if node.target in RESHAPES or (node.target is aten.expand.default and same_shape(inner, node)):
        return inner
    order = permutation(node)
    if order is None:
        return None
    shape = fake_value(inner).shape
    moved = [d for d in order if not equal(shape[d], 1)]
    return inner if moved == sorted(moved) else None


def widened_input(node: Node) -> Node | None:
    """Return what `node` is a conversion of, from a float to one that holds all of its values, or None."""
    if node.target is not prims.convert_element_type.default:
        return None
    (inner,) = node.all_input_nodes
    of, to = fake_value(inner).dtype, fake_value(node).dtype
    return inner if {of, to} <= {*FLOATS} and torch.promote_types(of, to) is to else None


def permutation(node: Node) -> list[int] | None:
    """Return the order of dimensions that a permuting `node` gives its input, or None."""
    rank = len(fake_value(node).shape) if node.target in PERMUTES else 0
    match node.target, node.args:
        case aten.permute.default, (_, [*dims]):
            return [d % rank for d in dims if isinstance(d, int)]
        case aten.t.default, _:
            return list(reversed(range(rank)))
        case aten.transpose.int, (_, int() as i, int() as j):
            order = list(range(rank))
            order[i], order[j] = order[j], order[i]
            return order
    return None


def transposed_input(node: Node) -> Node | None:
    """Return the matrix that `node` is the transpose of, or None."""
    inner = node.args[0] if permutation(node) == [1, 0] else None
    return inner if isinstance(inner, Node) else None
