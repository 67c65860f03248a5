"""The Triton lowering, verified without a GPU: numbers by Triton's interpreter, binaries and structure by compiling."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from producers import quantized
from support import run_python
from torch import Tensor, nn
from torch.nn import functional as F

from qfuse.lowerings.triton.configurations import configurations

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import fake_cuda

CAPABILITIES = [80, 89, 90, 100, 120]


class Linear(nn.Module):
    """A linear on CUDA as torchao 0.18 makes it (T9), its activation quantized before, with SiLU and a residual."""

    def __init__(self, k: int, n: int, *, fused: bool = True) -> None:
        super().__init__()
        self.register_buffer("weight", quantized(n, k))
        self.register_buffer("w_scale", torch.rand(n, 1))
        self.register_buffer("bias", torch.randn(n))  # as freezing leaves it; nothing is frozen here
        self.fused = fused

    def forward(self, x: Tensor, x_scale: Tensor, residual: Tensor) -> Tensor:
        """x: [M, K] int8. x_scale: [M, 1]. residual: [M, N]."""
        sums = torch._int_mm(x, self.weight.t())
        y = (sums * x_scale.expand(sums.shape)).bfloat16() * self.w_scale.reshape(-1)
        y = (y + self.bias).bfloat16()
        return F.silu(y) + residual if self.fused else y


def _inputs(m: int, k: int, n: int) -> tuple[Tensor, ...]:
    return quantized(m, k), torch.rand(m, 1), torch.randn(m, n, dtype=torch.bfloat16)


def test_numbers() -> None:
    """Bit for bit what the reference computes, at every shape, dtype and option, and nothing is read out of bounds."""
    done = run_python("import triton_numerics, torch\nwith torch.no_grad(): print(triton_numerics.check())")
    assert int(done.stdout.split()[-1]) >= 60


def test_faults_are_noticed() -> None:
    """The comparison above fails where a mask, an index, a dtype or a term is wrong."""
    done = run_python("import triton_numerics, torch\nwith torch.no_grad(): print(triton_numerics.check_faults())")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("m", [1, 48, 512])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_binary(capability: int, m: int) -> None:
    """No register is spilled, tensor cores multiply integers, and tiles are copied in the background."""
    generated = fake_cuda.generate(Linear(512, 256), *_inputs(m, 512, 256), capability=capability)
    (binary,) = generated.binaries()
    assert binary.stack == 0
    assert binary.shared <= fake_cuda.GPUS[capability].shared[0]
    assert any(name in binary.instructions for name in ("IMMA", "IGMMA", "UTCIMMA"))
    assert "LDGSTS" in binary.instructions


@pytest.mark.parametrize("m", [1, 512])
def test_structure(m: int) -> None:
    """One kernel: no integer matmul, no int32 tensor."""
    generated = fake_cuda.generate(Linear(512, 256), *_inputs(m, 512, 256))
    assert len(generated.kernels) == 1
    assert "_int_mm" not in re.sub(r"fused__int_mm\w*|#.*", "", generated.source.split("def call(")[1])
    assert "torch.int32" not in generated.source.split("def call(")[1]


def test_amd() -> None:
    generated = fake_cuda.generate(Linear(512, 256), *_inputs(512, 512, 256), capability=80)
    (kernel,) = generated.kernels.values()
    assembly = fake_cuda.compile_for_amd(kernel).asm["amdgcn"]
    assert "v_mfma_i32" in assembly
    assert re.search(r"\.vgpr_spill_count:\s+0\b", assembly)


def test_configurations_fit() -> None:
    for rows in (1, 16, 17, 64, 65, 4096):
        for limit in (None, 101376, 166912, 232448):
            fitting = configurations(rows, limit)
            assert fitting
            assert all(c.shared_bytes <= (limit or 49152) for c in fitting)
