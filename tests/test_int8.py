"""The int8 family: every row of producers' graphs fuses, and what only looks like one does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import producers
import pytest
import torch
from expecttest import assert_expected_inline
from producers import ROWS, T2, T7, T8, Row, Written, quantized
from support import assert_no_worse, compile_and_run, error, in_float64, trace, without_amx
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional as F

import qfuse
from qfuse.isa import Isa, cpu_isa
from qfuse.records import recording

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


# --- what has to fuse ---------------------------------------------------------------------------------------------


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
    assert_no_worse(traced.result, model, *inputs)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_compiles_to_one_kernel(row: Row) -> None:
    model = row.make(48, 64, torch.bfloat16, True)
    inputs = model.inputs(2, 5)
    # without it Inductor keeps the bf16 scale in float32, and quantizes otherwise than the eager graph
    options = {"emulate_precision_casts": True}
    with fresh_cache():
        result, (*_, code) = run_and_get_code(torch.compile(model, options=options), *inputs)
    assert code.count("Microkernel microkernel(K);") == 1
    assert "extern_kernels." not in code
    assert_no_worse(result, model, *inputs)


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
    assert_no_worse(traced.result, model, *inputs)


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
    assert code.count("Microkernel microkernel(K);") == 3  # what is returned is not grouped
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


# --- what must not fuse, or only in part: it compiles, is right, and the reason is told ------------------------------


class Hostile(Written):
    """A float32 linear whose forward a test writes."""

    def __init__(self, forward: Callable[..., Any], n: int = 48, k: int = 64) -> None:
        super().__init__(n, k, torch.float32, True)
        self.written = forward

    def forward(self, *args: Tensor) -> Any:
        return self.written(self, *args)


def _accumulator(s: Written, q: Tensor) -> Tensor:
    return torch._int_mm(q, s.w.t())


def _shifted(s: Written, q: Tensor) -> Tensor:
    return torch._int_mm((q.int() + 128).to(torch.uint8), s.w.t())


NEGATIVES: dict[str, tuple[Callable[..., Any], str]] = {
    "accumulator used elsewhere": (
        lambda s, q, xs: ((acc := _accumulator(s, q)).float() * xs * s.ws, acc.sum(0)),
        "used by 2 nodes",
    ),
    "accumulator returned": (
        lambda s, q, xs: ((acc := _accumulator(s, q)).float() * xs * s.ws, acc),
        "used by 2 nodes",
    ),
    "never scaled": (lambda s, q, xs: _accumulator(s, q).float().relu(), "aten.relu.default"),
    "transposed before it is scaled": (lambda s, q, xs: _accumulator(s, q).t().float() * s.ws[0], "permuted"),
    "reshaped across columns": (
        lambda s, q, xs: _accumulator(s, q).view(-1, 24).float() * s.ws[:24],
        "across its 48 columns",
    ),
    "constant subtracted from the accumulator": (
        lambda s, q, xs: (_shifted(s, q) - s.w.sum(1, dtype=torch.int32) * 128 - 1).float() * xs * s.ws,
        "a number is subtracted from the accumulator",
    ),
    "compensation of another weight": (
        lambda s, q, xs: (_shifted(s, q) - (s.w + 1).sum(1, dtype=torch.int32) * 128).float() * xs * s.ws,
        "not a multiple of the weight's column sums",
    ),
    "compensation over rows": (
        lambda s, q, xs: (_shifted(s, q) - s.w.sum(1, dtype=torch.int32)[: q.shape[0], None] * 128).float() * xs,
        "does not vary over columns alone",
    ),
    "compensation in int8": (
        lambda s, q, xs: (_shifted(s, q) - s.w.sum(1, dtype=torch.int8)).float() * xs * s.ws,
        "not a multiple of the weight's column sums",
    ),
    "compensation subtracted twice over": (
        lambda s, q, xs: torch.sub(_shifted(s, q), s.w.sum(1, dtype=torch.int32) * 64, alpha=2).float() * xs,
        "with a factor (alpha)",
    ),
    "scale of every element": (
        lambda s, q, xs: _accumulator(s, q).float() * (xs * s.ws + 1),
        "varies over neither rows nor columns",
    ),
    "integer product that wraps around": (
        lambda s, q, xs: _accumulator(s, q).float() * (q[:, :1] * s.w[:, 0]),
        "varies over neither rows nor columns",
    ),
    "integer negative that wraps around": (
        lambda s, q, xs: _accumulator(s, q).float() * -((q[:, :1] | -128) & -128).expand(-1, s.n),
        "varies over neither rows nor columns",
    ),
    "scale that adds a dimension": (
        lambda s, q, xs: _accumulator(s, q).float() * s.ws.view(1, 1, -1).expand(2, 1, -1),
        "changes the shape",
    ),
    "compensation that adds a dimension": (
        lambda s, q, xs: (_shifted(s, q) - s.w.sum(1, dtype=torch.int32).view(1, 1, -1) * 128).float() * xs * s.ws,
        "changes the shape",
    ),
    "scale in float64": (lambda s, q, xs: _accumulator(s, q).float() * xs.double() * s.ws, "float64"),
    "integer scale": (lambda s, q, xs: (_accumulator(s, q) * 2).float().relu(), "integer scale"),
    "squared": (lambda s, q, xs: (f := _accumulator(s, q).float()) * f, "combined with itself"),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_declines(name: str) -> None:
    forward, reason = NEGATIVES[name]
    model = Hostile(forward)
    inputs = model.inputs(7)
    result, report = compile_and_run(model, *inputs)
    assert not report.matches
    assert [reason in miss.reason for miss in report.misses] == [True], report.misses
    assert report.misses[0].source
    assert_no_worse(result, model, *inputs)


#: What fuses, and which operators of the epilogue are left behind.
PARTIAL: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "result used twice": (lambda s, q, xs: (y := _accumulator(s, q).float() * xs * s.ws, y.relu()), ["relu.default"]),
    "intermediate used twice": (
        lambda s, q, xs: ((p := _accumulator(s, q).float() * xs) * s.ws, p - 1),
        ["mul.Tensor", "sub.Tensor"],
    ),
    "residual": (lambda s, q, xs: _accumulator(s, q).float() * xs * s.ws + q[:, :48], ["add.Tensor"]),
    "bias with alpha": (lambda s, q, xs: torch.add(_accumulator(s, q).float() * xs, s.b, alpha=2), ["add.Tensor"]),
    "addcmul with value": (
        lambda s, q, xs: torch.addcmul(s.b, _accumulator(s, q).float() * xs, s.ws, value=2),
        ["addcmul.default"],
    ),
    "float64 at the end": (
        lambda s, q, xs: (_accumulator(s, q).float() * xs * s.ws).double() + 1,
        ["convert_element_type.default", "add.Tensor"],
    ),
    "transposed at the end": (
        lambda s, q, xs: (_accumulator(s, q).float() * xs * s.ws).t().contiguous(),
        ["permute.default", "clone.default"],
    ),
    "bias that varies over rows": (lambda s, q, xs: _accumulator(s, q).float() * xs * s.ws + xs, []),
    "bias before the scales": (lambda s, q, xs: (_accumulator(s, q).float() + s.b) * xs * s.ws, []),
    "scaled after the bias": (lambda s, q, xs: (_accumulator(s, q).float() * xs + s.b) * s.ws, []),
    "two biases": (lambda s, q, xs: s.b - (_accumulator(s, q).float() * xs * s.ws + s.b * xs) + 1, []),
    "bias of rows times columns": (lambda s, q, xs: _accumulator(s, q).float() * xs * s.ws - (s.b * xs) * s.ws, []),
    "no compensation": (lambda s, q, xs: _shifted(s, q).float() * xs * s.ws, []),
    "zero point of 3": (lambda s, q, xs: (_shifted(s, q) - 3 * s.w.sum(1, dtype=torch.int32)).float() * xs, []),
    "zero point in int64": (lambda s, q, xs: (_shifted(s, q) - s.w.sum(1) * 128).float() * xs * s.ws, []),
    "correction that is added": (lambda s, q, xs: (_shifted(s, q) + -128 * s.w.sum(1)).float() * xs * s.ws, []),
    "scale of each batch": (
        lambda s, q, xs: _accumulator(s, q).view(1, 7, -1) * xs[:1].view(1, 1, 1).expand(1, 7, 1).float() * s.ws,
        ["view.default"],
    ),
    "negative zero point": (lambda s, q, xs: (_accumulator(s, q) - -s.w.int().sum(1).int()).float() * xs, []),
    "numbers for scales": (lambda s, q, xs: _accumulator(s, q).float() * 0.25 * s.ws + 1.5, []),
    "numbers whose product underflows": (
        lambda s, q, xs: _accumulator(s, q).float() * 1e-20 * 1e-20 * (xs * 1e20) * 1e20,
        ["mul.Tensor"] * 4,
    ),
    "numbers whose product overflows": (
        lambda s, q, xs: _accumulator(s, q).float() * (s.ws * 1e-20) * 1e20 * 1e20,
        ["mul.Tensor"],
    ),
    "two scales a column": (lambda s, q, xs: _accumulator(s, q).float() * s.ws * s.ws[0] * (s.ws + 1) * xs, []),
    "scales multiplied with each other": (lambda s, q, xs: _accumulator(s, q).float() * (xs * s.ws), []),
    "scale times the whole": (lambda s, q, xs: _accumulator(s, q) * (xs * (s.ws * 2)).to(torch.bfloat16), []),
    "divided": (lambda s, q, xs: _accumulator(s, q).float() / xs / (s.ws * 0.5) / 3, []),
    "negated": (lambda s, q, xs: -(_accumulator(s, q).float() * xs * s.ws + s.b), []),
    "padded rows": (lambda s, q, xs: torch._int_mm(F.pad(q, (0, 0, 0, 10)), s.w.t())[:7] * xs * s.ws + s.b, []),
    "padded K": (lambda s, q, xs: torch._int_mm(F.pad(q, (0, 8)), F.pad(s.w, (0, 8)).t()) * xs * s.ws, []),
    "padded columns": (
        lambda s, q, xs: (torch._int_mm(q, F.pad(s.w, (0, 0, 0, 16)).t()) * xs * F.pad(s.ws, (0, 16)))[:, :-16] + s.b,
        [],
    ),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_fuses_as_far_as_it_is_right(name: str) -> None:
    forward, left = PARTIAL[name]
    model = Hostile(forward)
    inputs = model.inputs(7)
    traced = trace(model, *inputs)
    assert [m.lowering for m in traced.report.matches] == ["cpp"], traced.report
    behind = traced.after[traced.after.index("qfuse.int8_linear.default") + 1 :]
    # what only prepares an operand of the rest is no epilogue
    assert [op.split(".", 1)[1] for op in behind if op.split(".")[1] != "slice"] == left
    assert_no_worse(traced.result, model, *inputs)
    result, _ = compile_and_run(model, *inputs)
    assert_no_worse(result, model, *inputs)


def test_constant_compensation() -> None:
    """Producers may have folded the column sums already; then their values are compared."""

    class Folded(T8):
        def __init__(self, offset: int) -> None:
            super().__init__(48, 64, torch.float32, True)
            self.register_buffer("compensation", 128 * self.w.sum(1, dtype=torch.int32) + offset)

        def forward(self, q: Tensor, xs: Tensor) -> Tensor:
            u = (q.to(torch.int32) + 128).to(torch.uint8)
            return (torch._int_mm(u, self.w.t()) - self.compensation).float() * xs * self.ws.view(-1)

    for offset in (0, 1):
        model = Folded(offset)
        inputs = model.inputs(7)
        result, report = compile_and_run(model, *inputs)
        assert len(report.matches) == 1 - offset
        assert len(report.misses) == offset
        assert_no_worse(result, model, *inputs)


def test_live_weight() -> None:
    def linear(q: Tensor, w: Tensor, xs: Tensor) -> Tensor:
        return torch._int_mm(q, w.t()).float() * xs

    inputs = (quantized(7, 64), quantized(48, 64), torch.rand(7, 1))
    result, report = compile_and_run(linear, *inputs)
    (miss,) = report.misses
    assert "the weight is not a constant" in miss.reason
    assert "parameter or a buffer" in miss.hint
    assert_no_worse(result, linear, *inputs)


def test_weight_changed_in_forward() -> None:
    """Freezing leaves a mutated buffer alone; a packed copy of it would be stale at the second call."""

    class Changing(Written):
        def forward(self, q: Tensor, xs: Tensor) -> Tensor:
            y = torch._int_mm(q, self.w.t()).float() * xs * self.ws
            self.w.add_(1)
            return y

    model = Changing(48, 64, torch.float32, False)
    model.w.clamp_(-100, 100)
    q, xs = model.inputs(7)
    torch._dynamo.reset()
    with recording() as (matches, misses):
        compiled = torch.compile(model)
        compiled(q, xs)
    assert not matches
    assert "not a constant" in misses[0].reason
    for _ in range(3):
        expected = (q.double() @ model.w.double().t()) * xs * model.ws
        assert error(compiled(q, xs), expected) < 1e-6


@pytest.mark.parametrize("shape", [(0, 64, 48), (7, 0, 48), (7, 64, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    model = Hostile(lambda s, q, xs: _accumulator(s, q).float() * xs * s.ws + s.b, n, k)
    inputs = model.inputs(m)
    result, report = compile_and_run(model, *inputs)
    assert result.shape == (m, n)
    assert torch.equal(result, model.b.expand(m, n))
    assert ["empty" in miss.reason for miss in report.misses] == [True]


def test_batch_that_becomes_empty_and_single() -> None:
    """With a symbolic batch the same model is called with M = 0 and M = 1 as well."""
    model = T7(48, 64, torch.float32, True)
    compiled = torch.compile(model, dynamic=True)
    qfuse.reset_stats()
    for m in (5, 0, 1, 9):
        inputs = model.inputs(m)
        result = compiled(*inputs)
        assert result.shape == (m, 48)
        assert sum(qfuse.stats().values()) >= 1  # the empty batch is compiled by itself, and declined
        assert error(result, in_float64(model, *inputs)) < 1e-5


def test_overflowing_sum() -> None:
    model = Hostile(lambda s, q, xs: _accumulator(s, q).float() * xs, 4, 65794)
    report = trace(model, *model.inputs(2)).report
    assert "overflow" in report.misses[0].reason


def test_gradients() -> None:
    """A training graph, and a graph compiled without no_grad, are left alone; the user is told what to do."""
    model = producers.TorchAO(48, 64, torch.float32, True)
    (x,) = model.inputs(7)
    with torch.enable_grad():
        result, report = compile_and_run(model, x.requires_grad_())
        result.sum().backward()
    (miss,) = report.misses
    assert "gradients" in miss.reason
    assert "no_grad" in miss.hint
    assert not report.matches
    assert model.linear.bias.grad is not None

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        result, report = compile_and_run(model, x.detach())
    (miss,) = report.misses
    assert "not a constant" in miss.reason
    assert "no_grad" in miss.hint
    assert_no_worse(result, model, x.detach())


def test_graphs_inside_a_graph() -> None:
    """The inputs of a branch are not the model's parameters, though they have the same names."""

    class Branching(Written):
        def __init__(self) -> None:
            super().__init__(48, 64, torch.float32, False)
            self.register_buffer("other", quantized(48, 64))

        def forward(self, q: Tensor, xs: Tensor) -> Tensor:
            def branch(q: Tensor, xs: Tensor) -> Tensor:
                u = (q.to(torch.int32) + 128).to(torch.uint8)
                compensation = self.other.sum(1, dtype=torch.int32) * 128  # of the other weight
                return (torch._int_mm(u, self.w.t()) - compensation).float() * xs * self.ws

            def other(q: Tensor, xs: Tensor) -> Tensor:
                return branch(q, xs) + 1

            return torch.cond(xs.sum() > 0, branch, other, (q, xs))

    model = Branching()
    inputs = model.inputs(7)
    result, report = compile_and_run(model, *inputs)
    assert not report.matches
    assert error(result, model(*inputs).double()) < 1e-6


