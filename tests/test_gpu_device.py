"""What can only be tested on a GPU: numbers, as the device computes them. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from support import assert_no_worse
from torch import nn
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quant_primitives import MappingType
from triton_cases import Case, cases, problems, tma_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="there is no GPU that torch can use (torch.cuda.is_available() is false): see CONTRIBUTING.md",
    ),
]

#: The cases with their gap between rows: those that TMA takes have none.
CASES = [(case, 3) for case in cases()] + [(case, 0) for case in tma_cases()]


@pytest.mark.parametrize(("case", "gap"), CASES, ids=str)
def test_numbers(case: Case, gap: int) -> None:
    assert_numbers(case, gap, "cuda")


def assert_numbers(case: Case, gap: int, device: str) -> None:
    """Compare with the reference. A GPU multiplies and adds in one step, without the rounding between: hence not bits.

    What rounding may change is relative to the terms that are added, not to their sum.
    """
    ((model, dynamic, examples),) = problems([case], gap)
    compiled = torch.compile(model.to(device), dynamic=dynamic, options={"emulate_precision_casts": True})
    for inputs in examples:
        on_device = [tensor.to(device) for tensor in inputs]
        result = compiled(*on_device)
        bound = 4 * torch.finfo(model.out).eps * model.magnitude(*on_device)
        deviation = (result.double() - model(*on_device).double()).abs()
        assert torch.all(deviation <= bound), (deviation - bound).max()


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_model(dtype: torch.dtype, mapping: MappingType) -> None:
    """Quantizations and linears one behind the other; what is not fused needs M > 16 on CUDA."""
    model = nn.Sequential(nn.Linear(192, 256), nn.GELU(), nn.Linear(256, 128)).to("cuda", dtype)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(act_mapping_type=mapping))
    x = torch.randn(40, 192, dtype=dtype, device="cuda")
    result, (code,) = run_and_get_code(torch.compile(model, options={"emulate_precision_casts": True}), x)
    assert code.count("async_compile.triton('triton_tem_") == 2
    assert_no_worse(result, model, x)
