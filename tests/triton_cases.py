"""The linears that the Triton lowering is tested with, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qfuse.ops import int8_linear_reference

ROWS = (1, 2, 16, 17, 31, 67, 130, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: K, N, the result's dtype, sizes of M, and whether M is symbolic.
Case = tuple[int, int, torch.dtype, tuple[int, ...], bool]


class Linear(nn.Module):
    """`qfuse::int8_linear`, and what a model puts behind it."""

    def __init__(self, k: int, n: int, out: torch.dtype, zero_point: int, bias: bool, offset: bool, act: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 128, (n, k)).to(torch.int8))
        self.register_buffer("w_scale", torch.rand(n) / 10 + 0.01)
        self.register_buffer("bias", torch.randn(n).to(out) if bias else None)
        self.register_buffer("columns", torch.randn(n) if offset else None)
        self.out, self.zero_point, self.act = out, zero_point, act

    def extra_repr(self) -> str:
        terms = [name for name in ("bias", "columns") if getattr(self, name) is not None]
        return f"{[*self.weight.shape]}, {self.out}, zero point {self.zero_point}, {terms}, {self.act}"

    def forward(self, x: Tensor, x_scale: Tensor, rows: Tensor, residual: Tensor) -> Tensor:
        """x: [M, K]. x_scale, rows: [M]. residual: [M, N]."""
        sums = torch.ops.qfuse.pack_column_sums(self.weight)
        offsets = ([], []) if self.columns is None else ([rows], [self.columns])
        scales = (x_scale, self.w_scale, self.bias, *offsets)
        run = torch.ops.qfuse.int8_linear if torch.compiler.is_compiling() else int8_linear_reference
        y = run(x, self.weight, sums, *scales, self.zero_point, self.out, "triton")
        return F.relu(y) * 0.5 + residual if self.act else y

    def magnitude(self, x: Tensor, x_scale: Tensor, rows: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of the absolute values of what `forward` adds up: what rounding errors are relative to."""
        scaled = (x.double() - self.zero_point) @ self.weight.double().t() * x_scale[:, None] * self.w_scale
        offset = 0 if self.columns is None else (rows[:, None] * self.columns).abs()
        return scaled.abs() + offset + (0 if self.bias is None else self.bias.abs()) + residual.abs() * self.act


def cases() -> list[Case]:
    shapes = [(64, 48), (33, 65), (200, 100), (1, 7), (127, 129)]
    cases: list[Case] = [(k, n, out, ROWS, True) for (k, n), out in itertools.product(shapes, DTYPES)]
    # Each size of tiles, and K that they divide: the number of rows is static there.
    cases += [(k, 70, out, (m,), False) for k, m, out in itertools.product((128, 100), (9, 50, 150), DTYPES[:2])]
    return cases


def tma_cases() -> list[Case]:
    shapes = [(64, 65), (208, 100), (128, 7)]  # K: one step, a last step that is short, and several
    return [(k, n, out, (1, 67, 130, 300), True) for (k, n), out in itertools.product(shapes, DTYPES)]


def problems(cases: Sequence[Case], gap: int) -> Iterator[tuple[Linear, bool, list[tuple[Tensor, ...]]]]:
    """Return, for each case, a model, whether M is symbolic, and inputs of each size. gap: between rows of x, in bytes.

    Each option is taken with every other.
    """
    options = list(itertools.product((0, 128, -3), (True, False), (False, True), (True, False)))
    for i, (k, n, out, rows, dynamic) in enumerate(cases):
        zero_point, *others = options[7 * i % len(options)]
        x_dtype = torch.uint8 if zero_point == 128 else torch.int8
        model = Linear(k, n, out, zero_point, *others)
        yield model, dynamic, [_inputs(m, k, n, out, x_dtype, gap) for m in rows]


def _inputs(m: int, k: int, n: int, out: torch.dtype, x_dtype: torch.dtype, gap: int) -> tuple[Tensor, ...]:
    info = torch.iinfo(x_dtype)
    x = torch.randint(info.min, info.max + 1, (m, k + gap)).to(x_dtype)[:, gap // 3 : k + gap // 3]
    return x, torch.rand(m) / 10 + 0.01, torch.randn(m), torch.randn(m, n).to(out)