def test_recompiled_with_other_weights() -> None:
    """A packed weight belongs to one compiled graph: what is compiled again sees the weight as it is then."""
    model = T2(48, 64, torch.float32, True)
    q, xs = model.inputs(7)
    for change in (
        lambda: None,
        lambda: model.load_state_dict(T2(48, 64, torch.float32, True).state_dict()),
        lambda: model.w.data.clamp_(-3, 3),
        lambda: setattr(model.w, "data", quantized(48, 64)),
    ):
        change()
        torch._dynamo.reset()
        expected = (q.double() @ model.w.double().t()) * xs * model.ws + model.b
        assert error(torch.compile(model)(q, xs), expected) < 1e-5


def test_exported() -> None:
    """torch.export asserts the dtype of what it converts; that is no use of it."""
    model = T2(48, 64, torch.float32, True)
    inputs = model.inputs(7)
    exported = torch.export.export(model, inputs).module()
    result, report = compile_and_run(exported, *inputs)
    assert len(report.matches) == 1, report.misses
    assert_no_worse(result, model, *inputs)


def test_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor calls from C++, which the kernels of `cpp` are made for."""
    model = T2(48, 64, torch.float32, True)
    inputs = model.inputs(7)
    with recording() as (matches, _):
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, inputs), package_path=str(tmp_path / "model.pt2")
        )
    assert [m.lowering for m in matches] == ["cpp" if cpu_isa() is not Isa.NONE else "aten"]
    assert_no_worse(torch._inductor.aoti_load_package(package)(*inputs), model, *inputs)


def test_deep_graph() -> None:
    """Nothing recurses through the graph, and constants are computed once."""

    class Deep(Written):
        def forward(self, q: Tensor, xs: Tensor) -> Tensor:
            for _ in range(1500):
                xs = xs * 1.001
            return torch._int_mm(q, self.w.t()).float() * xs * self.ws

    class Diamonds(Written):
        def forward(self, q: Tensor, xs: Tensor) -> Tensor:
            correction = self.w.sum(1, dtype=torch.int32)
            for i in range(40):
                correction = correction + (correction ^ i)
            return (torch._int_mm(q, self.w.t()) - correction).float() * xs * self.ws

    model = Diamonds(48, 64, torch.float32, False)
    assert "not a multiple" in trace(model, *model.inputs(7)).report.misses[0].reason
    model = Deep(48, 64, torch.float32, False)
    assert len(trace(model, *model.inputs(7)).report.matches) == 1


# --- float matmuls that look emulated --------------------------------------------------------------------------------


def _w(s: Written) -> Tensor:
    return s.w.float() * s.ws.view(-1, 1)


EMULATED_NEGATIVES: dict[str, tuple[Callable[..., Any], str]] = {
    "weight only": (lambda s, q, xs: F.linear(xs * 0.1 + q.float().sin(), _w(s)), "the activation is not"),
    "not rounded": (lambda s, q, xs: F.linear(q.float().sin().clamp(-128, 127) * xs, _w(s)), "the activation is not"),
    "not clamped": (lambda s, q, xs: F.linear((q.float() * 1.5).round() * xs, _w(s)), "the activation is not"),
    "clamped to more than 8 bits": (
        lambda s, q, xs: F.linear((q.float() * 1.5).round().clamp(-129, 127) * xs, _w(s)),
        "the activation is not",
    ),
    "clamped to what is no integer": (
        lambda s, q, xs: F.linear((q.float() * 1.5).round().clamp(-10.5, 10.5) * xs, _w(s)),
        "the activation is not",
    ),
    "scale of each element of K": (
        lambda s, q, xs: F.linear(q.float() * torch.ones(64).cumsum(0) * xs, _w(s)),
        "the activation is not",
    ),
    "zero point after the scale": (lambda s, q, xs: F.linear(q.float() * xs - xs, _w(s)), "the activation is not"),
    "weight with zero points": (
        lambda s, q, xs: F.linear(q.float() * xs, (s.w.float() - (s.b.view(-1, 1).round() + 100)) * 0.1),
        "the weight has zero points",
    ),
    "rounded to float8": (
        lambda s, q, xs: F.linear((q & 15).to(torch.float8_e4m3fn).float() * xs, _w(s)),
        "the activation is not",
    ),
    "in float64": (lambda s, q, xs: F.linear(q.double() * xs, _w(s).double()), "computed in float64"),
    "addmm with beta": (
        lambda s, q, xs: torch.addmm(s.b, q.float() * xs, _w(s).t(), beta=2),
        "factors (alpha, beta)",
    ),
    "addmm with a residual": (
        lambda s, q, xs: torch.addmm(q[:, :48].float(), q.float() * xs, _w(s).t()),
        "varies over neither rows nor columns",
    ),
}


SYMBOLIC: dict[str, Callable[..., Any]] = {
    "scaled": lambda s, q, xs: _accumulator(s, q).float() * xs * s.ws * q.shape[0],
    "emulated": lambda s, q, xs: F.linear(q.float() * q.shape[0] * xs, _w(s)),
    "subtracted from the accumulator": lambda s, q, xs: (_accumulator(s, q) - q.shape[0]).float() * xs * s.ws,
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_numbers(name: str) -> None:
    """They are not known when the graph is matched: what comes before them is fused."""
    model = Hostile(SYMBOLIC[name])
    inputs = model.inputs(7)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    traced = trace(model, *inputs)
    assert len(traced.report.matches) == (name == "scaled"), traced.report
    assert not any("internal error" in miss.reason for miss in traced.report.misses), traced.report
    assert_no_worse(traced.result, model, *inputs)


@pytest.mark.parametrize("name", EMULATED_NEGATIVES)
def test_emulated_declines(name: str) -> None:
    forward, reason = EMULATED_NEGATIVES[name]
    model = Hostile(forward)
    inputs = model.inputs(7)
    traced = trace(model, *inputs)
    assert not traced.report.matches
    assert [reason in miss.reason for miss in traced.report.misses] == [True], traced.report.misses
    assert_no_worse(traced.result, model, *inputs)


def test_weight_scale_of_each_element_of_k_is_an_ordinary_matmul() -> None:
    model = Hostile(lambda s, q, xs: F.linear(q.float() * xs, s.w.float() * torch.ones(64).cumsum(0)))
    report = trace(model, *model.inputs(7)).report
    assert not report.matches
    assert not report.misses


def test_uncalibrated_ranges_are_not_quantized() -> None:
    """Gemma's modules with a scale of zero do not quantize: then there is nothing to fuse."""
    model = producers.P14(48, 64, torch.float32, True)
    with torch.no_grad():
        model.linear.input_activation_scale.zero_()
    (x,) = model.inputs(7)
    traced = trace(model, x)
    assert not traced.report.matches
    torch.testing.assert_close(traced.result, model(x))


