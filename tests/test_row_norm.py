"""The kernel of a norm and the quantization behind it: as exact as the norm, and the integers of what it returns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from norms import DTYPES, KERNEL, Normed, assert_no_worse, code_and_result, error, plain
from support import compile_together
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.lowering import fallback_handler

from qfuse.lowerings import quantize_rows

ops = torch.ops.qfuse
pytestmark = pytest.mark.usefixtures("no_norm_reference")


PROGRAM = "abs:{0} %0; amax:{0} %1; convert:float32 %2; clamp_min:float32 %3 1e-05; div:float32 %4 127.0; \
div:float32 %0 %5; round:float32 %6; convert:int8 %7; -> %8 %5"


class Kernel(nn.Module):
    """The op by itself. weight, bias: dtypes, or None."""

    def __init__(
        self, k: int, weight: torch.dtype | None, bias: torch.dtype | None, dtype: torch.dtype, is_centered: bool = True
    ) -> None:
        super().__init__()
        self.weight = None if weight is None else (torch.rand(k) + 0.5).to(weight)
        self.bias = None if bias is None else torch.randn(k).to(bias)
        self.dtype, self.is_centered = dtype, is_centered
        self.program = PROGRAM.format(str(dtype).removeprefix("torch."))

    def forward(self, x: Tensor) -> list[Tensor]:
        return ops.norm_quantize_rows(x, self.weight, self.bias, 1e-5, self.is_centered, self.dtype, self.program)


def _check(model: Kernel, x: Tensor, outputs: list[Tensor]) -> None:
    """Compare with float64; integers and scales have to be those of the norm that is returned, bit by bit."""
    v, q, scale = outputs
    in_double = [None if t is None else t.double() for t in (model.weight, model.bias)]
    exact = _exact(x.double(), *in_double, model.is_centered)
    ulp = torch.finfo(model.dtype).eps
    assert v.dtype is model.dtype
    assert v.shape == x.shape
    if x.numel():
        assert (v.double() - exact).abs().max() <= (0.51 * ulp + 1e-6) * exact.abs().max()
    for got, want in zip((q, scale), ops.quantize_rows(v, model.program), strict=True):
        assert torch.equal(got, want)


def _exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, is_centered: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if is_centered else x
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * (1 if weight is None else weight) + (0 if bias is None else bias)


@pytest.mark.parametrize("of_row", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
def test_kernel(of_x: torch.dtype, of_row: torch.dtype) -> None:
    """Each dtype of x with each of rows, and all pairs of columns; with and without a mean; parts of a vector."""
    columns = [*itertools.product((*DTYPES, None), repeat=2)]
    first = 3 * DTYPES.index(of_x) + DTYPES.index(of_row)  # each pair of columns at least twice
    sizes = (67, 96, 1, 150)
    models = [
        Kernel(k, *columns[(first + 5 * i) % 16], of_row, is_centered=(first + i) % 2 == 0) for i, k in enumerate(sizes)
    ]
    xs = [(torch.randn(19, k) * 2 + 1).to(of_x) for k in sizes]
    results, code = compile_together(models, [(x,) for x in xs])
    assert code.count(KERNEL) == len(sizes)
    for model, x, outputs in zip(models, xs, results, strict=True):
        _check(model, x, outputs)


@pytest.mark.parametrize("k", [384, 5000, 1 << 16])
def test_lengths(k: int) -> None:
    """One compile for every M, none included; several rows at once, and one that leaves the first cache."""
    model = Kernel(k, torch.bfloat16, torch.float32, torch.bfloat16)
    compiled = torch.compile(model, dynamic=True)
    for m in (3, 40, 1, 0):
        x = torch.randn(m, k, dtype=torch.bfloat16)
        torch._dynamo.mark_static(x, 1)
        _check(model, x, compiled(x))


def test_strides() -> None:
    """Rows that lie apart are read where they are, columns that do are copied; all may be parts of one tensor."""

    def run(x: Tensor) -> list[list[Tensor]]:
        return [
            ops.norm_quantize_rows(x[:, 3:36], x[0, 3:36], x[1, 5:38], 1e-5, True, torch.float32, program),
            ops.norm_quantize_rows(x.t(), x[:, 1], x[:, 2], 1e-5, True, torch.float32, program),
            ops.norm_quantize_rows(x[1:, ::2], x[2, ::2], None, 1e-5, False, torch.float32, program),
        ]

    program, x = PROGRAM.format("float32"), torch.randn(34, 50)
    code, result = code_and_result(run, x)
    assert code.count(KERNEL) == 3
    for got, want in zip(result, run(x), strict=True):
        torch.testing.assert_close(got[0], want[0])
        assert all(map(torch.equal, got[1:], ops.quantize_rows(got[0], program)))


def test_large_mean() -> None:
    """The mean's rounding is taken out again, so that a small variance beside it is right."""
    model, x = Kernel(384, None, None, torch.float32), torch.randn(9, 384) / 100 + 1e4
    _, (v, *_) = code_and_result(model, x)
    assert error(v, _exact(x.double(), None, None, True)) < 1e-5


