"""Random epilogues of an integer matmul: legal ones, which have to fuse, and near misses, which have to stay right.

M == N in all of them, so that sizes tell nothing about axes. Many are traced as one model, because tracing is what
takes the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from producers import quantized
from support import error, trace
from torch import Tensor, nn
from torch.nn import functional as F

M, K, N = 6, 32, 6

Op = Callable[["Epilogue", Tensor], Tensor]


def _rows(v: Tensor, row: Tensor) -> Tensor:
    return row.reshape(*v.shape[:-1], 1)


STARTS: dict[str, Op] = {
    "int8": lambda s, q: torch._int_mm(q, s.w.t()),
    "int8, weight [K, N]": lambda s, q: torch._int_mm(q, s.w_t),
    "uint8": lambda s, q: torch._int_mm(s.shifted(q), s.w.t()) - 128 * s.w.sum(1, dtype=torch.int32),
    "uint8, int64 sum": lambda s, q: torch._int_mm(s.shifted(q), s.w.t()) - s.w.t().sum(0, keepdim=True) * 128,
    "uint8, folded": lambda s, q: torch._int_mm(s.shifted(q), s.w.t()) - s.folded,
    "uint8, negative": lambda s, q: torch._int_mm(s.shifted(q), s.w.t()) + s.w.t().int().sum(0) * -128,
    "padded rows": lambda s, q: torch._int_mm(F.pad(q, (0, 0, 0, 11)), s.w.t())[:M],
    "int32 matmul": lambda s, q: q.int() @ s.w.t().int(),
    "float matmul": lambda s, q: (q.float() @ s.w.t().float()).to(torch.int32),
    "emulated": lambda s, q: (q.float() * s.row.view(M, 1)) @ (s.w.float() * s.column.view(N, 1)).t(),
    "emulated, zero point": lambda s, q: F.linear((q.float() - s.zero.view(M, 1)) * 0.25, s.w.float() * 0.5),
    "emulated, rounded": lambda s, q: F.linear(
        (s.x / 0.02).round().clamp(-128, 127) * 0.02, s.w.float() * s.column.view(N, 1), s.bias
    ),
}
SCALES: dict[str, Op] = {
    "row": lambda s, v: v * _rows(v, s.row),
    "row, expanded": lambda s, v: v * _rows(v, s.row).expand(v.shape),
    "row, on the left": lambda s, v: _rows(v, s.row) * v,
    "by row": lambda s, v: v / _rows(v, s.row),
    "column": lambda s, v: v * s.column,
    "column [1, N]": lambda s, v: v * s.column.view(1, N),
    "column, expanded": lambda s, v: v * s.column.expand(v.shape),
    "by column": lambda s, v: v / s.column,
    "scalar tensor": lambda s, v: v * s.scalar,
    "scalar [1, 1]": lambda s, v: v * s.scalar.view(1, 1),
    "row times column": lambda s, v: v * (_rows(v, s.row) * s.column),
    "number": lambda s, v: v * 0.37,
    "by number": lambda s, v: v / 3,
}
NEUTRAL: dict[str, Op] = {
    "float32": lambda s, v: v.to(torch.float32),
    "bfloat16": lambda s, v: v.to(torch.bfloat16),
    "2d": lambda s, v: v.reshape(M, N),
    "3d": lambda s, v: v.reshape(2, M // 2, N),
    "4d": lambda s, v: v.reshape(1, M // 3, 3, N),
}
OFFSETS: dict[str, Op] = {
    "bias": lambda s, v: v + s.bias,
    "bias, on the left": lambda s, v: s.bias + v,
    "minus bias": lambda s, v: v - s.bias,
    "from bias": lambda s, v: s.bias - v,
    "plus number": lambda s, v: v + 0.5,
    "addcmul": lambda s, v: torch.addcmul(s.bias, v, s.column),
    "row offset": lambda s, v: v + _rows(v, s.row),
    "row offset times column": lambda s, v: v - _rows(v, s.row) * s.bias,
    "negative": lambda s, v: -v,
}
#: What breaks the algebra, or looks as if it did; it is put somewhere between the others.
SPOILERS: dict[str, Op] = {
    "another user": lambda s, v: s.also(v),
    "scale of everything": lambda s, v: v * (s.full.view(v.shape)),
    "residual": lambda s, v: v + s.full.view(v.shape),
    "columns as rows": lambda s, v: v.reshape(M, N) * s.column.view(N, 1),
    "rows as columns": lambda s, v: v.reshape(M, N) * s.row.view(1, M),
    "transposed": lambda s, v: v.reshape(M, N).t(),
    "reshaped across columns": lambda s, v: v.reshape(N * 2, M // 2),
    "scaled across columns": lambda s, v: (v.reshape(M * 2, N // 2) * s.column[: N // 2]).reshape(M, N),
    "repeated": lambda s, v: v.reshape(M, N).expand(2, M, N)[1],
    "flipped": lambda s, v: v.reshape(M, N).flip(1),
    "sliced and padded": lambda s, v: F.pad(v.reshape(M, N)[:, 1:], (1, 0)),
    "float64": lambda s, v: (v.double() * 1.5).float(),
    "rounded": lambda s, v: v.float().round(),
    "relu": lambda s, v: v.relu(),
    "squared": lambda s, v: v.float() * v.float() * 1e-6,
    "alpha": lambda s, v: torch.add(v.float(), s.bias, alpha=3),
    "wrong compensation": lambda s, v: v - s.w.sum(1, dtype=torch.int32) * 127,
    "compensation of another weight": lambda s, v: v - s.w.flip(0).sum(1, dtype=torch.int32) * 128,
    "compensation over rows": lambda s, v: v.reshape(M, N) - s.w.sum(1, dtype=torch.int32).view(N, 1) * 128,
    "integer": lambda s, v: v.float().to(torch.int32),
}
#: After these the smallest difference may be one of a whole unit.
DISCONTINUOUS = {"integer", "rounded"}
ALL = SCALES | NEUTRAL | OFFSETS | SPOILERS


@dataclass(frozen=True)
class Recipe:
    """An epilogue by the names of its parts."""

    start: str
    ops: tuple[str, ...]


class Epilogue(nn.Module):
    """An integer matmul and a sequence of operations on its result."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.register_buffer("w", quantized(N, K))
        self.register_buffer("w_t", quantized(K, N))
        self.register_buffer("folded", 128 * self.w.sum(1, dtype=torch.int32))
        self.register_buffer("column", torch.rand(N) + 0.1)
        self.register_buffer("bias", torch.randn(N))

    def shifted(self, q: Tensor) -> Tensor:
        return (q.to(torch.int32) + 128).to(torch.uint8)

    def also(self, value: Tensor) -> Tensor:
        self.others.append(value + 1)
        return value

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        self.row, self.scalar, self.zero, self.full, self.x = (
            inputs[name] for name in ("row", "scalar", "zero", "full", "x")
        )
        self.others: list[Tensor] = []
        value = STARTS[self.recipe.start](self, inputs["q"])
        for name in self.recipe.ops:
            value = ALL[name](self, value)
        return (value, *self.others)


