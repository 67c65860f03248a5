"""The int8 family: every row of producers' graphs fuses, into the operators that are expected."""

from __future__ import annotations

import re

import producers
import pytest
import torch
from expecttest import assert_expected_inline
from producers import ROWS, T2, T7, T8, Row, Written
from support import (
    assert_no_worse,
    calls_of_kernels,
    compile_and_run,
    compile_together,
    error,
    in_float64,
    trace,
    without_amx,
)
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache, run_and_get_code

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "bias"), [((7,), False), ((2, 5), True)], ids=["2d", "3d-bias"])
def test_fuses(row: Row, dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    model = row.make(48, 64, dtype, bias)
    inputs = model.inputs(*rows)
    traced = trace(model, *inputs)
    assert [m.pattern for m in traced.report.matches] == [row.pattern]
    assert not traced.report.misses
    assert "aten._int_mm.default" not in traced.after
    traced.assert_no_worse()


def test_compiles_to_one_kernel(subtests: pytest.Subtests) -> None:
    models = [row.make(48, 64, torch.bfloat16, True) for row in ROWS]
    inputs = [model.inputs(2, 5) for model in models]
    # without it Inductor keeps the bf16 scale in float32, and quantizes otherwise than the eager graph
    with inductor_config.patch(emulate_precision_casts=True):
        results, code = compile_together(models, inputs)
    assert calls_of_kernels("Microkernel microkernel(K, ", code) == len(ROWS)
    assert "aoti_torch_cpu" not in code
    for row, result, model, args in zip(ROWS, results, models, inputs, strict=True):
        with subtests.test(row=str(row)):
            assert_no_worse(result, model, *args)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_symbolic_rows(row: Row) -> None:
    model = row.make(48, 64, torch.bfloat16, True)
    inputs = model.inputs(2, 5)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    traced = trace(model, *inputs)
    (match,) = traced.report.matches
    assert match.shape.endswith("×64×48")
    assert not match.shape.startswith("10×")
    traced.assert_no_worse()


@pytest.mark.parametrize("row", [r for r in ROWS if r.name in ("T7-torchao", "P1/P2")], ids=str)
def test_one_compile_serves_all_batches(row: Row) -> None:
    model = row.make(48, 64, torch.float32, True)
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for rows in [(2, 5), (3, 4), (17, 2), (5, 33)]:
        inputs = model.inputs(*rows)
        assert error(compiled(*inputs), in_float64(model, *inputs)) < 1e-5
    # one for `compiled`; each in_float64 is a compile of its own
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 4


@pytest.mark.parametrize("order", ["x first", "w first"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_square_result_in_either_order_of_scales(order: str, dtype: torch.dtype) -> None:
    """M == N: a swapped pair of scales would fit, and be wrong."""

    class Square(Written):
        def forward(self, q: Tensor, xs: Tensor) -> Tensor:
            y = torch._int_mm(q, self.w.t()).to(self.dtype)
            return self.plus_bias(y * xs * self.ws if order == "x first" else y * self.ws * xs)

    model = Square(48, 64, dtype, True)
    inputs = model.inputs(48)
    result, report = compile_and_run(model, *inputs)
    assert len(report.matches) == 1
    assert_no_worse(result, model, *inputs)


def test_shared_activation_and_tied_weight() -> None:
    """q, k and v share the quantized activation; two of them share the weight as well."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 48), nn.Linear(64, 32, bias=False)
            producers.quantize_(self, producers.Int8DynamicActivationInt8WeightConfig())
            self.v = self.k

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.q(x), self.k(x), self.v(x).relu()

    model, x = Attention(), torch.randn(2, 5, 64)
    with fresh_cache():
        result, (*_, code) = run_and_get_code(torch.compile(model), x)
    assert_no_worse(result, model, x)
    assert code.count("Microkernel microkernel(K, ") == 3  # what is returned is not grouped
    call = r"cpp_fused_\w+\((buf\d+), (_frozen_param\d+),"
    activations, weights = zip(*re.findall(call, code), strict=True)
    assert len(activations) == 3
    assert len(set(activations)) == 1  # quantized once
    assert len(set(weights)) == 2  # the tied pair has one packed weight
    assert len(trace(model, x).report.matches) == 3


def _ops(model: Written) -> str:
    with without_amx():
        traced = trace(model, *model.inputs(2, 5))
    return "\n".join(["before:", *traced.before, "", "after:", *traced.after])


def test_ops_t2() -> None:
    assert_expected_inline(
        _ops(T2(48, 64, torch.bfloat16, True)),
        """\
before:
aten.view.default
aten.permute.default
aten._int_mm.default
prims.convert_element_type.default
aten.view.default
aten.expand.default
aten.mul.Tensor
aten.mul.Tensor
aten.view.default
aten.add.Tensor

after:
aten.view.default
aten.view.default
qfuse.pack_column_sums.default
aten.view.dtype
aten.add.Tensor
aten.reshape.default
prims.convert_element_type.default
prims.convert_element_type.default
prims.convert_element_type.default
qfuse.pack_int8_weight.default
qfuse.int8_linear.default
aten.view.default""",
    )


def test_ops_t5() -> None:
    assert_expected_inline(
        _ops(producers.T5(48, 64, torch.bfloat16, True)),
        """\
before:
aten.view.default
aten.permute.default
aten._int_mm.default
prims.convert_element_type.default
aten.view.default
aten.expand.default
aten.mul.Tensor
aten.view.default
aten.mul.Tensor
aten.view.default
aten.add.Tensor

after:
aten.view.default
aten.view.default
aten.view.default
qfuse.pack_column_sums.default
aten.view.dtype
aten.add.Tensor
aten.reshape.default
prims.convert_element_type.default
prims.convert_element_type.default
prims.convert_element_type.default
qfuse.pack_int8_weight.default
qfuse.int8_linear.default
aten.view.default""",
    )


def test_ops_t7() -> None:
    assert_expected_inline(
        _ops(T7(48, 64, torch.bfloat16, True)),
        """\
before:
aten.view.default
prims.convert_element_type.default
aten.add.Tensor
prims.convert_element_type.default
aten.permute.default
aten.sum.dim_IntList
aten.mul.Tensor
aten.permute.default
aten._int_mm.default
aten.sub.Tensor
prims.convert_element_type.default
aten.view.default
aten.mul.Tensor
prims.convert_element_type.default
aten.view.default
aten.mul.Tensor
aten.view.default
aten.add.Tensor
prims.convert_element_type.default

after:
aten.view.default
prims.convert_element_type.default
aten.add.Tensor
prims.convert_element_type.default
aten.view.default
aten.view.default
qfuse.pack_column_sums.default
aten.reshape.default
prims.convert_element_type.default
qfuse.pack_int8_weight.default
qfuse.int8_linear.default
aten.view.default""",
    )


def test_ops_t8() -> None:
    assert_expected_inline(
        _ops(T8(48, 64, torch.bfloat16, True)),
        """\
before:
aten.view.default
aten.permute.default
aten._int_mm.default
prims.convert_element_type.default
aten.view.default
aten.mul.Tensor
prims.convert_element_type.default
aten.view.default
aten.mul.Tensor
aten.view.default
aten.add.Tensor
prims.convert_element_type.default

after:
aten.view.default
aten.view.default
aten.view.default
qfuse.pack_column_sums.default
aten.view.dtype
aten.add.Tensor
aten.reshape.default
prims.convert_element_type.default
qfuse.pack_int8_weight.default
qfuse.int8_linear.default
aten.view.default""",
    )


def test_ops_p1() -> None:
    assert_expected_inline(
        _ops(producers.P1(48, 64, torch.bfloat16, False)),
        """\
before:
aten.view.default
aten._int_mm.default
prims.convert_element_type.default
aten.view.default
aten.mul.Tensor
aten.mul.Tensor
prims.convert_element_type.default
aten.view.default

after:
aten.view.default
aten.view.default
aten.permute.default
qfuse.pack_column_sums.default
aten.view.dtype
aten.add.Tensor
aten.reshape.default
aten.reshape.default
qfuse.pack_int8_weight.default
qfuse.int8_linear.default
aten.view.default""",
    )


def test_ops_p2() -> None:
    assert_expected_inline(
        _ops(producers.P1(48, 64, torch.bfloat16, True)),
        """\
before:
aten.view.default
aten._int_mm.default
prims.convert_element_type.default
aten.view.default
aten.mul.Tensor
aten.addcmul.default
prims.convert_element_type.default
aten.view.default

after:
aten.view.default
aten.view.default
aten.permute.default
qfuse.pack_column_sums.default
aten.view.dtype
aten.add.Tensor
aten.reshape.default
aten.reshape.default
qfuse.pack_int8_weight.default
qfuse.int8_linear.default
aten.view.default""",
    )