@pytest.mark.parametrize("k", [384, 4096])
def test_one_large_number(k: int) -> None:
    """What is added to it is not lost: sums are of parts of a row."""
    x = torch.randn(16, k)
    x[:, 7] = 1e6 * (1 + torch.rand(16))
    assert_no_worse(Normed(plain, k, is_used=True), x)


def test_sum_that_overflows() -> None:
    """The mean does not: rows without variance are the bias."""
    model, x = Kernel(2048, None, torch.float32, torch.float32), torch.full((3, 2048), 3e38)
    _, (v, *_) = code_and_result(model, x)
    torch.testing.assert_close(v, model.bias.expand_as(v))


def test_rows_that_are_not_numbers() -> None:
    """NaN and infinity stay in their row; a constant row has no variance, and gets the bias."""
    model = Kernel(67, torch.float32, torch.float32, torch.float32)
    x = torch.randn(20, 67)
    x[3, 5], x[4, 66], x[5] = math.nan, math.inf, 7.0
    _, (v, _, scale) = code_and_result(model, x)
    assert v.isnan().all(-1).nonzero().flatten().tolist() == [3, 4]
    assert scale.isnan().nonzero().flatten().tolist() == [3, 4]
    torch.testing.assert_close(v[5], model.bias)


def test_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs all the same."""
    reference = fallback_handler(ops.norm_quantize_rows.default, add_to_fallback_set=False)
    monkeypatch.setattr(quantize_rows, "_norm_reference", reference)
    monkeypatch.setattr(quantize_rows, "QuantizeRows", None)
    model, x = Kernel(67, None, None, torch.float32), torch.randn(19, 67)
    code, outputs = code_and_result(model, x)
    assert "qfuse.norm_quantize_rows.default(" in code
    assert KERNEL not in code
    _check(model, x, outputs)


def test_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    portable = quantize_rows._TEMPLATE.replace("#define QFUSE_ROWS_AVX512", "")
    assert portable != quantize_rows._TEMPLATE
    monkeypatch.setattr(quantize_rows, "_TEMPLATE", portable)
    classes = [*itertools.product(DTYPES, (True, False))]
    models = [Kernel(67, dtype, torch.float32, dtype, is_centered) for dtype, is_centered in classes]
    xs = [torch.randn(19, 67).to(dtype) for dtype, _ in classes]
    results, _ = compile_together(models, [(x,) for x in xs])
    for model, x, outputs in zip(models, xs, results, strict=True):
        _check(model, x, outputs)


@inductor_config.patch(fx_graph_cache=False)
def test_without_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = quantize_rows._NORM.replace("#ifdef __AVX512BF16__", "#if 0")
    assert emulated != quantize_rows._NORM
    monkeypatch.setattr(quantize_rows, "_NORM", emulated)
    model, x = Kernel(67, None, None, torch.bfloat16), torch.randn(19, 67)
    _check(model, x, code_and_result(model, x)[1])
