"""The ways to run a model that are compared. Each runs in a process of its own: what it imports and sets is its own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import foreign_engines
from benchmarks.models import Example, Inputs, in_dtype
from benchmarks.results import BF16, STOCK


@dataclass
class Prepared:
    """A model that is ready to run.

    call: without arguments; returns its outputs. first: the first of them, in float32. seconds: how long compiling
    took, or None if it means nothing. note: as in `Measured`. kernels: returns what `profiling.kernels` does, of an
    engine that torch's profiler cannot look into.
    """

    call: Callable[[], Any]
    first: Tensor
    seconds: float | None = None
    note: str = ""
    kernels: Callable[[], list[list[Any]]] | None = None


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    prepare: of an example and the number of threads. packages: what has to be installed. timed: or compared only.
    """

    prepare: Callable[[Example, int], Prepared]
    packages: tuple[str, ...] = ()
    timed: bool = True

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        installed = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
        return [package for package in self.packages if package not in installed]


def converted(example: Example, dtype: torch.dtype, *, quantized: bool) -> tuple[nn.Module, Inputs]:
    """Return the model and its inputs in `dtype`, the linears quantized by torchao or not. The example is used up."""
    model = example.model.to(dtype)
    if quantized:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model, in_dtype(example.inputs, dtype)


def _inductor(
    dtype: torch.dtype,
    *,
    quantized: bool = False,
    fuse: bool = False,
    backend: str = "inductor",
    before: Callable[[], object] = lambda: None,
) -> Callable[[Example, int], Prepared]:
    """Return how to prepare an engine that is compiled. before: called first."""

    def prepare(example: Example, threads: int) -> Prepared:
        from torch._inductor.utils import fresh_cache

        from benchmarks.engines import compile_model

        before()
        model, inputs = converted(example, dtype, quantized=quantized)
        with fresh_cache():
            # Something small first: the first compile imports a lot, and compiles headers, whatever it is about.
            compile_model(nn.Linear(8, 8).to(dtype), (torch.zeros(2, 8, dtype=dtype),), fuse=fuse)
            compiled = compile_model(model, inputs, fuse=fuse, backend=backend)
        note = ""
        if fuse:
            found = len(compiled.report.matches)
            note = f"{found} of {found + len(compiled.report.misses)} fused: {', '.join(compiled.lowerings)}"
        return Prepared(lambda: compiled.call(*inputs), compiled.call(*inputs)[0].float(), compiled.seconds, note)

    return prepare


def _eager(example: Example, threads: int) -> Prepared:
    model, inputs = converted(example, torch.bfloat16, quantized=True)
    return Prepared(lambda: model(*inputs), model(*inputs)[0].float())


def _x86_patterns() -> None:
    """Register torchao's patterns for x86 CPUs with Inductor; there is no way back."""
    from torchao.quantization.pt2e.inductor_passes import x86

    x86._register_quantization_weight_pack_pass()


def _zentorch() -> None:
    import zentorch  # noqa: F401  (registers its backend)


_BF16 = torch.bfloat16
ENGINES: dict[str, Engine] = {
    "int8, eager": Engine(_eager, timed=False),
    "fp32, stock": Engine(_inductor(torch.float32)),
    BF16: Engine(_inductor(_BF16)),
    STOCK: Engine(_inductor(_BF16, quantized=True)),
    "int8, stock, torchao's x86 patterns": Engine(_inductor(_BF16, quantized=True, before=_x86_patterns)),
    "int8, qfuse": Engine(_inductor(_BF16, quantized=True, fuse=True)),
    "bf16, zentorch": Engine(_inductor(_BF16, backend="zentorch", before=_zentorch), ("zentorch",)),
    "int8, zentorch": Engine(_inductor(_BF16, quantized=True, backend="zentorch", before=_zentorch), ("zentorch",)),
    "fp32, ONNX Runtime": Engine(foreign_engines.onnx_fp32, ("onnxruntime", "onnx")),
    "int8 dynamic, ONNX Runtime": Engine(foreign_engines.onnx_int8, ("onnxruntime", "onnx")),
    "fp32, OpenVINO": Engine(foreign_engines.openvino_fp32, ("openvino",)),
    "bf16, OpenVINO": Engine(foreign_engines.openvino_bf16, ("openvino",)),
    "int8 static, OpenVINO": Engine(foreign_engines.openvino_int8, ("openvino", "nncf")),
}
