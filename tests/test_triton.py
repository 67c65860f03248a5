"""The Triton lowering, verified without a GPU: numbers by Triton's interpreter, binaries and structure by compiling."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
from support import run_python
from torch import Tensor
from torch._inductor import config as inductor_config

import qfuse
from qfuse.lowerings.triton.configurations import configurations

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import fake_cuda
import gpu_binary
import gpu_evidence
from fake_cuda import Generated
from gpu_evidence import Linear, inputs


def test_numbers() -> None:
    """Bit for bit what the reference computes, at every shape, dtype and option, and nothing is read out of bounds."""
    done = run_python("import triton_numerics, torch\nwith torch.no_grad(): print(triton_numerics.check())")
    assert int(done.stdout.split()[-1]) == 133


def test_numbers_with_tma() -> None:
    done = run_python("import triton_numerics, torch\nwith torch.no_grad(): print(triton_numerics.check_tma())")
    assert int(done.stdout.split()[-1]) == 36


def test_faults_are_noticed() -> None:
    """The comparison above fails where a mask, an index, a dtype or a term is wrong."""
    done = run_python("import triton_numerics, torch\nwith torch.no_grad(): print(triton_numerics.check_faults())")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("m", [1, 48, 512])
@pytest.mark.parametrize("capability", fake_cuda.GPUS)
def test_binary(capability: int, m: int) -> None:
    """No register is spilled, tensor cores multiply integers, and tiles are copied in the background."""
    k, n = 512, 4096  # as many columns as the largest tiles are for
    generated = fake_cuda.generate(Linear(k, n), *inputs(m, k, n), capability=capability)
    (binary,) = generated.binaries()
    assert binary.stack == 0
    assert binary.shared <= fake_cuda.GPUS[capability].shared[0]
    assert binary.count(gpu_binary.MATRIX)
    assert binary.count(["LDGSTS"])


@pytest.mark.parametrize(("architecture", "m"), [("sm_80", 1), ("sm_90", 512), ("sm_120", 48), ("gfx950", 512)])
def test_beside_stock_inductor(architecture: str, m: int) -> None:
    """Of the same tile, with SiLU and a residual: nothing spilled, fewer registers, no fewer blocks at once."""
    found = gpu_evidence.by_pointers(architecture, m)
    assert found.fused.stack == 0
    assert found.fused.registers < found.stock.registers
    assert found.fused.resident >= found.stock.resident


def test_evidence_is_of_these_tiles() -> None:
    """What is written about default configurations is about those of today."""
    written = (Path(__file__).parent.parent / "docs" / "gpu_evidence.md").read_text()
    for architecture, m in itertools.product(gpu_evidence.ARCHITECTURES, gpu_evidence.ROWS):
        tile = configurations(m, gpu_evidence.N, gpu_evidence.K, gpu_evidence.device(architecture))[0]
        row = f"| {architecture} | {m} | {tile.m}×{tile.n}×{tile.k}, {tile.stages} |"
        assert row in written, f"docs/gpu_evidence.md has no {row}: run scripts/gpu_evidence"


class Sliced(Linear):
    """Reads K columns of a wider activation, from one that is not at a multiple of 16 bytes."""

    def forward(self, x: Tensor, x_scale: Tensor, residual: Tensor) -> Tensor:
        """See `Linear`. x: [M, K + 16]."""
        return super().forward(x.narrow(1, 8, x.shape[1] - 16), x_scale, residual)


def _measured(model: Linear, k: int, capability: int, *, tma: bool = True, favourite: str = "") -> Generated:
    """Compile with `max_autotune`, as if what `favourite` is in the name of were the fastest. k: columns of x."""
    with (
        inductor_config.patch({"max_autotune": True, "triton.enable_persistent_tma_matmul": tma}),
        qfuse.config.patch(disabled_lowerings=["aten"]),  # lowerings are measured for real
    ):
        return fake_cuda.generate(model, *inputs(512, k, 512), capability=capability, favourite=favourite)


@pytest.mark.parametrize(("capability", "matrix"), [(90, "IGMMA"), (100, "IMMA")])
def test_binary_with_tma(capability: int, matrix: str) -> None:
    (binary,) = _measured(Linear(512, 512), 512, capability, favourite="tma").binaries()
    assert binary.stack == 0
    assert binary.shared <= fake_cuda.GPUS[capability].shared[0]
    assert binary.count(["UTMALDG"])
    assert binary.count([matrix])
    assert not binary.count(["LDGSTS"])


@pytest.mark.parametrize(
    ("model", "k", "capability", "tma", "legal"),
    [
        (Linear, 512, 90, True, True),
        (Linear, 512, 90, False, False),
        (Linear, 520, 90, True, False),
        (Sliced, 512, 90, True, False),
        (Linear, 512, 89, True, False),
    ],
    ids=["legal", "switched off", "rows are not aligned", "the first row is not aligned", "no TMA there"],
)
def test_tma_is_a_choice_where_it_is_legal(
    model: type[Linear], k: int, capability: int, tma: bool, legal: bool
) -> None:
    columns = k + 16 if model is Sliced else k
    (choices,) = _measured(model(k, 512), columns, capability, tma=tma).tuned
    assert any("tma" in choice for choice in choices) == legal
    assert any("tma" not in choice for choice in choices)


@pytest.mark.parametrize("m", [1, 512])
def test_structure(m: int) -> None:
    """One kernel: no integer matmul, no int32 tensor."""
    generated = fake_cuda.generate(Linear(512, 256), *inputs(m, 512, 256))
    assert len(generated.kernels) == 1
    assert "_int_mm" not in re.sub(r"fused__int_mm\w*", "", generated.calls)
    assert "torch.int32" not in generated.calls


class OneScale(Linear):
    """A linear whose activation has one scale."""

    def forward(self, x: Tensor, x_scale: Tensor | float) -> Tensor:
        """x: [M, K] int8. x_scale: of no dimension."""
        x_scale = x_scale.cpu() if isinstance(x_scale, Tensor) else x_scale
        return torch._int_mm(x, self.weight.t()).float() * x_scale * self.w_scale.reshape(-1)


def test_number_as_scale() -> None:
    """It is in the scales of columns, which are frozen, and the kernel has none of rows."""
    generated = fake_cuda.generate(OneScale(512, 256), inputs(48, 512, 256)[0], 0.25, binaries=False)
    assert len(generated.launches) == 1


def test_scale_on_the_cpu() -> None:
    """Inductor hands a kernel a number on the CPU as a value, which cannot be loaded from."""
    generated = fake_cuda.generate(OneScale(512, 256), inputs(48, 512, 256)[0], torch.tensor(0.25))
    assert [name.split("_")[1] for name in generated.launches] == ["poi", "tem"]


@pytest.mark.parametrize("architecture", gpu_evidence.AMD)
def test_amd(architecture: str) -> None:
    """As on NVIDIA's; M = 512 only."""
    device = gpu_evidence.device(architecture)
    binary = gpu_evidence.fused(architecture, 512, configurations(512, gpu_evidence.N, gpu_evidence.K, device)[0])
    assert binary.stack == 0
    assert binary.shared <= device.shared_bytes
    assert binary.count(["v_mfma_i32"])
