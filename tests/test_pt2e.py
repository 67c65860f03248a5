"""PT2E graphs are Inductor's own: qfuse provably leaves them alone, and nothing is lost."""

from __future__ import annotations

import pytest
from support import run_python

_CODE = """
import re, torch, qfuse
from torch._inductor import config
from torch._inductor.utils import fresh_cache, run_and_get_code
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)).eval()
x = torch.randn(7, 64)
with torch.no_grad():
    exported = torch.export.export(model, (x,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic={dynamic}))
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)

    def compiled():
        torch._dynamo.reset()
        with fresh_cache():
            result, (*_, code) = run_and_get_code(torch.compile(converted), x)
        return result, re.findall(r"torch\\.ops\\.onednn\\.[a-z_.]+|extern_kernels\\.[a-z_]+", code)

    result, calls = compiled()
    assert not qfuse.stats(), qfuse.stats()
    report = qfuse.explain(converted, x)
    assert not report.matches and not report.misses, report
    qfuse.disable()
    config.freezing = True
    own, own_calls = compiled()
    assert calls == own_calls, (calls, own_calls)
    assert torch.equal(result, own)
    print(calls)
"""


@pytest.mark.parametrize("dynamic", [False, True], ids=["P15-static", "P16-dynamic"])
def test_left_to_inductor(dynamic: bool) -> None:
    run_python(_CODE.replace("{dynamic}", str(dynamic)))
