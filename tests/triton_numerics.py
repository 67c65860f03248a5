"""The Triton lowering in Triton's interpreter, bit by bit: run in a process of its own by test_triton.py."""

from __future__ import annotations

import triton_interpreter  # isort: skip  (before anything imports triton)

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.kernel.mm_common import mm_grid, persistent_mm_grid
from torch._inductor.select_algorithm import TritonTemplate
from torch.nn import functional as F
from triton.runtime.errors import InterpreterError
from triton_interpreter import OutOfBoundsError

from qfuse.lowerings.triton import template
from qfuse.lowerings.triton.configurations import Configuration
from qfuse.ops import int8_linear_reference

ROWS = (1, 2, 16, 17, 31, 67, 130, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: K, N, the result's dtype, sizes of M, and whether M is symbolic.
Case = tuple[int, int, torch.dtype, tuple[int, ...], bool]


class DifferenceError(Exception):
    """A kernel computes something else than the reference."""


class Linear(nn.Module):
    """`qfuse::int8_linear`, and what a model puts behind it."""

    def __init__(self, k: int, n: int, out: torch.dtype, zero_point: int, bias: bool, offset: bool, act: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 128, (n, k)).to(torch.int8))
        self.register_buffer("w_scale", torch.rand(n) / 10 + 0.01)
        self.register_buffer("bias", torch.randn(n).to(out) if bias else None)
        self.register_buffer("columns", torch.randn(n) if offset else None)
        self.out, self.zero_point, self.act = out, zero_point, act

    def forward(self, x: Tensor, x_scale: Tensor, rows: Tensor, residual: Tensor) -> Tensor:
        """x: [M, K]. x_scale, rows: [M]. residual: [M, N]."""
        sums = torch.ops.qfuse.pack_column_sums(self.weight)
        offsets = ([], []) if self.columns is None else ([rows], [self.columns])
        scales = (x_scale, self.w_scale, self.bias, *offsets)
        run = torch.ops.qfuse.int8_linear if torch.compiler.is_compiling() else int8_linear_reference
        y = run(x, self.weight, sums, *scales, self.zero_point, self.out, "triton")
        return F.relu(y) * 0.5 + residual if self.act else y


