"""Dynamic quantization as one kernel: what is rewritten, and that every bit of it is the graph's own."""

from __future__ import annotations

import contextlib
import copy
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import expecttest
import producers
import pytest
import torch
from support import Model, trace, unfused, without_amx
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel

import qfuse
from qfuse.lowerings import quantize_rows, quantize_rows_inductor
from qfuse.row_program import RowProgram

aten, ops = torch.ops.aten, torch.ops.qfuse

#: What the rewritten op is called where its outputs are taken in generated code, once a kernel.
KERNEL = "q::for_lanes(K"

#: The rewritten op in a graph.
REWRITTEN = "qfuse.quantize_rows.default"


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Round where the graph rounds, and generate code anew."""
    with inductor_config.patch(emulate_precision_casts=True, fx_graph_cache=False):
        yield


def _quantizations(model: Model, *args: Any) -> int:
    """Return how many quantizations are rewritten in the graph."""
    return trace(model, *args).after.count(REWRITTEN)


def _compile(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """Compile and run; return the result, and the number of quantization kernels in the code."""
    torch._dynamo.reset()
    result, codes = run_and_get_code(torch.compile(model, **kwargs), *args)
    return result, sum(code.count('extern "C"\nvoid kernel(const') and code.count(KERNEL) for code in codes)


class Quantized(nn.Module):
    """A linear behind a quantization that a test writes down.

    quantize: x, [..., K] → q int8 and the scale, [..., 1]; and the zero point, if there is one.
    """

    def __init__(self, quantize: Callable[..., tuple[Tensor, ...]], k: int = 67, n: int = 32) -> None:
        super().__init__()
        self.quantize, self.k = quantize, k
        self.register_buffer("w", producers.quantized(n, k))
        self.register_buffer("ws", torch.rand(n) / 100 + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        q, scale, *_ = self.quantize(x)
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * scale.float().reshape(-1, 1) * self.ws
        return y.reshape(*x.shape[:-1], -1)


def absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row absmax, as most write it."""
    scale = x.abs().amax(-1, True).float().clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplied by an inverse scale, rounded to the activation's dtype on the way."""
    scale = 127 / x.abs().amax(-1, True).clamp_min(1e-5)
    return (x * scale).round().clamp(-128, 127).to(torch.int8), 1 / scale


def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A comparison and a choice where a row is zero, and a maximum with its index."""
    largest = x.abs().max(-1, keepdim=True).values
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8), scale


def unsigned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Half-precision activations are converted first; integers, in the end."""
    v = x.float()
    scale = torch.maximum(v.amax(-1, True), -v.amin(-1, True)) / 127
    return (v * scale.reciprocal()).round().to(torch.int32).clamp(-127, 127).to(torch.int8), scale


