"""Measure int8 linears: each of qfuse's lowerings, stock Inductor in int8, and stock Inductor in bf16."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.engines import Compiled, compile_model, lowering_names, relative_error
from benchmarks.linear_modules import Shape, Subject, flattened, quantized_inside, quantized_outside
from benchmarks.probes import Peak, Reads, best_read, peaks
from benchmarks.profiling import kernels
from benchmarks.results import BF16, STOCK, Case, Measured, chosen
from benchmarks.timing import alternate

SHAPES = (
    Shape(1024, 384, 384),
    Shape(1024, 384, 1536),
    Shape(1024, 1536, 384),
    Shape(512, 4096, 4096),
    Shape(128, 768, 3072),
    Shape(16, 4096, 4096),
)
DECODE = Shape(1, 4096, 4096)
DECODE_BYTES = 256 * 2**20  # the weights of a chain are more than this
MEMORY_BYTES = 1 << 30  # what is read for the bandwidth beside linears that are not limited by it
MODES = ("quantized", "dynamic")


@dataclass(frozen=True)
class Settings:
    """What to measure. modes: of `MODES`. layers: of a decode chain; 0 for as many as exceed `DECODE_BYTES`.

    engines: as on the command line.
    """

    shapes: tuple[Shape, ...] = SHAPES
    modes: tuple[str, ...] = MODES
    decode: bool = True
    layers: int = 0
    dtype: torch.dtype = torch.bfloat16
    gelu: bool = True
    amx: bool = True
    rounds: int = 30
    threads: int = 1
    memory_bytes: int = MEMORY_BYTES
    profile: bool = False
    engines: Sequence[str] = ()


def measure(settings: Settings, say: Callable[[str], None] = lambda line: None) -> Iterable[Case]:
    """Measure each shape in each mode, and then the decode chains.

    say: called with what is done next.
    """
    probes = peaks(settings.threads, amx=settings.amx)
    read = Reads(settings.memory_bytes, settings.threads)
    once = best_read({name: [measure() for _ in range(5)] for name, measure in read.ways().items()})
    del read
    for shape in settings.shapes:
        for mode in settings.modes if shape.m > 1 else ():
            say(f"{shape}, {mode}")
            case = _measure(str(shape), mode, _subject([shape], mode, settings), settings, probes)
            case.rates |= {name: [statistics.median(rates)] * settings.rounds for name, rates in once.items()}
            yield case
    if settings.decode:
        yield from _decode(settings, probes, say)


def notes(settings: Settings) -> list[str]:
    """Return what has to be said about the probes on this machine."""
    lines = []
    if not Peak("vnni", settings.threads).available:
        has_avx2 = Peak("avx2", settings.threads).available
        peak = "the peak is that of AVX2's `vpmaddwd`" if has_avx2 else "there is no peak to compare with"
        lines.append(f"The CPU has neither AVX-512 VNNI nor AVX-VNNI: {peak}.")
    if settings.amx and not Peak("amx", settings.threads).available:
        lines.append("The CPU has no AMX.")
    width = Reads(1 << 20, settings.threads).width
    if width < 512:
        lines.append(f"The CPU has no AVX-512: memory is read by loads of {width} bits.")
    return lines


def _decode(settings: Settings, probes: dict[str, Callable[[], float]], say: Callable[[str], None]) -> Iterable[Case]:
    for shape in [s for s in settings.shapes if s.m == 1] or [DECODE]:
        layers = settings.layers or DECODE_BYTES // (shape.k * shape.n) + 1
        read = Reads(layers * shape.k * shape.n, settings.threads)  # as much as the weights: caches help both alike
        for mode in settings.modes:
            title = f"{layers} × ({shape})"
            say(f"{title}, {mode}")
            if mode == "dynamic" and shape.k != shape.n:
                say("a chain needs K = N")
                continue
            subject = _subject([shape] * layers, mode, settings, decode=True)
            yield _measure(title, f"decode, {mode}", subject, settings, {**probes, **read.ways()})


def _subject(shapes: list[Shape], mode: str, settings: Settings, *, decode: bool = False) -> Subject:
    torch.manual_seed(0)
    make = quantized_outside if mode == "quantized" else quantized_inside
    return make(shapes, settings.dtype, bias=not decode, gelu=settings.gelu and not decode)


def _measure(
    title: str, mode: str, subject: Subject, settings: Settings, probes: dict[str, Callable[[], float]]
) -> Case:
    torch._dynamo.reset()
    gc.collect()
    engines: list[Measured] = []
    calls: list[Callable[[], object]] = []

    def add(name: str, compiled: Compiled, inputs: tuple[torch.Tensor, ...], note: str = "") -> None:
        result = flattened(compiled.call(*inputs))
        engines.append(Measured(name, note=note, error=relative_error(result, subject.reference)))
        calls.append(partial(compiled.call, *inputs))
        if settings.profile:
            engines[-1].kernels = kernels(calls[-1])

    qfuse_engines = {f"int8, qfuse {name}": name for name in lowering_names()}
    wanted = chosen([*qfuse_engines, STOCK, BF16], settings.engines)
    wanted_of_qfuse = {engine: name for engine, name in qfuse_engines.items() if engine in wanted}
    if wanted_of_qfuse:
        default = compile_model(subject.int8, subject.int8_inputs, fuse=True)
    for engine, name in wanted_of_qfuse.items():
        compiled = default
        if default.lowerings != (name,):
            compiled = compile_model(subject.int8, subject.int8_inputs, fuse=True, only_lowering=name)
        if compiled.report.misses or not compiled.report.matches:
            reasons = {miss.reason for miss in compiled.report.misses} or {"nothing is fused"}
            engines.append(Measured(engine, absent="; ".join(sorted(reasons))))
            continue
        note = "default" if default.lowerings == (name,) else ""
        add(engine, compiled, subject.int8_inputs, note)
    if STOCK in wanted:
        add(STOCK, compile_model(subject.int8, subject.int8_inputs, fuse=False), subject.int8_inputs)
    if BF16 in wanted:
        add(BF16, compile_model(subject.bf16, subject.bf16_inputs, fuse=False), subject.bf16_inputs)
    seconds, rates = alternate(calls, settings.rounds, probes=probes)
    ran = [engine for engine in engines if not engine.absent]
    for measured, own in zip(ran, seconds, strict=True):
        measured.seconds = own
    return Case(
        title, mode, settings.threads, engines, best_read(rates), subject.operations, subject.traffic, subject.weights
    )
