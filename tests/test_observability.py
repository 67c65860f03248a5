"""What the user sees: explain, stats, TORCH_LOGS, the structured trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from producers import T2, TorchAO
from support import run_python
from torch import Tensor, nn

import qfuse


class Block(nn.Module):
    """Two quantized linears, one of which has a result that nothing can be fused into."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TorchAO(48, 64, torch.float32, True), T2(48, 48, torch.float32, True)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        accumulator = torch._int_mm(y.to(torch.int8), self.layers[1].w.t())
        return accumulator.float() * accumulator


def test_explain() -> None:
    report = qfuse.explain(Block(), torch.randn(7, 64))
    (match,), (miss,) = report.matches, report.misses
    assert (match.pattern, match.lowering, match.shape) == ("int8.dynamic_per_token", "cpp", "7×64×48")
    assert match.dtypes in ("uint8 → float32", "int8 → float32")  # torchao's graph depends on the CPU
    assert match.module == "layers.0.linear"
    assert re.search(r"producers\.py:\d+$", match.source)
    assert miss.module == ""
    assert re.search(r"test_observability\.py:\d+$", miss.source)
    assert "used by 2 nodes" in miss.reason
    text = str(report)
    assert text.startswith("qfuse fused 1 of 2 quantized matmuls")
    assert "layers.0.linear" in text
    assert "used by 2 nodes" in text


def test_explain_compiles_nothing_and_disturbs_nothing() -> None:
    model, x = TorchAO(48, 64, torch.float32, True), torch.randn(7, 64)
    compiled = torch.compile(model)
    expected = compiled(x)
    stats = qfuse.stats()
    graphs = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
    qfuse.explain(model, x)
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"] == graphs
    assert qfuse.stats() == stats
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), expected)


def test_explain_passes_on_the_models_error() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        qfuse.explain(broken, torch.ones(3))


def test_nothing_quantized() -> None:
    report = qfuse.explain(nn.Linear(3, 4), torch.ones(2, 3))
    assert str(report) == "qfuse fused 0 of 0 quantized matmuls"


def test_stats() -> None:
    assert qfuse.stats() == {}
    torch.compile(Block())(torch.randn(7, 64))
    assert qfuse.stats() == {"int8.dynamic_per_token": 1}
    qfuse.reset_stats()
    assert qfuse.stats() == {}


def test_an_error_in_qfuse_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("broken on purpose")

    model = TorchAO(48, 64, torch.float32, True)
    inputs = model.inputs(7)
    expected = model(*inputs)
    monkeypatch.setattr("qfuse.rewrite._Rewriter._by_side", broken)
    torch.testing.assert_close(torch.compile(model)(*inputs), expected, rtol=1e-4, atol=1e-4)
    (miss,) = qfuse.explain(model, *inputs).misses
    assert "internal error, please report it: RuntimeError('broken on purpose')" in miss.reason


def test_passes_can_be_left_out_by_name() -> None:
    """torch's compiler bisector does it so."""
    model = T2(48, 64, torch.float32, True)
    with torch._inductor.config.patch(disabled_passes="qfuse.fuse"):
        report = qfuse.explain(model, *model.inputs(7))
    assert not report.matches
    assert len(qfuse.explain(model, *model.inputs(7)).matches) == 1


def test_explain_again_and_for_many_models() -> None:
    """Dynamo caches, and limits recompiles, by code object: each call has its own."""
    for _ in range(10):
        model = T2(48, 64, torch.float32, True)
        for _ in range(2):
            assert len(qfuse.explain(model, *model.inputs(7)).matches) == 1


def test_explain_says_that_qfuse_is_off() -> None:
    model = T2(48, 64, torch.float32, True)
    with qfuse.config.patch(enabled=False):
        assert "qfuse is switched off" in str(qfuse.explain(model, *model.inputs(7)))


_COMPILE = """
import torch
{before}
import qfuse
from test_observability import Block
with torch.no_grad():
    torch.compile(Block())(torch.randn(7, 64))
"""


_COMPILE_AGAIN = """
import os, sys
for logs in ("+qfuse", "qfuse_matches"):
    print("---- next", file=sys.stderr)
    os.environ["TORCH_LOGS"] = logs
    torch._logging._internal._init_logs()  # as at import, which takes seconds
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Block())(torch.randn(7, 64))
"""


def test_torch_logs() -> None:
    code = _COMPILE.format(before="") + _COMPILE_AGAIN
    info, debug, table = run_python(code, TORCH_LOGS="qfuse").stderr.split("---- next")
    assert "qfuse fused 1 of 2 quantized matmuls" in info
    assert "used by 2 nodes" in info
    assert "stopped at" not in info
    assert "stopped at" in debug
    assert "│ int8.dynamic_per_token │ cpp" in table
    assert "not fused: " not in table


def test_torch_logs_without_autoload() -> None:
    """The names are registered at import as well."""
    before = 'assert "qfuse" not in torch._logging._internal.log_registry.log_alias_to_log_qnames'
    after = "torch._logging.set_logs(modules={'qfuse': 20})"
    code = _COMPILE.format(before=before).replace("import qfuse\n", f"import qfuse\n{after}\n")
    assert "qfuse fused 1 of 2" in run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stderr


def test_import_torch_does_not_import_qfuse() -> None:
    code = """
        import sys, torch
        assert "_qfuse_autoload" in sys.modules
        assert "qfuse" not in sys.modules
        assert "qfuse_matches" in torch._logging._internal.log_registry.artifact_names
        assert "qfuse" in torch._dynamo.list_backends()
    """
    run_python(code)


def test_structured_trace(tmp_path: Path) -> None:
    run_python(_COMPILE.format(before=""), TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.iterdir()
    lines = trace.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if '"name": "qfuse_matches"' in line)
    payload = []
    for line in lines[start + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line)
    records = json.loads("\n".join(payload))
    assert [m["pattern"] for m in records["matches"]] == ["int8.dynamic_per_token"]
    assert len(records["misses"]) == 1
