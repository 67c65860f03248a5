"""LayerNorm and RMSNorm in one kernel with the quantization behind them: what is merged, what not, and its numbers."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expecttest
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from norms import (
    DTYPES,
    KERNEL,
    NORMS,
    Normed,
    assert_result_is_no_worse,
    code_and_result,
    error,
    layer_norm,
    of_llama,
    plain,
    rms_norm,
)
from support import Model, calls_of_kernels, compile_together, snapshots, trace
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import qfuse

ops = torch.ops.qfuse

pytestmark = pytest.mark.usefixtures("no_norm_reference")


def _merged(model: Model, *args: Any) -> int:
    """Return how many norms are merged with a quantization in the graph."""
    return trace(model, *args).after.count("qfuse.norm_quantize_rows.default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged(dtype: torch.dtype, subtests: pytest.Subtests) -> None:
    models = [Normed(norm, is_used=True) for norm in NORMS]
    inputs = [((torch.randn(6, 40, 67) * 3 + 1).to(dtype),) for _ in NORMS]
    results, code = compile_together(models, inputs)
    with qfuse.config.patch(fuse_norms=False):
        others, other_code = compile_together(models, inputs)
    assert (calls_of_kernels(KERNEL, code), calls_of_kernels(KERNEL, other_code)) == (len(NORMS), 0)
    for model, (x,), result, other in zip(models, inputs, results, others, strict=True):
        with subtests.test(norm=model.norm.__name__):
            assert_result_is_no_worse(result, other, model, x)


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


_CASES = st.tuples(_written(), st.sampled_from([(1, 8), (8, 8), (5, 7)]), st.sampled_from(DTYPES))


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # what fails is not made smaller: that takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(_CASES, min_size=15, max_size=15))
def test_any_way_to_write_it(cases: list[Any]) -> None:
    """Whatever the order of operands, and wherever it is cast and reshaped: merged if right, and no other result.

    Many are traced as one model, because tracing is what takes the time.
    """
    models = nn.ModuleList(Normed(norm, k, is_used=True) for (norm, _), (_, k), _ in cases)
    xs = [torch.randn(size).to(dtype) + 2 for _, size, dtype in cases]
    traced = trace(lambda *xs: [model(x) for model, x in zip(models, xs, strict=True)], *xs)
    outputs = traced.outputs[1::2]  # of a linear and its norm, in turn
    assert traced.after.count("qfuse.norm_quantize_rows.default") == sum(is_right for (_, is_right), _, _ in cases)
    for ((norm, is_right), _, dtype), model, x, output, (_, v) in zip(
        cases, models, xs, outputs, traced.result, strict=True
    ):
        assert (output == "<built-in function getitem>") == is_right
        exact = norm(x.double(), model.weight.double(), model.bias.double())
        assert torch.equal(v.isnan(), exact.isnan())  # as of the variance of one number, corrected
        deviation = (v.double() - exact).nan_to_num().abs().max()
        assert deviation <= 8 * torch.finfo(dtype).eps * exact.nan_to_num().abs().max()


# ---- in a model


def test_rows_that_nothing_else_needs() -> None:
    """They are not stored; a norm that is used elsewhere is, once."""
    x = torch.randn(9, 67, dtype=torch.bfloat16)
    for is_used in (False, True):
        code, _ = code_and_result(Normed(layer_norm, is_used=is_used), x)
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
        assert error(v, layer_norm(x.double(), *_parameters(model, torch.bfloat16))) < 0.004


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
    assert error(v, of_llama(other.double(), model.weight.bfloat16().double(), model.bias.double())) < 0.004