def of_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """A reduction of what is computed from the elements, and not read off their bits."""
    largest = (x.float() * x.float()).amax(-1, True) + 1
    scale = largest / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def without_dimension(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced dimension is dropped, and put back later."""
    scale = (x.abs().amax(-1) / 127.5).float().clamp_min(1e-5)
    return (x * (1.0 / scale).unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8), scale.unsqueeze(-1)


def unrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers by truncation."""
    scale = x.abs().amax(-1, True) / 127
    return (x / scale).to(torch.int8), scale


WRITTEN = (absmax, inverse, guarded, unsigned, of_squares, without_dimension, unrounded)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", WRITTEN, ids=lambda f: f.__name__)
def test_written(quantize: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    model, x = Quantized(quantize), torch.randn(2, 5, 67).to(dtype)
    assert torch.equal(_rewritten(model, x), _unrewritten(model, x))


def _rewritten(model: Model, *args: Any) -> Any:
    """Insist that one quantization is rewritten, and return the graph's result."""
    traced = trace(model, *args)
    assert traced.after.count(REWRITTEN) == 1
    return traced.result


def _unrewritten(model: Model, *args: Any) -> Any:
    """Run the same fused linears behind the graph's own quantization."""
    with qfuse.config.patch(fuse_quantization=False):
        return trace(model, *args).result


PRODUCERS = ("T4", "T7-torchao", "T7-torchao-reduced", "T10-torchao", "T13-torchao", "P12")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCERS)
def test_producers(name: str, dtype: torch.dtype) -> None:
    (row,) = (row for row in producers.ROWS if row.name == name)
    model = row.make(32, 67, dtype, True)
    inputs = model.inputs(2, 5)
    assert torch.equal(_rewritten(model, *inputs), _unrewritten(model, *inputs))


class TestGraphs(expecttest.TestCase):
    def setUp(self) -> None:
        self.enterContext(without_amx())

    def test_before_and_after(self) -> None:
        model, x = Quantized(absmax), torch.randn(5, 67)
        with qfuse.config.patch(fuse_quantization=False):
            before = trace(model, x).after
        after = trace(model, x).after
        self.assertExpectedInline(
            "\n".join([*_quantization(before), "=>", *_quantization(after)]),
            """\
aten.abs.default
aten.amax.default
aten.clamp_min.default
aten.div.Tensor
aten.div.Tensor
aten.round.default
aten.clamp_min.default
aten.clamp_max.default
prims.convert_element_type.default
=>
qfuse.quantize_rows.default
<built-in function getitem>
<built-in function getitem>""",
        )

    def test_program(self) -> None:
        with _programs() as programs:
            trace(Quantized(absmax), torch.randn(2, 5, 67, dtype=torch.bfloat16))
        self.assertExpectedInline(
            programs[0].replace("; ", "\n"),
            """\
abs:bfloat16 %0
amax:bfloat16 %1
convert:float32 %2
clamp_min:float32 %3 1e-05
div:float32 %4 127
div:float32 %0 %5
round:float32 %6
clamp_min:float32 %7 -127
clamp_max:float32 %8 127
convert:int8 %9
convert:uint8 %10
add:uint8 %11 128
-> %12 %5""",
        )

    def test_code(self) -> None:
        with inductor_config.patch({"cpp.threads": 1}):
            _, (*_, code) = run_and_get_code(torch.compile(Quantized(unrounded)), torch.randn(5, 67))
        kernel = code[(start := code.index("    using T = ")) : code.index("\n''')", start)]
        self.assertExpectedInline(
            kernel,
            """\
    using T = float;
    const int64_t M = static_cast<int64_t>(5L);
    const int64_t K = static_cast<int64_t>(67L);
    // What is computed once a row is a chain of latencies: it is done for as many rows together as L1 holds.
    constexpr int64_t MOST = 8;
    const int64_t BYTES = std::max<int64_t>(K, 1) * (sizeof(T));
    const int64_t R = std::clamp<int64_t>(24576 / BYTES, 1, MOST);
    struct Row { float x3; };
    #pragma omp parallel for num_threads(1) if(1 > 1 && M * K >= 16384)
    for (int64_t begin = 0; begin < M; begin += R) {
        const int64_t end = std::min(M, begin + R);
        Row carried[MOST];
        for (int64_t m = begin; m < end; m++) {
            const T* row = &(x[static_cast<int64_t>(67L*m)]);
            const auto e1 = q::extremes<true>(row, K);
            const float x2 = e1.amax();
            const float x3 = q::div(x2, static_cast<float>(127));
            Y1[m] = static_cast<float>(x3);
            carried[m - begin] = {x3};
        }
        for (int64_t m = begin; m < end; m++) {
            const T* row = &(x[static_cast<int64_t>(67L*m)]);
            const float x3 = carried[m - begin].x3;
            q::for_lanes(K, [&](int64_t k, auto lanes) {
                const q::F x0 = q::load(row + k, lanes);
                const q::F x4 = q::div(x0, q::F(x3));
                const q::I x5 = q::wrapped<int8_t>(q::truncated(x4));
                const q::I x6 = x5;
                const q::I x7 = q::add(x6, q::I(static_cast<int64_t>(128)));
                q::store(row, Y0 + m * K + k, x7, lanes);
            });
        }
    }
}""",
        )


def _quantization(operators: list[str]) -> list[str]:
    """Return the operators from the first to the one in front of the linear's."""
    return operators[: next(i for i, name in enumerate(operators) if "pack_column_sums" in name)]


@contextlib.contextmanager
def _programs() -> Iterator[list[str]]:
    """Note the programs that are parsed."""
    seen: list[str] = []
    parse = RowProgram.parse

    def noted(text: str) -> RowProgram:
        seen.append(text)
        return parse(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowProgram, "parse", noted)
        yield seen


# ---- the kernel


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
    with _programs() as programs:
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
    assert all(map(torch.equal, _compile(run, v)[0], run(v)))


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


# ---- in a model


class Writing(nn.Module):
    """A block that writes to its input, or to a buffer, after that has been quantized."""

    def __init__(self, write: Callable[..., Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.write, self.norm, self.linear = write, norm, nn.Linear(64, 64)
        self.register_buffer("state", torch.ones(8, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, x)


def residual_in_place(block: Writing, x: Tensor) -> Tensor:
    x += block.linear(block.norm(x))
    return x


def input_in_place(block: Writing, x: Tensor) -> Tensor:
    y = block.linear(block.norm(x))
    x.add_(1)
    return y


def part_in_place(block: Writing, x: Tensor) -> Tensor:
    y = block.linear(block.norm(x[2:]))
    x[2:].add_(1)
    return y


def buffer_in_place(block: Writing, x: Tensor) -> Tensor:
    y = block.linear(block.norm(block.state))
    block.state.copy_(x)
    return y


def intermediate_in_place(block: Writing, x: Tensor) -> Tensor:
    x = x * 2
    y = block.linear(block.norm(x))
    x[torch.tensor([1, 3])] = 5.0
    return y + x


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm])
@pytest.mark.parametrize(
    "write",
    [residual_in_place, input_in_place, part_in_place, buffer_in_place, intermediate_in_place],
    ids=lambda f: f.__name__,
)
def test_written_to_later(write: Callable[..., Tensor], norm: type[nn.Module]) -> None:
    """The kernel reads what was there before; Inductor counts the writer as one that uses its outputs."""
    block, x = Writing(write, norm(64)), torch.randn(8, 64)
    quantize_(block, Int8DynamicActivationInt8WeightConfig())
    other, y = copy.deepcopy(block), x.clone()
    result, kernels = _compile(block, x)
    assert kernels == 1
    for got, want in zip((result, x, block.state), (other(y), y, other.state), strict=True):
        torch.testing.assert_close(got, want, atol=0.01, rtol=0)


class Attention(nn.Module):
    """Three linears on one activation, behind something that must not be computed twice."""

    def __init__(self, signed: bool = False) -> None:
        super().__init__()
        self.signed = signed
        for name in "qkv":
            self.register_buffer(name, producers.quantized(32, 67))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        v = torch.nn.functional.gelu(x)
        outputs = []
        for name in "qkv":
            q, scale = absmax(v)
            y = torch._int_mm(q.reshape(-1, 67), self.get_buffer(name).t()).float()
            outputs.append((y * scale.reshape(-1, 1) * 0.25).reshape(*x.shape[:-1], 32))
        return tuple(outputs)


def test_shared() -> None:
    """q, k and v are quantized by one kernel, and the GELU is computed once."""
    model, x = Attention(), torch.randn(2, 9, 67, dtype=torch.bfloat16)
    result, kernels = _compile(model, x)
    assert kernels == 1
    with qfuse.config.patch(fuse_quantization=False):
        expected, none = _compile(model, x)
    assert none == 0
    assert all(map(torch.equal, result, expected))


def test_bert() -> None:
    """Of 12 linears, q, k and v of a layer share one quantization, and become one; no reduction is left."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=100, **shape)).eval().bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    operators = trace(lambda ids: model(ids).last_hidden_state, torch.randint(0, 100, (2, 16))).after
    counts = [
        operators.count(f"qfuse.{name}.default") for name in ("int8_linear", "quantize_rows", "norm_quantize_rows")
    ]
    assert counts == [8, 4, 4]
    assert "aten.amax.default" not in operators


def test_both_signednesses() -> None:
    """One kernel, though one linear takes int8 and the other uint8."""

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, scale = absmax(x)
        u = (q.to(torch.int32) + 128).to(torch.uint8)
        one, rows, none = torch.ones(1), scale.reshape(-1), torch.ops.qfuse.pack_column_sums(w)
        linear = torch.ops.qfuse.int8_linear
        a = linear(q, w, none, rows, one, None, [], [], 0, torch.float32, "aten")
        return a, linear(u, w, none, rows, one, None, [], [], 128, torch.float32, "aten")

    x, w = torch.randn(20, 67), producers.quantized(32, 67)
    expected = _unrewritten(run, x, w)
    assert all(map(torch.equal, _rewritten(run, x, w), expected))
    assert torch.equal(*expected)


def test_left_in_part() -> None:
    """An integer matmul that is not fused keeps its integers, and a scale its other arithmetic."""

    class Both(Quantized):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            q, scale = self.quantize(x)
            other = torch._int_mm(q, self.w.t())
            return super().forward(x), other, scale.exp() + 1, x / scale

    model, x = Both(absmax), torch.randn(20, 67)
    assert all(map(torch.equal, _rewritten(model, x), _unrewritten(model, x)))
    result, _ = _compile(model, x)
    for got, expected in zip(result, unfused(model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor, from C++; `torch.export` asserts dtypes of what is no longer computed."""
    model, x, other = Attention(), torch.randn(20, 67), torch.randn(33, 67)
    rows = torch.export.Dim("rows", min=2, max=500)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    with zipfile.ZipFile(package) as files:
        (kernels,) = (name for name in files.namelist() if name.endswith("kernel.cpp"))
        assert files.read(kernels).decode().count(KERNEL) == 1
    for got, expected in zip(torch._inductor.aoti_load_package(package)(other), unfused(model, other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_switched_off() -> None:
    with qfuse.config.patch(fuse_quantization=False):
        assert _quantizations(Quantized(absmax), torch.randn(5, 67)) == 0


# ---- what has to stay as it is


def over_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(0, True) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale.amax(-1, True).expand(x.shape[0], 1)


def over_all(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax() / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def by_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().sum(-1, True) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def unknown(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, True).log2().ceil().exp2() / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def of_neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row is scaled by the next one's maximum."""
    scale = x.abs().amax(-1, True).roll(1, 0) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def across(x: Tensor) -> tuple[Tensor, Tensor]:
    """M = K: the maximum of a row is that of a column."""
    scale = x.abs().amax(-1) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale.reshape(-1, 1)


def of_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Halves of a row have scales of their own."""
    halves = x.reshape(-1, 2, x.shape[-1] // 2)
    scale = halves.abs().amax(-1, True) / 127
    return (halves / scale).round().clamp(-127, 127).to(torch.int8).reshape(x.shape), scale.amax(1)


def in_float64(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, True).double() / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale.float()


NEGATIVES = (over_columns, over_all, by_sum, unknown, of_neighbours, across, of_groups, in_float64)


@pytest.mark.parametrize("quantize", NEGATIVES, ids=lambda f: f.__name__)
def test_not_rewritten(quantize: Callable[..., tuple[Tensor, ...]]) -> None:
    model, x = Quantized(quantize, 64), torch.randn(64, 64)
    traced = trace(model, x)
    assert REWRITTEN not in traced.after
    assert torch.equal(traced.result, _unrewritten(model, x))


def test_no_linear() -> None:
    assert _quantizations(lambda x: absmax(x), torch.randn(5, 67)) == 0