def _inputs(m: int, k: int, n: int, out: torch.dtype, x_dtype: torch.dtype, gap: int) -> tuple[Tensor, ...]:
    """gap: between rows of x, in bytes."""
    info = torch.iinfo(x_dtype)
    x = torch.randint(info.min, info.max + 1, (m, k + gap)).to(x_dtype)[:, gap // 3 : k + gap // 3]
    return x, torch.rand(m) / 10 + 0.01, torch.randn(m), torch.randn(m, n).to(out)


def check() -> int:
    """Compare each shape with the reference, bit by bit; return how many there were."""
    triton_interpreter.install()
    torch.manual_seed(0)
    return _compare(_cases(), gap=3)


def check_tma() -> int:
    """Do the same for the persistent kernel with TMA, each of its blocks computing several tiles."""
    triton_interpreter.install()
    _take_tma()
    torch.manual_seed(0)
    return _compare(_tma_cases(), gap=0)


#: Faults that a kernel could have, as a text of the template and what it would be.
FAULTS = {
    "a mask of K that is left out": ("mask=rk[None, :] < K - k, other=0", ""),
    "a mask of K of the weight that is left out": ("mask=rk[:, None] < K - k, other=0", ""),
    "a mask of what is stored that is left out": ("in_m[:, None] & in_n[None, :]", "in_m[:, None]"),
    "an offset that is left out": ("range(OFFSETS) %}\ny =", "range(0) %}\ny ="),
    "a step of K that is too long, where tiles divide K": (
        "stride_xm + (k + rk)",
        "stride_xm + (k + k // BLOCK_K + rk)",
    ),
    "a mask of N that is left out": ("{{name}} + rn, mask=in_n, other=0.0", "{{name}} + rn"),
    "an index that is shifted": ("{{name}} + rm,", "{{name}} + rm + 1,"),
    "rows and columns that are exchanged": ('vector("W_SCALE", "n"', 'vector("W_SCALE", "m"'),
    "sums of the wrong dtype": ("y = sums.to(tl.float32)", "y = sums.to(tl.int16).to(tl.float32)"),
    "a zero point that is left out": ("sums -= (X_ZERO_POINT", "sums -= (0"),
    "a bias that is left out": ('y = y + {{ vector("BIAS"', 'y = y + 0 * {{ vector("BIAS"'),
}


#: Faults that only the kernel with TMA could have.
TMA_FAULTS = {
    "tiles that nobody computes": ("grid_m * grid_n, NUM_SMS)", "grid_m * grid_n, NUM_SMS + 1)"),
    "tiles of other rows": ("w_tiles.load([pid_n * BLOCK_N, k])", "w_tiles.load([pid_m * BLOCK_N, k])"),
    "rows that are masked by the wrong size": ("shape=[N, K]", "shape=[N - 1, K]"),
    "a K that is too short": ("tl.range(0, K, BLOCK_K)", "tl.range(0, K - 16, BLOCK_K)"),
}


def check_faults() -> list[str]:
    """Return the faults that no comparison notices."""
    triton_interpreter.install()
    unnoticed = []
    for i, (fault, change) in enumerate(FAULTS.items()):
        template._BY_POINTERS = TritonTemplate(f"faulty{i}", mm_grid, _changed("linear.py.jinja", *change))
        if not _is_noticed(_cases()[::-1], gap=3):  # those first that all faults can be noticed in
            unnoticed.append(fault)
    _take_tma()
    for i, (fault, change) in enumerate(TMA_FAULTS.items()):
        source = _changed("linear_tma.py.jinja", *change)
        template._BY_TMA = TritonTemplate(f"faulty_tma{i}", persistent_mm_grid, source)
        if not _is_noticed(_tma_cases(), gap=0):
            unnoticed.append(fault)
    return unnoticed


def _changed(name: str, right: str, wrong: str) -> str:
    source = template.source(name)
    assert right in source, right
    return source.replace(right, wrong)


def _is_noticed(cases: Sequence[Case], gap: int) -> bool:
    torch.manual_seed(0)
    try:
        _compare(cases, gap)
    except DifferenceError:
        return True
    except InterpreterError as error:
        if OutOfBoundsError.__name__ not in str(error):
            raise
        return True
    return False


def _take_tma() -> None:
    """Let qfuse choose the kernel with TMA, with fewer multiprocessors than there are tiles."""
    tile, options = Configuration(64, 32, 64, 2, 4), {"NUM_SMS": 3}
    template._candidates = lambda x, weight: [(template._BY_TMA, tile, options)]


def _cases() -> list[Case]:
    shapes = [(64, 48), (33, 65), (200, 100), (1, 7), (127, 129)]
    cases: list[Case] = [(k, n, out, ROWS, True) for (k, n), out in itertools.product(shapes, DTYPES)]
    # Each size of tiles, and K that they divide: the number of rows is static there.
    cases += [(k, 70, out, (m,), False) for k, m, out in itertools.product((128, 100), (9, 50, 150), DTYPES[:2])]
    return cases


def _tma_cases() -> list[Case]:
    shapes = [(64, 65), (208, 100), (128, 7)]  # K: one step, a last step that is short, and several
    return [(k, n, out, (1, 67, 130, 300), True) for (k, n), out in itertools.product(shapes, DTYPES)]


def _compare(cases: Sequence[Case], gap: int) -> int:
    options = list(itertools.product((0, 128, -3), (True, False), (False, True), (True, False)))
    compared = 0
    for i, (k, n, out, rows, dynamic) in enumerate(cases):
        zero_point, bias, offset, act = options[7 * i % len(options)]  # every option with every other
        x_dtype = torch.uint8 if zero_point == 128 else torch.int8
        model = Linear(k, n, out, zero_point, bias, offset, act)
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=dynamic)
        for m in rows:
            inputs = _inputs(m, k, n, out, x_dtype, gap)
            before = len(triton_interpreter.launched)
            result = compiled(*inputs)
            launched = triton_interpreter.launched[before:]
            assert sum("triton_tem" in name for name in launched) == 1, launched
            expected = model(*inputs)
            if not torch.equal(result, expected):
                raise DifferenceError((m, k, n, out, zero_point, bias, offset, act), _worst(result, expected))
            compared += 1
    return compared


def _worst(result: Tensor, expected: Tensor) -> Any:
    difference = (result.double() - expected.double()).abs()
    return difference.max().item(), f"{(difference > 0).float().mean().item():.2%}"
