"""Dynamic quantization as one kernel: what is rewritten, and that every bit of it is the graph's own."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expecttest
import producers
import pytest
import torch
from quantizations import (
    DTYPES,
    KERNEL,
    PRODUCERS,
    WRITTEN,
    Quantized,
    absmax,
    compile_and_count,
    parsed_programs,
    unrounded,
)
from support import Model, trace, unfused, without_amx
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel

import qfuse

aten, ops = torch.ops.aten, torch.ops.qfuse

pytestmark = pytest.mark.usefixtures("exact_casts")

#: The rewritten op in a graph.
REWRITTEN = "qfuse.quantize_rows.default"


def _quantizations(model: Model, *args: Any) -> int:
    """Return how many quantizations are rewritten in the graph."""
    return trace(model, *args).after.count(REWRITTEN)


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
        with parsed_programs() as programs:
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
    result, kernels = compile_and_count(block, x)
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
    result, kernels = compile_and_count(model, x)
    assert kernels == 1
    with qfuse.config.patch(fuse_quantization=False):
        expected, none = compile_and_count(model, x)
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
    result, _ = compile_and_count(model, x)
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
