"""Ahead-of-time compiled packages run where qfuse is not imported, and are as exact there."""

from __future__ import annotations

from pathlib import Path

from support import run_python

COMPILE = """
    import copy, torch, qfuse
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 70)).bfloat16()
    exact = copy.deepcopy(model).double()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=((rows, None),))
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
        assert sum(qfuse.stats().values()) == 2, qfuse.stats()
        torch.save([(x[:m], model(x[:m]), exact(x[:m].double())) for m in (33, 2)], "expected.pt")
"""

RUN = """
    import sys, torch

    package = torch._inductor.aoti_load_package("model.pt2")
    for x, eager, exact in torch.load("expected.pt"):
        assert (package(x) - exact).norm() <= 1.05 * (eager - exact).norm()
    assert "qfuse" not in sys.modules
"""


def test_a_package_needs_no_qfuse(tmp_path: Path) -> None:
    run_python(COMPILE, cwd=str(tmp_path))
    run_python(RUN, cwd=str(tmp_path))