class Batch(nn.Module):
    """Many epilogues as one model."""

    def __init__(self, recipes: list[Recipe]) -> None:
        super().__init__()
        self.epilogues = nn.ModuleList(map(Epilogue, recipes))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(("q", "x", "row", "scalar", "zero", "full"), inputs, strict=True))
        return tuple(result for epilogue in self.epilogues for result in epilogue(named))


def example_inputs() -> tuple[Tensor, ...]:
    """Return inputs for a batch, in the order of `Batch.forward`."""
    zero = torch.randint(-20, 20, (M,), dtype=torch.int8)
    return quantized(M, K), torch.randn(M, K), torch.rand(M) + 0.1, torch.rand(()) + 0.1, zero, torch.rand(M, N)


def _names(*tables: dict[str, Op], most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from([name for table in tables for name in table]), max_size=most)


@st.composite
def legal(draw: st.DrawFn) -> Recipe:
    """Draw an epilogue that is a quantized linear from its start to its end."""
    views = draw(_names({k: NEUTRAL[k] for k in ("2d", "3d", "4d")}, most=1))
    cast = draw(st.sampled_from(["float32", "bfloat16"]))
    middle = draw(_names(SCALES, NEUTRAL, OFFSETS, most=6))
    scale = draw(st.sampled_from(sorted(SCALES)))
    end = draw(_names(OFFSETS, NEUTRAL, most=2))
    return Recipe(draw(st.sampled_from(sorted(STARTS))), (*views, cast, *middle, scale, *end))


@st.composite
def near_miss(draw: st.DrawFn) -> Recipe:
    """Draw a legal epilogue with something in it that is not."""
    recipe = draw(legal())
    ops = list(recipe.ops)
    ops.insert(draw(st.integers(0, len(ops))), draw(st.sampled_from(sorted(SPOILERS))))
    # what follows a spoiler finds the shape that it expects
    ops = [part for op in ops for part in ((op, "2d") if op in SPOILERS else (op,))]
    return Recipe(recipe.start, tuple(ops))


def check(recipes: list[Recipe], *, all_fuse: bool) -> None:
    """Trace the epilogues, and insist that each is right, and, if `all_fuse`, that each is one fused op."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        model, inputs = Batch(recipes), example_inputs()
        traced = trace(model, *inputs)
        plain, exact = traced.unfused_and_in_float64()
    if all_fuse:
        assert not traced.report.misses, traced.report
        assert traced.outputs == ["qfuse.int8_linear.default"] * len(recipes), traced.outputs
    owners = [recipe for recipe in recipes for _ in range(1 + recipe.ops.count("another user"))]
    for i, (fused, before, truth) in enumerate(zip(traced.result, plain, exact, strict=True)):
        assert fused.dtype is before.dtype
        # the order of up to ten float32 operations, and of bfloat16 ones in what is left unfused
        granted = 8 * torch.finfo(torch.float32).eps
        if DISCONTINUOUS & set(owners[i].ops):
            granted = 1e-2  # a unit, where a value near a boundary is rounded the other way
        assert error(fused, truth) <= 1.05 * error(before, truth) + granted, (i, recipes)
