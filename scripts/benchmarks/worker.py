"""The process that measures, with one number of threads and one instruction set."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

#: What oneDNN and MKL, ATen's attention, are told of an instruction set: both read the environment once.
ISA_LIMITS = {
    "native": {},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E2"},
}


def work(options: argparse.Namespace) -> None:
    """Measure, and write the results where the parent looks for them."""
    import torch

    prepare_process(options)
    from benchmarks import machine
    from benchmarks.results import Run, save

    (threads,) = options.threads
    described = machine.describe()
    kept = {key: value for key, value in vars(options).items() if key not in ("worker", "out")}
    run = Run(described.as_dict(), described.summary(), kept)
    with torch.no_grad():
        measure = {"linear": _linear, "model": _model}[options.command]
        for case in measure(options, threads, run):
            run.cases.append(case)
            save([run], options.worker)  # each time: a long run that is broken off is not lost


def prepare_process(options: argparse.Namespace) -> None:
    """Set threads, instruction set and profiling, and keep qfuse out of what is not compiled with it."""
    import torch

    torch.set_num_threads(*options.threads)
    if options.isa != "native":
        # oneDNN and MKL are limited by the environment; torchao asks the first of these, Inductor the second.
        from torch._inductor.cpu_vec_isa import VecAMX, pick_vec_isa

        torch._C._cpu._is_amx_tile_supported = torch.cpu._is_amx_tile_supported = lambda: False
        assert not isinstance(pick_vec_isa(), VecAMX), "torch asks another function now"
    if options.profile:
        torch._inductor.config.cpp.enable_kernel_profile = True
    import qfuse

    qfuse.disable()


def _model(options: argparse.Namespace, threads: int, run: Any) -> Iterable[Any]:
    from benchmarks import model
    from benchmarks.model_engines import ENGINES
    from benchmarks.models import GROUPS
    from benchmarks.results import chosen

    settings = model.Settings(
        models=[name for group in options.models for name in GROUPS[group]],
        engines=chosen(ENGINES, options.engines),
        isa=options.isa,
        rounds=options.rounds,
        threads=threads,
        profile=options.profile,
        compiles=options.compiles,
    )
    if options.isa != "native":
        run.notes.append("ONNX Runtime and OpenVINO know no such limit of the instruction set.")
    return model.measure(settings, Say(threads))


def _linear(options: argparse.Namespace, threads: int, run: Any) -> Iterable[Any]:
    import torch

    from benchmarks import linear
    from benchmarks.linear_modules import Shape

    shapes = tuple(Shape.parse(text) for text in options.shapes)
    settings = linear.Settings(
        shapes=shapes or linear.SHAPES,
        modes=tuple(mode for mode in linear.MODES if getattr(options, mode)) or linear.MODES,
        # of shapes that were asked for, those of one row
        decode=options.decode and (not shapes or any(s.m == 1 for s in shapes)),
        layers=options.layers,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype],
        gelu=options.gelu,
        amx=options.isa == "native",
        rounds=options.rounds,
        threads=threads,
        memory_bytes=options.memory * 2**20,
        profile=options.profile,
        engines=options.engines,
    )
    if options.device == "cuda":
        from benchmarks import linear_gpu

        run.notes += linear_gpu.NOTES
        return linear_gpu.measure(settings, Say(threads))
    run.notes += linear.notes(settings)
    return linear.measure(settings, Say(threads))


@dataclasses.dataclass
class Say:
    """Prints what is done, and when."""

    threads: int
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def __call__(self, line: str) -> None:
        """Print one line."""
        print(f"[{time.perf_counter() - self.start:6.1f} s, {self.threads} threads] {line}", flush=True)
