"""The kernel of a dynamic quantization: every bit is the graph's own."""

from __future__ import annotations

import math

import producers
import pytest
import torch
from quantizations import DTYPES, PRODUCERS, WRITTEN, Quantized, absmax, compile_and_count, parsed_programs
from support import Model, one_translation_unit, trace, unfused
from torch import Tensor, nn

from qfuse.lowerings import quantize_rows, quantize_rows_inductor
from qfuse.row_program import RowProgram

ops = torch.ops.qfuse
pytestmark = pytest.mark.usefixtures("exact_casts")


def _rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return [m, k] rows of every kind: normal, zero, of one sign, denormal, infinite, NaN of both signs."""
    x = torch.randn(m, k) * 3
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = (0.0, -1.0, 2.0, tiny, math.inf, -math.inf, math.nan)
    for i, value in enumerate(special[: m // 2]):
        x[i] = value if i < 4 else x[i]
        x[i, -1] = value
    if m > 15:
        x[8, 0], x[9, k // 2], x[10] = -math.nan, math.nan, -x[10].abs()
        x[11] = x[11].abs()
        x[12, :] = -0.0
    return x.to(dtype)


class Kernels(nn.Module):
    """Programs without linears, so that integers and scales can be compared bit by bit."""

    def __init__(self, programs: list[str]) -> None:
        super().__init__()
        self.programs = programs

    def forward(self, v: Tensor) -> list[list[Tensor]]:
        return [ops.quantize_rows(v, program) for program in self.programs]


def _programs_of(dtype: torch.dtype) -> list[str]:
    """Return the programs of everything above."""
    models = [Quantized(quantize) for quantize in WRITTEN]
    models += [row.make(32, 67, dtype, True) for row in producers.ROWS if row.name in PRODUCERS]
    with parsed_programs() as programs:
        for model in models:
            trace(model, torch.randn(3, 67).to(dtype))
    return [*dict.fromkeys(programs), _mixed(dtype)]


def _mixed(dtype: torch.dtype) -> str:
    """A program of the operators that no producer uses: int8 and uint8 in one, and outputs of every type."""
    name = str(dtype).removeprefix("torch.")
    return "; ".join(
        f"""
        amax:{name} %0; convert:float64 %1; div:float64 %2 127.0; convert:float32 %3; ne:bool %4 %4
        where:float32 %5 1.0 %4; convert:float32 %0; div:float32 %7 %6; minimum:float32 %8 100.0; round:float32 %9
        maximum:float32 %10 -100.5; convert:int8 %11; convert:int32 %12; add:int32 %13 128; convert:uint8 %14
        lt:bool %7 0.0; neg:{name} %0; where:{name} %16 %17 %0; amin:{name} %18; convert:int8 %3; convert:int64 %4
        add:int64 %21 -3; sub:int32 1 %13; mul:int32 %23 3; convert:uint8 %24; ge:bool %13 4; where:int32 %26 %13 %24
        abs:int32 %27; convert:int8 %28; convert:{name} %13; convert:float32 %30; convert:int8 %31; convert:int32 %5
        -> %12 %15 %2 %4 %19 %20 %22 %25 %29 %32 %33 %1
        """.strip().split("\n")
    ).replace("        ", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_bits(dtype: torch.dtype) -> None:
    """Scales and integers are those of the reference, whatever is in a row; integers of NaN are undefined."""
    model = Kernels(_programs_of(dtype))
    compiled = torch.compile(model, dynamic=True)
    with one_translation_unit():
        for m, k in ((17, 67), (3, 32), (19, 2), (16, 150), (400, 300)):
            _assert_same_bits(compiled, model, _rows(m, k, dtype))


def _assert_same_bits(compiled: Model, model: Kernels, v: Tensor) -> None:
    defined = v.isfinite().all(-1)
    for program, outputs in zip(model.programs, compiled(v), strict=True):
        for out, want in zip(outputs, RowProgram.parse(program)(v), strict=True):
            assert out.dtype is want.dtype
            if out.is_floating_point():
                assert torch.equal(out.isnan(), want.isnan())
                assert torch.equal(out.nan_to_num(), want.nan_to_num())
            else:
                assert torch.equal(out[defined], want[defined])


def test_one_row_and_one_column() -> None:
    """Sizes that are compiled for themselves."""
    model = Kernels([_mixed(torch.bfloat16)])
    for m, k in ((1, 70), (19, 1)):
        torch._dynamo.reset()
        _assert_same_bits(torch.compile(model, dynamic=False), model, _rows(m, k, torch.bfloat16))


def test_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable code computes the same bits."""
    portable = quantize_rows._TEMPLATE.replace("#define QFUSE_ROWS_AVX512", "")
    assert portable != quantize_rows._TEMPLATE
    monkeypatch.setattr(quantize_rows, "_TEMPLATE", portable)
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        model = Kernels(_programs_of(dtype)[-3:])
        _assert_same_bits(torch.compile(model), model, _rows(17, 67, dtype))


def test_nan_in_low_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose bits are all below those of bfloat16 does not become an infinity; nor without AVX-512."""
    program = "convert:bfloat16 %0; abs:bfloat16 %1; amax:bfloat16 %2; -> %3"
    v = torch.randn(4, 70)
    v.view(torch.int32)[1, 40] = 0x7F800001
    for replaced in ("", "#define QFUSE_ROWS_AVX512"):
        text = quantize_rows._TEMPLATE.replace(replaced, "") if replaced else quantize_rows._TEMPLATE
        monkeypatch.setattr(quantize_rows, "_TEMPLATE", text)
        torch._dynamo.reset()
        model = Kernels([program])
        _assert_same_bits(torch.compile(model), model, v)


def test_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program, as it is lowered on GPUs, is what Inductor makes of its operators; here it makes C++ of both."""
    monkeypatch.setattr(
        quantize_rows, "_kernel", lambda v, program, norm=None: quantize_rows_inductor.lower(v, program)
    )
    model = Kernels(_programs_of(torch.bfloat16)[::4])
    operators = [RowProgram.parse(program) for program in model.programs]
    v = _rows(17, 67, torch.bfloat16)
    lowered, plain = torch.compile(lambda v: (model(v), [run(v) for run in operators]))(v)
    assert len(lowered) == len(plain) >= 3
    for ours, theirs in zip(lowered, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_strides() -> None:
    """Rows that lie apart are read where they are; columns that do are copied."""
    model = Kernels(["amax:float32 %0; div:float32 %0 %1; round:float32 %2; convert:int8 %3; -> %4 %1"])

    def run(v: Tensor) -> list[Tensor]:
        (a,), (b,), (c,) = model(v[:, 3:36]), model(v.t()), model(v[1:, ::2])
        return [*a, *b, *c]

    v = torch.randn(34, 50)
    assert all(map(torch.equal, compile_and_count(run, v)[0], run(v)))


def test_dynamic_batch() -> None:
    """One compile for every M, none included."""
    model = Quantized(absmax)
    compiled = torch.compile(model, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (7, 40, 3):
            x = torch.randn(m, 67, dtype=torch.bfloat16)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), unfused(model, x), rtol=1e-6, atol=1e-6)
    rows = Kernels(["amax:float32 %0; div:float32 %0 %1; round:float32 %2; convert:int8 %3; -> %4 %1"])
    dynamic = torch.compile(rows, dynamic=True)
    for m in (5, 1, 0, 300):
        v = torch.randn(m, 67)
        assert all(map(torch.equal, dynamic(v)[0], rows(v)[0]))
