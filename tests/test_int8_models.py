"""The int8 family in all kinds of models: weights that change, no rows, gradients, export, very deep graphs."""

from __future__ import annotations

from pathlib import Path

import producers
import pytest
import torch
from hostile import Hostile, accumulator
from producers import T2, T7, T8, Written, quantized
from support import assert_no_worse, compile_and_run, error, in_float64, trace
from torch import Tensor

import qfuse
from qfuse.isa import Isa, cpu_isa
from qfuse.records import recording


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
    model = Hostile(lambda s, q, xs: accumulator(s, q).float() * xs * s.ws + s.b, n, k)
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
    model = Hostile(lambda s, q, xs: accumulator(s, q).float() * xs, 4, 65794)
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
