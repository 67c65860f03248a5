"""The normal form of a quantized linear, and the algebra of broadcasting that builds it.

Every int8 producer computes the same thing, written in a hundred ways:

    y[m, n] = Σk (x[m, k] − x_zero_point) · w[n, k] · (scales of m, of n, of neither) + (biases of n)

A match is a value of `QLinear`. Steps (`qfuse.steps`) update it while the graph is walked from the integer matmul
downwards; patterns name it; lowerings compute it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from qfuse.inductor import fake_value, statically_known_true

aten = torch.ops.aten

Dim = int | torch.SymInt
#: A factor or a summand: a tensor in the graph, or a number.
Operand = Node | int | float


class Axis(enum.Enum):
    """What an operand varies over when it is broadcast against the matmul's result [M, N]."""

    ROW = "row"  # one value for each m: a per-token scale
    COLUMN = "column"  # one value for each n: a per-channel scale, a bias
    SCALAR = "scalar"  # one value for all: a per-tensor scale


@dataclass(frozen=True)
class Factor:
    """An operand together with what it varies over. ROW has M elements, COLUMN has N, SCALAR has one."""

    operand: Operand
    axis: Axis


@dataclass(frozen=True)
class QLinear:
    """A node of the graph, read as a quantized linear.

    anchor: the integer matmul, [M, N] int32.
    value: the node that this form equals, of shape (*rows, N) with the product of rows equal to M.
    x: [M, K] int8 or uint8. weight_t: [K, N] int8, as the anchor takes it.
    scales, biases: in the order of the graph.
    views: the nodes that changed the shape, in order, to be replayed on the result.
    """

    anchor: Node
    value: Node
    x: Node
    weight_t: Node
    x_zero_point: int = 0
    scales: tuple[Factor, ...] = ()
    biases: tuple[Factor, ...] = ()
    views: tuple[Node, ...] = ()

    @property
    def m(self) -> Dim:
        """Rows of the activation; may be symbolic."""
        return fake_value(self.x).shape[0]

    @property
    def k(self) -> Dim:
        """The dimension that is summed over."""
        return fake_value(self.x).shape[1]

    @property
    def n(self) -> Dim:
        """Output features."""
        return fake_value(self.weight_t).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `value`: what the fused op has to return."""
        return fake_value(self.value).dtype

    @property
    def is_complete(self) -> bool:
        """Whether this is a dequantized result, and not an intermediate of one."""
        return self.dtype.is_floating_point and bool(self.scales)

    def factors(self, axis: Axis) -> tuple[Factor, ...]:
        """Return the scales that vary over `axis`."""
        return tuple(f for f in self.scales if f.axis is axis)

    def scaled(self, factor: Factor, value: Node) -> QLinear:
        """Return the form of `value`, which is this one times `factor`."""
        return replace(self, scales=(*self.scales, factor), value=value)

    def biased(self, bias: Factor, value: Node) -> QLinear:
        """Return the form of `value`, which is this one plus `bias`."""
        return replace(self, biases=(*self.biases, bias), value=value)

    def viewed(self, value: Node) -> QLinear:
        """Return the form of `value`, which has the same elements in another shape."""
        return replace(self, views=(*self.views, value), value=value)


def equal(a: Dim, b: Dim) -> bool:
    """Tell whether two sizes are equal for every input; never adds a guard."""
    return statically_known_true(a == b)


def same_shape(a: Node, b: Node) -> bool:
    """Tell whether two nodes have equal shapes for every input."""
    p, q = fake_value(a).shape, fake_value(b).shape
    return len(p) == len(q) and all(map(equal, p, q))


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
    if equal(last, 1) and len(leading) == len(rows) and all(map(equal, leading, rows)):
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


def transposed_input(node: Node) -> Node | None:
    """Return the matrix that `node` is the transpose of, or None."""
    match node.target, node.args:
        case (aten.permute.default, (Node() as matrix, [1, 0])) | (aten.t.default, (Node() as matrix,)):
            return matrix
        case aten.transpose.int, (Node() as matrix, (0 | 1) as i, (0 | 1) as j) if i != j:
            return matrix if len(fake_value(matrix).shape) == 2 else None
    return None
