"""The int8 family: what must not fuse, or only in part. It compiles, is right, and the reason is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import producers
import pytest
import torch
from hostile import Hostile, accumulator
from producers import Written
from support import assert_no_worse, calls_of_kernels, compile_and_run, compile_together, error, trace
from torch import Tensor
from torch.nn import functional as F


def _shifted(s: Written, q: Tensor) -> Tensor:
    return torch._int_mm((q.int() + 128).to(torch.uint8), s.w.t())


NEGATIVES: dict[str, tuple[Callable[..., Any], str]] = {
    "accumulator used elsewhere": (
        lambda s, q, xs: ((acc := accumulator(s, q)).float() * xs * s.ws, acc.sum(0)),
        "used by 2 nodes",
    ),
    "accumulator returned": (
        lambda s, q, xs: ((acc := accumulator(s, q)).float() * xs * s.ws, acc),
        "used by 2 nodes",
    ),
    "never scaled": (lambda s, q, xs: accumulator(s, q).float().relu(), "aten.relu.default"),
    "transposed before it is scaled": (lambda s, q, xs: accumulator(s, q).t().float() * s.ws[0], "permuted"),
    "reshaped across columns": (
        lambda s, q, xs: accumulator(s, q).view(-1, 24).float() * s.ws[:24],
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
        lambda s, q, xs: accumulator(s, q).float() * (xs * s.ws + 1),
        "varies over neither rows nor columns",
    ),
    "integer product that wraps around": (
        lambda s, q, xs: accumulator(s, q).float() * (q[:, :1] * s.w[:, 0]),
        "varies over neither rows nor columns",
    ),
    "integer negative that wraps around": (
        lambda s, q, xs: accumulator(s, q).float() * -((q[:, :1] | -128) & -128).expand(-1, s.n),
        "varies over neither rows nor columns",
    ),
    "scale that adds a dimension": (
        lambda s, q, xs: accumulator(s, q).float() * s.ws.view(1, 1, -1).expand(2, 1, -1),
        "changes the shape",
    ),
    "compensation that adds a dimension": (
        lambda s, q, xs: (_shifted(s, q) - s.w.sum(1, dtype=torch.int32).view(1, 1, -1) * 128).float() * xs * s.ws,
        "changes the shape",
    ),
    "scale in float64": (lambda s, q, xs: accumulator(s, q).float() * xs.double() * s.ws, "float64"),
    "integer scale": (lambda s, q, xs: (accumulator(s, q) * 2).float().relu(), "integer scale"),
    "squared": (lambda s, q, xs: (f := accumulator(s, q).float()) * f, "combined with itself"),
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
    "result used twice": (lambda s, q, xs: (y := accumulator(s, q).float() * xs * s.ws, y.relu()), ["relu.default"]),
    "intermediate used twice": (
        lambda s, q, xs: ((p := accumulator(s, q).float() * xs) * s.ws, p - 1),
        ["mul.Tensor", "sub.Tensor"],
    ),
    "residual": (lambda s, q, xs: accumulator(s, q).float() * xs * s.ws + q[:, :48], ["add.Tensor"]),
    "bias with alpha": (lambda s, q, xs: torch.add(accumulator(s, q).float() * xs, s.b, alpha=2), ["add.Tensor"]),
    "addcmul with value": (
        lambda s, q, xs: torch.addcmul(s.b, accumulator(s, q).float() * xs, s.ws, value=2),
        ["addcmul.default"],
    ),
    "float64 at the end": (
        lambda s, q, xs: (accumulator(s, q).float() * xs * s.ws).double() + 1,
        ["convert_element_type.default", "add.Tensor"],
    ),
    "transposed at the end": (
        lambda s, q, xs: (accumulator(s, q).float() * xs * s.ws).t().contiguous(),
        ["permute.default", "clone.default"],
    ),
    "bias that varies over rows": (lambda s, q, xs: accumulator(s, q).float() * xs * s.ws + xs, []),
    "bias before the scales": (lambda s, q, xs: (accumulator(s, q).float() + s.b) * xs * s.ws, []),
    "scaled after the bias": (lambda s, q, xs: (accumulator(s, q).float() * xs + s.b) * s.ws, []),
    "two biases": (lambda s, q, xs: s.b - (accumulator(s, q).float() * xs * s.ws + s.b * xs) + 1, []),
    "bias of rows times columns": (lambda s, q, xs: accumulator(s, q).float() * xs * s.ws - (s.b * xs) * s.ws, []),
    "no compensation": (lambda s, q, xs: _shifted(s, q).float() * xs * s.ws, []),
    "zero point of 3": (lambda s, q, xs: (_shifted(s, q) - 3 * s.w.sum(1, dtype=torch.int32)).float() * xs, []),
    "zero point in int64": (lambda s, q, xs: (_shifted(s, q) - s.w.sum(1) * 128).float() * xs * s.ws, []),
    "correction that is added": (lambda s, q, xs: (_shifted(s, q) + -128 * s.w.sum(1)).float() * xs * s.ws, []),
    "scale of each batch": (
        lambda s, q, xs: accumulator(s, q).view(1, 7, -1) * xs[:1].view(1, 1, 1).expand(1, 7, 1).float() * s.ws,
        ["view.default"],
    ),
    "negative zero point": (lambda s, q, xs: (accumulator(s, q) - -s.w.int().sum(1).int()).float() * xs, []),
    "numbers for scales": (lambda s, q, xs: accumulator(s, q).float() * 0.25 * s.ws + 1.5, []),
    "numbers whose product underflows": (
        lambda s, q, xs: accumulator(s, q).float() * 1e-20 * 1e-20 * (xs * 1e20) * 1e20,
        ["mul.Tensor"] * 4,
    ),
    "numbers whose product overflows": (
        lambda s, q, xs: accumulator(s, q).float() * (s.ws * 1e-20) * 1e20 * 1e20,
        ["mul.Tensor"],
    ),
    "two scales a column": (lambda s, q, xs: accumulator(s, q).float() * s.ws * s.ws[0] * (s.ws + 1) * xs, []),
    "scales multiplied with each other": (lambda s, q, xs: accumulator(s, q).float() * (xs * s.ws), []),
    "scale times the whole": (lambda s, q, xs: accumulator(s, q) * (xs * (s.ws * 2)).to(torch.bfloat16), []),
    "divided": (lambda s, q, xs: accumulator(s, q).float() / xs / (s.ws * 0.5) / 3, []),
    "negated": (lambda s, q, xs: -(accumulator(s, q).float() * xs * s.ws + s.b), []),
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
    traced.assert_no_worse()


def test_what_fuses_in_part_compiles(subtests: pytest.Subtests) -> None:
    models = [Hostile(forward) for forward, _ in PARTIAL.values()]
    inputs = [model.inputs(7) for model in models]
    results, code = compile_together(models, inputs)
    assert calls_of_kernels("Microkernel microkernel(K, ", code) == len(PARTIAL)
    for name, result, model, args in zip(PARTIAL, results, models, inputs, strict=True):
        with subtests.test(name):
            assert_no_worse(result, model, *args)


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
    "in float64": (lambda s, q, xs: F.linear(q.double() * xs, _w(s).double()), "computed in torch.float64"),
    "in int8, which wraps around": (lambda s, q, xs: (q @ s.w.t()).float() * xs * s.ws, "computed in torch.int8"),
    "in int16": (lambda s, q, xs: (q.short() @ s.w.t().short()).float() * xs * s.ws, "computed in torch.int16"),
    "scaled in int16": (lambda s, q, xs: F.linear((q.short() * 1000) * xs, _w(s)), "the activation is not"),
    "scaled in int32 by rows": (
        lambda s, q, xs: F.linear((q.int() * (xs * 1e9).int()).float(), _w(s)),
        "the activation is not",
    ),
    "zero point that wraps around in int16": (
        lambda s, q, xs: F.linear((q.short() - 32767) * xs, _w(s)),
        "the activation is not",
    ),
    "zero point of rows that may wrap around in int16": (
        lambda s, q, xs: F.linear((q.short() - (xs * 1e5).short()) * xs, _w(s)),
        "the activation is not",
    ),
    "bias of an integer matmul": (
        lambda s, q, xs: F.linear(q.int(), s.w.int(), s.b.int()).float() * xs * s.ws,
        "addmm of integers",
    ),
    "zero point with which an integer matmul wraps around": (
        lambda s, q, xs: ((q.int() - 1000000) @ s.w.t().int()).float() * xs * s.ws,
        "sums of 64 products wrap around",
    ),
    "zero point of rows with which one may": (
        lambda s, q, xs: ((q.int() - (xs * 1e6).int().clamp(-1000000, 1000000)) @ s.w.t().int()).float() * xs,
        "sums of 64 products wrap around",
    ),
    "zero point that wraps around behind it": (
        lambda s, q, xs: F.linear((q.int() - 32767).short() * xs, _w(s)),
        "the activation is not",
    ),
    "rounded up to more than 8 bits": (
        lambda s, q, xs: F.linear((q * 1.5).clamp(-127.4, 127.4).bfloat16().round() * xs, _w(s)),
        "the activation is not",
    ),
    "rounded up to more than 8 bits by its bounds": (
        lambda s, q, xs: F.linear((q.bfloat16() * 1.5).clamp(-127.4, 127.4).round() * xs, _w(s)),
        "the activation is not",
    ),
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
    "scaled": lambda s, q, xs: accumulator(s, q).float() * xs * s.ws * q.shape[0],
    "emulated": lambda s, q, xs: F.linear(q.float() * q.shape[0] * xs, _w(s)),
    "subtracted from the accumulator": lambda s, q, xs: (accumulator(s, q) - q.shape[0]).float() * xs * s.ws,
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
    traced.assert_no_worse()


@pytest.mark.parametrize("name", EMULATED_NEGATIVES)
def test_emulated_declines(name: str) -> None:
    forward, reason = EMULATED_NEGATIVES[name]
    model = Hostile(forward)
    inputs = model.inputs(7)
    traced = trace(model, *inputs)
    assert not traced.report.matches
    assert [reason in miss.reason for miss in traced.report.misses] == [True], traced.report.misses
    traced.assert_no_worse()


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


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, q, xs: (q.int() @ s.w.t().int()).relu(),
        lambda s, q, xs: F.linear(q.int(), s.w.int(), s.b.int()).relu(),
        lambda s, q, xs: torch.addmm(s.b.long(), q.long(), s.w.t().long(), beta=3, alpha=-2),
    ],
    ids=["mm", "addmm", "addmm with factors"],
)
def test_integer_matmul_of_a_frozen_weight(forward: Callable[..., Any]) -> None:
    """Freezing packs the weight of any `mm` as float, and fails for integers: what is not fused is hidden from it."""
    model = Hostile(forward)
    inputs = model.inputs(7)
    result, report = compile_and_run(model, *inputs)
    assert len(report.misses) == 1
    assert torch.equal(result, model(*inputs))


@pytest.mark.parametrize("sums", [torch.int32, torch.int64], ids=str)
def test_zero_point_that_might_leave_int32(sums: torch.dtype) -> None:
    """Not of 8 bits as the activation is; the sum of so many products fits only without it."""
    model = Hostile(
        lambda s, q, xs: (accumulator(s, q).to(sums) - 255 * s.w.sum(1, dtype=sums)).float() * xs, n=8, k=60000
    )
    (miss,) = trace(model, *model.inputs(7)).report.misses
    assert "might leave int32" in miss.reason


def test_known_zero_point_that_might_leave_int32() -> None:
    """As an offset in float it does not."""
    model = Hostile(lambda s, q, xs: F.linear((q.float() - 255) * xs, s.w.float()), n=8, k=60000)
    traced = trace(model, *model.inputs(7))
    assert [m.pattern for m in traced.report.matches] == ["int8.dynamic_per_token_asymmetric"], traced.report
    traced.assert_no_worse()


def test_batch_of_one() -> None:
    """Its result stays a batch."""
    model = Hostile(lambda s, q, xs: torch.bmm((q.float() * xs)[None], _w(s).t()[None]) + s.b)
    traced = trace(model, *model.inputs(7))
    assert len(traced.report.matches) == 1, traced.report
    assert traced.result.shape == (1, 7, 48)
    traced.assert_no_worse()


def test_emulated_matmul_of_one_column() -> None:
    model = Hostile(lambda s, q, xs: F.linear(q.float() * xs, _w(s), s.b), n=1)
    inputs = model.inputs(7)
    traced = trace(model, *inputs)
    assert [m.pattern for m in traced.report.matches] == ["int8.dynamic_per_token"], traced.report
    traced.assert_no_worse()


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