def test_integer_matmul_of_a_frozen_weight() -> None:
    """Freezing packs the weight of any `mm` as float, and fails for integers: what is not fused is hidden from it."""
    model = Hostile(lambda s, q, xs: (q.int() @ s.w.t().int()).relu())
    inputs = model.inputs(7)
    result, report = compile_and_run(model, *inputs)
    assert len(report.misses) == 1
    assert torch.equal(result, model(*inputs))


def test_emulated_matmul_of_one_column() -> None:
    model = Hostile(lambda s, q, xs: F.linear(q.float() * xs, _w(s), s.b), n=1)
    inputs = model.inputs(7)
    traced = trace(model, *inputs)
    assert [m.pattern for m in traced.report.matches] == ["int8.dynamic_per_token"], traced.report
    assert_no_worse(traced.result, model, *inputs)


def test_int_scaled_matmul() -> None:
    """torchao's own operator, which it registers where Triton is installed; here by its schema alone."""
    library = torch.library.Library("torchao", "FRAGMENT")
    if not hasattr(torch.ops.torchao, "int_scaled_matmul"):
        library.define("int_scaled_matmul(Tensor a, Tensor b, Tensor scales1) -> Tensor")
        eager = "CompositeExplicitAutograd"
        library.impl("int_scaled_matmul", lambda a, b, s: torch._int_mm(a, b).to(s.dtype) * s, eager)
        fake = lambda a, b, s: s.new_empty((a.shape[0], b.shape[1]))  # noqa: E731
        torch.library.register_fake("torchao::int_scaled_matmul", fake, lib=library)

    def forward(s: Written, q: Tensor, xs: Tensor) -> Tensor:
        return torch.ops.torchao.int_scaled_matmul(q, s.w.t(), xs.expand(-1, s.n)) * s.ws + s.b

    model = Hostile(forward)
    q, xs = model.inputs(7)
    traced = trace(model, q, xs)
    assert [m.pattern for m in traced.report.matches] == ["int8.dynamic_per_token"]
    expected = (q.double() @ model.w.double().t()) * xs * model.ws + model.b
    assert error(traced.result, expected) < 1e-6
