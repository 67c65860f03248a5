"""LayerNorm and RMSNorm in one kernel with the quantization behind them: what is merged, what not, and its numbers."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expecttest
import producers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Model, snapshots, trace
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.lowering import fallback_handler
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import qfuse
from qfuse.lowerings import quantize_rows

ops = torch.ops.qfuse

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: How the kernel is called in generated code.
KERNEL = "q::normalize<"


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference does not run where the kernel fails."""
    monkeypatch.setattr(quantize_rows, "_norm_reference", None)


def _merged(model: Model, *args: Any) -> int:
    """Return how many norms are merged with a quantization in the graph."""
    return trace(model, *args).after.count("qfuse.norm_quantize_rows.default")


class Normed(nn.Module):
    """An int8 linear behind a norm that a test writes down, and what else is computed of the norm.

    norm: x, [..., K], weight and bias, [K] → [..., K]. is_used: the norm is returned as well.
    """

    def __init__(self, norm: Callable[..., Tensor], k: int = 67, is_used: bool = False) -> None:
        super().__init__()
        self.norm, self.k, self.is_used = norm, k, is_used
        self.register_buffer("w", producers.quantized(32, k))
        self.register_buffer("ws", torch.rand(32) / 100 + 0.01)
        self.register_buffer("weight", torch.rand(k) + 0.5)
        self.register_buffer("bias", torch.randn(k))

    def forward(self, x: Tensor) -> Any:
        v = self.norm(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        scale = v.abs().amax(-1, True).float().clamp(min=1e-5) / 127
        q = (v / scale).round().clamp(-127, 127).to(torch.int8)
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * scale.reshape(-1, 1) * self.ws
        y = y.reshape(*x.shape[:-1], -1)
        return (y, v) if self.is_used else y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def of_llama(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As transformers write it: rounded in front of the weight, which comes first."""
    v = _float(x)
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * v.to(x.dtype)


def of_gemma(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The weight is one more than what is stored, in float32; the square is a product."""
    v = _float(x)
    v = v * torch.rsqrt(1e-6 + (v * v).mean(-1, keepdim=True))
    return (v * (1.0 + _float(weight))).to(x.dtype)


def of_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Reshaped on the way, and back."""
    v = x.reshape(-1, x.shape[-1])
    return nn.functional.layer_norm(v, v.shape[-1:], weight, bias).reshape(x.shape)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In the activation's dtype."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return bias[None] + weight * (torch.rsqrt(variance + 1e-5) * (x - mean))


NORMS = (layer_norm, without_bias, plain, rms_norm, of_llama, of_gemma, of_rows, by_hand)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)
def test_merged(norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    model, x = Normed(norm, is_used=True), (torch.randn(6, 40, 67) * 3 + 1).to(dtype)
    _assert_no_worse(model, x)


def _assert_no_worse(model: Normed, x: Tensor) -> None:
    """Compare with float64, where nothing is quantized, beside what Inductor makes of the norm."""
    code, result = _code_and_result(model, x)
    assert code.count(KERNEL) == 1
    with qfuse.config.patch(fuse_norms=False):
        code, other = _code_and_result(model, x)
    assert code.count(KERNEL) == 0
    v = model.norm(x.double(), *(t.to(x.dtype).double() for t in (model.weight, model.bias)))
    exact = v @ (model.w.double() * model.ws[:, None].double()).t(), v
    for got, beside, want in zip(result, other, exact, strict=True):
        assert got.dtype is beside.dtype
        assert _error(got, want) <= 1.05 * _error(beside, want) + torch.finfo(torch.float32).eps


def _code_and_result(model: Model, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    torch._dynamo.reset()
    result, codes = run_and_get_code(torch.compile(model, **kwargs), *args)
    return "".join(codes), result


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


class TestGraphs(expecttest.TestCase):
    def test_before_and_after(self) -> None:
        model, x = Normed(layer_norm, is_used=True), torch.randn(5, 67, dtype=torch.bfloat16)
        with qfuse.config.patch(fuse_norms=False):
            before = trace(model, x).after
        after = trace(model, x).after
        self.assertExpectedInline(
            "\n".join([*_norm(before), "=>", *_norm(after)]),
            """\
prims.convert_element_type.default
prims.convert_element_type.default
prims.convert_element_type.default
aten.var_mean.correction
<built-in function getitem>
<built-in function getitem>
aten.add.Tensor
aten.rsqrt.default
aten.sub.Tensor
aten.mul.Tensor
aten.mul.Tensor
aten.add.Tensor
prims.convert_element_type.default
qfuse.quantize_rows.default
<built-in function getitem>
<built-in function getitem>
=>
prims.convert_element_type.default
prims.convert_element_type.default
qfuse.norm_quantize_rows.default
<built-in function getitem>
<built-in function getitem>
<built-in function getitem>""",
        )


def _norm(operators: list[str]) -> list[str]:
    """Return the operators from the first to the one in front of the linear's."""
    return operators[: next(i for i, name in enumerate(operators) if "pack_column_sums" in name)]


# ---- what has to stay as it is


def sample_variance(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias


def of_columns(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 0, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias


def of_all(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean((0, 1), keepdim=True) + 1e-5) * weight


def of_others(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The variance of something else."""
    variance, mean = torch.var_mean(x.sin(), -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias


def of_a_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt((x * 3.0).mean(-1, keepdim=True).abs() + 1e-5) * weight


def of_cubes(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9.0) * weight


def mixed_moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Centered, by the mean of squares that are not."""
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def swapped_moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - variance) * torch.rsqrt(mean.abs() + 1e-5) * weight + bias


def of_neighbours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each row is scaled by the next one's moment."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5).roll(1, 0) * weight


def over_groups(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    v = x.reshape(-1, 2, x.shape[-1] // 2)
    return (v * torch.rsqrt((v * v).mean(-1, keepdim=True) + 1e-5)).reshape(x.shape) * weight


def across(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """M = K: each column is scaled by the moment of the row of its number."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5).t() * weight


def with_rows_added(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """M = K: what is added varies over rows."""
    return layer_norm(x, weight, bias) + bias[:, None]


def with_tensor_eps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + bias.abs().amax()) * weight


def with_reciprocal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.reciprocal((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def in_float64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x.double(), weight.double(), bias.double()).to(x.dtype)


NEGATIVES = (
    sample_variance,
    of_columns,
    of_all,
    of_others,
    of_a_product,
    of_cubes,
    mixed_moments,
    swapped_moments,
    of_neighbours,
    over_groups,
    across,
    with_rows_added,
    with_tensor_eps,
    with_reciprocal,
    in_float64,
)


@pytest.mark.parametrize("norm", NEGATIVES, ids=lambda f: f.__name__)
def test_not_merged(norm: Callable[..., Tensor]) -> None:
    operators = trace(Normed(norm, 64), torch.randn(64, 64) + 0.5).after
    assert operators.count("qfuse.quantize_rows.default") == 1  # what would have been merged is there
    assert "qfuse.norm_quantize_rows.default" not in operators


def test_what_is_used_elsewhere() -> None:
    """A norm of which more than the result is used stays, for it would be computed twice."""

    def moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        inner = (x - mean) * torch.rsqrt(variance + 1e-5)
        seen.append(inner)
        return inner * weight + bias

    class Both(Normed):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, seen.pop()

    seen: list[Tensor] = []
    assert _merged(Both(moments), torch.randn(5, 67)) == 0


def test_rounded_to_float16() -> None:
    """What overflows float16 in front of the norm is infinite in the graph: that is where x begins."""
    x = torch.randn(5, 67, dtype=torch.bfloat16) * 1e6
    model = Normed(lambda x, weight, bias: rms_norm(x.half(), weight.half(), bias))
    assert trace(model, x).result.isnan().any()


def test_longer_than_any_row() -> None:
    assert _merged(Normed(plain, (1 << 16) + 1), torch.randn(2, (1 << 16) + 1)) == 0


def test_left_out_by_name() -> None:
    with inductor_config.patch(disabled_passes="qfuse.norm"):
        assert _merged(Normed(layer_norm), torch.randn(5, 67)) == 0


def test_switched_off() -> None:
    with qfuse.config.patch(fuse_norms=False):
        assert _merged(Normed(layer_norm), torch.randn(5, 67)) == 0


def test_without_quantization() -> None:
    """What nothing is quantized behind is Inductor's."""
    assert _merged(nn.LayerNorm(67), torch.randn(5, 67)) == 0


# ---- the matcher


@st.composite
def _written(draw: st.DrawFn) -> tuple[Callable[..., Tensor], bool]:
    """Return a norm as somebody may write it, and whether it is one: something in it may be wrong."""
    swapped, widened, flat = (draw(st.tuples(*[st.booleans()] * 5)) for _ in range(3))
    is_centered, has_weight, has_bias = (draw(st.booleans()) for _ in range(3))
    is_of_other, over_columns, is_uneven = (draw(st.sampled_from([False] * 5 + [True])) for _ in range(3))
    dims = [0] if over_columns else [-1]

    def shaped(v: Tensor, i: int) -> Tensor:
        v = v.float() if widened[i] else v
        return v.reshape(-1, v.shape[-1]) if flat[i] else v.reshape(1, -1, v.shape[-1])

    def product(a: Tensor, b: Tensor, i: int) -> Tensor:
        return a * b if swapped[i] else b * a

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        v = x.reshape(-1, x.shape[-1]).float() if widened[0] else x.reshape(-1, x.shape[-1])
        other = v * 3 if is_of_other else v
        if is_centered:
            variance, mean = torch.var_mean(other, dims, correction=1 if is_uneven else 0, keepdim=True)
            deviation = v - mean
        else:
            deviation, variance = v, product(v, other, 0).mean(dims, keepdim=True)
            variance = variance * 2 if is_uneven else variance
        v = product(deviation, torch.rsqrt(variance + 1e-3 if swapped[1] else 1e-3 + variance), 2)
        v = product(shaped(v, 1), weight if flat[2] else weight[None], 3) if has_weight else v
        v = shaped(v, 3) + bias if has_bias else v
        return v.reshape(x.shape).to(x.dtype)

    return norm, not (is_of_other or over_columns or is_uneven)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_written(), st.sampled_from([(1, 8), (8, 8), (5, 7)]), st.sampled_from(DTYPES))
def test_any_way_to_write_it(written: Any, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever the order of operands, and wherever it is cast and reshaped: merged if right, and no other result."""
    norm, is_right = written
    m, k = size
    model, x = Normed(norm, k, is_used=True), torch.randn(m, k).to(dtype) + 2
    traced = trace(model, x)
    assert traced.after.count("qfuse.norm_quantize_rows.default") == is_right
    v, exact = traced.result[1].double(), norm(x.double(), model.weight.double(), model.bias.double())
    assert (v - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


# ---- the kernel


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
    code, results = _code_and_result(lambda *xs: [model(x) for model, x in zip(models, xs, strict=True)], *xs)
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
    code, result = _code_and_result(run, x)
    assert code.count(KERNEL) == 3
    for got, want in zip(result, run(x), strict=True):
        torch.testing.assert_close(got[0], want[0])
        assert all(map(torch.equal, got[1:], ops.quantize_rows(got[0], program)))


def test_large_mean() -> None:
    """The mean's rounding is taken out again, so that a small variance beside it is right."""
    model, x = Kernel(384, None, None, torch.float32), torch.randn(9, 384) / 100 + 1e4
    _, (v, *_) = _code_and_result(model, x)
    assert _error(v, _exact(x.double(), None, None, True)) < 1e-5


@pytest.mark.parametrize("k", [384, 4096])
def test_one_large_number(k: int) -> None:
    """What is added to it is not lost: sums are of parts of a row."""
    x = torch.randn(16, k)
    x[:, 7] = 1e6 * (1 + torch.rand(16))
    _assert_no_worse(Normed(plain, k, is_used=True), x)


def test_sum_that_overflows() -> None:
    """The mean does not: rows without variance are the bias."""
    model, x = Kernel(2048, None, torch.float32, torch.float32), torch.full((3, 2048), 3e38)
    _, (v, *_) = _code_and_result(model, x)
    torch.testing.assert_close(v, model.bias.expand_as(v))


def test_rows_that_are_not_numbers() -> None:
    """NaN and infinity stay in their row; a constant row has no variance, and gets the bias."""
    model = Kernel(67, torch.float32, torch.float32, torch.float32)
    x = torch.randn(20, 67)
    x[3, 5], x[4, 66], x[5] = math.nan, math.inf, 7.0
    _, (v, _, scale) = _code_and_result(model, x)
    assert v.isnan().all(-1).nonzero().flatten().tolist() == [3, 4]
    assert scale.isnan().nonzero().flatten().tolist() == [3, 4]
    torch.testing.assert_close(v[5], model.bias)


def test_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs all the same."""
    reference = fallback_handler(ops.norm_quantize_rows.default, add_to_fallback_set=False)
    monkeypatch.setattr(quantize_rows, "_norm_reference", reference)
    monkeypatch.setattr(quantize_rows, "QuantizeRows", None)
    model, x = Kernel(67, None, None, torch.float32), torch.randn(19, 67)
    code, outputs = _code_and_result(model, x)
    assert "qfuse.norm_quantize_rows.default(" in code
    assert KERNEL not in code
    _check(model, x, outputs)


@inductor_config.patch(fx_graph_cache=False)
def test_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    portable = quantize_rows._TEMPLATE.replace("#define QFUSE_ROWS_AVX512", "")
    assert portable != quantize_rows._TEMPLATE
    monkeypatch.setattr(quantize_rows, "_TEMPLATE", portable)
    for dtype, is_centered in itertools.product(DTYPES, (True, False)):
        model, x = Kernel(67, dtype, torch.float32, dtype, is_centered), torch.randn(19, 67).to(dtype)
        _check(model, x, _code_and_result(model, x)[1])


@inductor_config.patch(fx_graph_cache=False)
def test_without_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = quantize_rows._NORM.replace("#ifdef __AVX512BF16__", "#if 0")
    assert emulated != quantize_rows._NORM
    monkeypatch.setattr(quantize_rows, "_NORM", emulated)
    model, x = Kernel(67, None, None, torch.bfloat16), torch.randn(19, 67)
    _check(model, x, _code_and_result(model, x)[1])


# ---- in a model


def test_rows_that_nothing_else_needs() -> None:
    """They are not stored; a norm that is used elsewhere is, once."""
    x = torch.randn(9, 67, dtype=torch.bfloat16)
    for is_used in (False, True):
        code, _ = _code_and_result(Normed(layer_norm, is_used=is_used), x)
        assert code.count(KERNEL) == 1
        assert ("alignas(64) T rows" in code) is not is_used


def test_bert_and_llama() -> None:
    """Every norm that is in front of a linear, with the residual's addition left to the linear before."""
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = torch.randint(0, 100, (2, 16))
    models = (
        BertModel(BertConfig(intermediate_size=128, **shape)),
        LlamaModel(LlamaConfig(intermediate_size=128, **shape)),
    )
    for model in models:
        model.eval().bfloat16()
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        operators = trace(lambda ids, model=model: model(ids).last_hidden_state, ids).after
        assert operators.count("qfuse.norm_quantize_rows.default") == 4
        assert operators.count("aten.rsqrt.default") == 1  # in front of what the model returns


@pytest.mark.parametrize("sizes", [((7,), (40,), (3,)), ((2, 5), (3, 7), (4, 2))], ids=["batch", "batch and length"])
def test_symbolic_sizes(sizes: tuple[tuple[int, ...], ...]) -> None:
    model = Normed(layer_norm, is_used=True)
    compiled = torch.compile(model)
    for i, size in enumerate(sizes):
        x = torch.randn(*size, 67, dtype=torch.bfloat16)
        for dim in range(len(size)):
            torch._dynamo.mark_dynamic(x, dim)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            (_, v), codes = run_and_get_code(compiled, x) if i == 0 else (compiled(x), None)
        assert codes is None or codes[0].count(KERNEL) == 1
        assert _error(v, layer_norm(x.double(), *_parameters(model, torch.bfloat16))) < 0.004


def _parameters(model: Normed, dtype: torch.dtype) -> list[Tensor]:
    return [parameter.to(dtype).double() for parameter in (model.weight, model.bias)]


def test_ahead_of_time(tmp_path: Path) -> None:
    """`torch.export` asserts the dtypes of what is no longer computed."""
    model, x, other = Normed(of_llama, is_used=True), torch.randn(20, 67).bfloat16(), torch.randn(33, 67).bfloat16()
    rows = torch.export.Dim("rows", min=2, max=500)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    with snapshots() as (_, after):
        torch._inductor.aot_compile(exported.module(), (x,))
    assert "qfuse.norm_quantize_rows.default" in after.ops
    assert "aten.rsqrt.default" not in after.ops
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    with zipfile.ZipFile(package) as files:
        (kernels,) = (name for name in files.namelist() if name.endswith("kernel.cpp"))
        assert files.read(kernels).decode().count(KERNEL) == 1
    _, v = torch._inductor.aoti_load_package(package)(other)
    assert _error(v, of_llama(other.double(), model.weight.bfloat16().double(), model.bias.double())) < 0.004
