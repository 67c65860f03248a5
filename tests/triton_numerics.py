"""The Triton lowering in Triton's interpreter, bit by bit: run in a process of its own by test_triton.py."""

from __future__ import annotations

import triton_interpreter  # isort: skip  (before anything imports triton)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.kernel.mm_common import mm_grid, persistent_mm_grid
from torch._inductor.select_algorithm import TritonTemplate
from triton.runtime.errors import InterpreterError
from triton_cases import Case, Linear, cases, problems, tma_cases
from triton_interpreter import OutOfBoundsError

from qfuse.lowerings.triton import template
from qfuse.lowerings.triton.configurations import Configuration


class DifferenceError(Exception):
    """A kernel computes something else than the reference."""


def check() -> int:
    """Compare each shape with the reference, bit by bit; return how many there were."""
    triton_interpreter.install()
    torch.manual_seed(0)
    return _compare(cases(), gap=3) + _compare_model(*_bitcast())


def check_tma() -> int:
    """Do the same for the persistent kernel with TMA, each of its blocks computing several tiles."""
    triton_interpreter.install()
    _take_tma()
    torch.manual_seed(0)
    return _compare(tma_cases(), gap=0)


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
        if not _is_noticed(cases()[::-1], gap=3):  # those first that all faults can be noticed in
            unnoticed.append(fault)
    _take_tma()
    for i, (fault, change) in enumerate(TMA_FAULTS.items()):
        source = _changed("linear_tma.py.jinja", *change)
        template._BY_TMA = TritonTemplate(f"faulty_tma{i}", persistent_mm_grid, source)
        if not _is_noticed(tma_cases(), gap=0):
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


def _compare(cases: Sequence[Case], gap: int) -> int:
    return sum(_compare_model(*problem) for problem in problems(cases, gap))


def _compare_model(model: Linear, dynamic: bool, examples: Sequence[tuple[Tensor, ...]]) -> int:
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=dynamic)
    for inputs in examples:
        before = len(triton_interpreter.launched)
        result = compiled(*inputs)
        launched = triton_interpreter.launched[before:]
        assert sum("triton_tem" in name for name in launched) == 1, launched
        expected = model(*inputs)
        if not torch.equal(result, expected):
            raise DifferenceError(model, inputs[0].shape, _worst(result, expected))
    return len(examples)


class _Bitcast(Linear):
    """A linear whose activation and scale are views of tensors of other dtypes."""

    def forward(self, x: Tensor, x_scale: Tensor, rows: Tensor, residual: Tensor) -> Tensor:
        """See `Linear`. x: uint8. x_scale: int32."""
        return super().forward(x.view(torch.int8), x_scale.view(torch.float32), rows, residual)


def _bitcast() -> tuple[Linear, bool, list[tuple[Tensor, ...]]]:
    model = _Bitcast(64, 48, torch.float32, 0, True, False, False)
    ((_, dynamic, ((x, x_scale, *rest),)),) = problems([(64, 48, torch.float32, (33,), False)], gap=0)
    return model, dynamic, [(x.view(torch.uint8), x_scale.view(torch.int32), *rest)]


def _worst(result: Tensor, expected: Tensor) -> Any:
    difference = (result.double() - expected.double()).abs()
    return difference.max().item(), f"{(difference > 0).float().mean().item():.2%}"
