"""Finding the one fusion that is to blame: a limit, switches by pattern, torch's compiler bisector, verification."""

from __future__ import annotations

import logging

import pytest
import torch
from producers import T2, TorchAO
from support import run_python, trace
from torch import Tensor, nn
from torch._inductor.compiler_bisector import CompilerBisector

import qfuse
from qfuse.config import _number
from qfuse.isa import ACTIVATION_DTYPE, cpu_isa
from qfuse.lowerings.call import Int8LinearCall
from qfuse.lowerings.cpp import Cpp


class Three(nn.Module):
    """Three quantized linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TorchAO(48, 64, torch.float32, True) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("limit", [0, 2, 3, -1])
def test_limit(limit: int) -> None:
    model = Three()
    with qfuse.config.patch(fusion_limit=limit):
        report = trace(model, *model.layers[0].inputs(7)).report
    fused = 3 if limit < 0 else limit
    assert (len(report.matches), len(report.misses)) == (fused, 3 - fused)
    assert {miss.reason for miss in report.misses} <= {"left out to bisect"}


def test_environment() -> None:
    code = """
        import torch, qfuse
        from test_bisection import Three
        model = Three()
        with torch.no_grad():
            assert len(qfuse.explain(model, *model.layers[0].inputs(7)).matches) == 2
            qfuse.reset_stats()
            (row,) = qfuse.explain(model.layers[0], *model.layers[0].inputs(7)).matches
            qfuse.config.disabled_patterns = ["int8.dynamic_per_token"]
            assert not qfuse.explain(model, *model.layers[0].inputs(7)).matches
        assert row.lowering == "aten"
    """
    run_python(code, QFUSE_FUSION_LIMIT="2", QFUSE_DISABLED_LOWERINGS="cpp, onednn, none")


def test_a_limit_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import qfuse` must not fail for it."""
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("qfuse"), "warning", lambda message, *args: told.append(message % args))
    for value, limit in (("2", 2), ("", -1), ("two", -1)):
        monkeypatch.setenv("QFUSE_FUSION_LIMIT", value)
        assert _number("QFUSE_FUSION_LIMIT", -1) == limit
    assert told == ["QFUSE_FUSION_LIMIT='two' is no number: it is ignored"]


def test_unknown_names_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("qfuse.fusion.log.warning", lambda message, *args: told.append(message % args))
    model = T2(48, 64, torch.float32, True)
    with qfuse.config.patch(disabled_patterns=["int8.dynamic_per_tokenn"]):
        trace(model, *model.inputs(7))
    (message,) = told
    assert "'int8.dynamic_per_tokenn'" in message
    assert "int8.dynamic_per_token_asymmetric" in message


@pytest.mark.skipif(cpu_isa() not in ACTIVATION_DTYPE, reason="without qfuse, oneDNN saturates: nothing else is right")
def test_compiler_bisector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three linears is lowered wrongly; torch's bisector names it."""
    model = Three()
    (x,) = model.layers[0].inputs(7)
    expected = model(x)
    original = Cpp.lower
    second = torch.ops.qfuse.pack_int8_weight(model.layers[1].linear.weight.qdata)
    seen: list[bool] = []

    def broken(self: Cpp, call: Int8LinearCall) -> object:
        weight = torch._inductor.virtualized.V.graph.constants[call.weight.get_name()]
        seen.append(torch.equal(weight, second))
        result = original(self, call)
        return torch._inductor.lowering.lowerings[torch.ops.aten.mul.Tensor](result, 2.0) if seen[-1] else result

    monkeypatch.setattr(Cpp, "lower", broken)

    def is_right() -> bool:
        torch._dynamo.reset()
        qfuse.reset_stats()
        results = torch.compile(model)(x)
        return all(torch.allclose(r, e, atol=1e-3) for r, e in zip(results, expected, strict=True))

    with qfuse.config.patch(verify=False, group_linears=False):  # verifying would find the fusion at once
        found = CompilerBisector.do_bisect(is_right)
    assert any(seen)
    assert found is not None
    assert "qfuse: int8.dynamic_per_token layers.1.linear" in str(found.debug_info)


def test_verification_catches_a_broken_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Three()
    (x,) = model.layers[0].inputs(7)
    expected = model(x)
    original = Cpp.lower

    def broken(self: Cpp, call: Int8LinearCall) -> object:
        return torch._inductor.lowering.lowerings[torch.ops.aten.mul.Tensor](original(self, call), 1.001)

    with qfuse.config.patch(verify=True):
        assert len(trace(model, x).report.matches) == 3
        monkeypatch.setattr(Cpp, "lower", broken)
        report = trace(model, x).report
        assert not report.matches
        assert all("verification failed" in miss.reason for miss in report.misses)
        torch._dynamo.reset()
        for result, value in zip(torch.compile(model)(x), expected, strict=True):
            torch.testing.assert_close(result, value, atol=1e-4, rtol=1e-4)
