"""The fused kernel beside the one that stock Inductor makes of the same graph and tile: what both are compiled to.

Stock Inductor fuses the dequantization only where `max_autotune` prefers its own Triton template to `aten._int_mm`;
here it has no other choice. By default it runs two kernels, and a tensor of int32 goes through memory between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import fake_cuda
import gpu_binary
import torch
from fake_cuda import Generated
from gpu_binary import Binary
from producers import quantized
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.kernel.mm import mm_template
from torch._inductor.template_heuristics.registry import override_template_heuristics
from torch._inductor.template_heuristics.triton import CUDAInt8MMTemplateConfigHeuristic, GemmConfig
from torch.nn import functional as F

import qfuse
from qfuse.lowerings.triton import template
from qfuse.lowerings.triton.configurations import Configuration, Device, configurations, tma_configurations

ROWS = (1, 48, 512)
K = N = 4096  # scripts/gpu_evidence sets others

#: AMD's, as Inductor would see them.
AMD = {"gfx942": Device(64 << 10, 304), "gfx950": Device(160 << 10, 256)}
ARCHITECTURES = (*(f"sm_{capability}" for capability in fake_cuda.GPUS), *AMD)
WITH_TMA = ("sm_90", "sm_100", "sm_120")


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


def inputs(m: int, k: int, n: int) -> tuple[Tensor, ...]:
    """Return what `Linear(k, n)` takes."""
    return quantized(m, k), torch.rand(m, 1), torch.randn(m, n, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Evidence:
    """Two kernels of one graph and tile."""

    tile: Configuration
    fused: Binary
    stock: Binary


def device(architecture: str) -> Device:
    """Return what decides about tiles."""
    if architecture in AMD:
        return AMD[architecture]
    gpu = fake_cuda.GPUS[int(architecture[3:])]
    return Device(gpu.shared[0], gpu.multiprocessors)


def by_pointers(architecture: str, m: int) -> Evidence:
    """Compile what qfuse takes by default for m rows."""
    tile = configurations(m, N, K, device(architecture))[0]
    return Evidence(tile, fused(architecture, m, tile), stock(architecture, m, tile))


def by_tma(architecture: str, m: int) -> Evidence:
    """Compile the first choice of the persistent kernel with TMA."""
    tile = tma_configurations(m, N, K, device(architecture))[0]
    return Evidence(tile, fused(architecture, m, tile, with_tma=True), stock(architecture, m, tile))


def fused(architecture: str, m: int, tile: Configuration, *, with_tma: bool = False) -> Binary:
    """Compile qfuse's kernel of that tile."""
    options = {"NUM_SMS": device(architecture).multiprocessors} if with_tma else {"EVEN_K": K % tile.k == 0}
    candidate = (template._BY_TMA if with_tma else template._BY_POINTERS, tile, options)
    with mock.patch.object(template, "_candidates", return_value=[candidate]):
        return _compiled(architecture, m)


def stock(architecture: str, m: int, tile: Configuration) -> Binary:
    """Compile the kernel of stock Inductor's, by its own template, of that tile."""

    class OneTile(CUDAInt8MMTemplateConfigHeuristic):
        def __init__(self) -> None:
            super().__init__()
            self.mm_configs = [GemmConfig(tile.m, tile.n, tile.k, tile.stages, tile.warps, group_m=tile.group)]

    with (
        qfuse.config.patch(enabled=False),
        inductor_config.patch(max_autotune=True, max_autotune_gemm_backends="TRITON"),
        override_template_heuristics("cuda", [(mm_template.uid, "int_mm")], OneTile),
    ):
        return _compiled(architecture, m, tile)


def _compiled(architecture: str, m: int, tile: Configuration | None = None) -> Binary:
    capability = 80 if architecture in AMD else int(architecture[3:])
    generated = fake_cuda.generate(Linear(K, N), *inputs(m, K, N), capability=capability)
    if tile is not None:
        _insist_on(generated, tile)
    if architecture not in AMD:
        (binary,) = generated.binaries()
        return binary
    (kernel,) = generated.kernels.values()
    (result,) = kernel.compile_results
    return gpu_binary.read(fake_cuda.compile_for_amd(kernel, architecture), result.config.num_warps)


def _insist_on(generated: Generated, tile: Configuration) -> None:
    """Check that Inductor has not scaled the tile down, as it does with those that exceed the problem."""
    for name, size in (("BLOCK_M", tile.m), ("BLOCK_N", tile.n), ("BLOCK_K", tile.k)):
        assert f"{name} : tl.constexpr = {size}\n" in generated.source, (name, size)
