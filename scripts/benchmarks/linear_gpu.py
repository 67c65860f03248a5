"""Measure int8 linears on a GPU: qfuse's lowerings, stock Inductor, torchao uncompiled, cuBLASLt's matmul, and bf16."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.engines import Compiled, compile_model, lowering_names, relative_error
from benchmarks.linear import DECODE, DECODE_BYTES, Settings
from benchmarks.linear_modules import Shape, Subject, flattened, moved, quantized_inside, quantized_outside
from benchmarks.results import BF16, STOCK, Case, Measured, chosen
from benchmarks.timing import alternate

INT_MM = "int32, _int_mm alone"
NOTES = [
    f"A call is timed from the CPU, launches included. {INT_MM}: the matmul of cuBLASLt without scales, bias, cast and "
    "GELU. Weights that fit are in the cache of the GPU, where nothing else runs."
]

#: What to call with the inputs, and what qfuse did, where it had to do with it.
Made = tuple[Callable[..., Any], Compiled | None]


def measure(settings: Settings, say: Callable[[str], None] = lambda line: None, device: str = "cuda") -> Iterable[Case]:
    """Measure each shape in each mode; those of one row as chains, whose weights exceed `DECODE_BYTES`.

    say: called with what is done next.
    """
    shapes = [*settings.shapes, *([DECODE] if settings.decode and not any(s.m == 1 for s in settings.shapes) else [])]
    for shape in shapes:
        decode = shape.m == 1
        layers = (settings.layers or DECODE_BYTES // (shape.k * shape.n) + 1) if decode else 1
        for mode in settings.modes:
            if layers > 1 and mode == "dynamic" and shape.k != shape.n:
                say(f"{shape}, {mode}: a chain needs K = N")
                continue
            title = f"{layers} × ({shape})" if decode else str(shape)
            say(f"{title}, {mode}")
            subject = moved(_subject([shape] * layers, mode, settings, decode), device)
            yield _measure(title, f"decode, {mode}" if decode else mode, subject, settings)


def _subject(shapes: list[Shape], mode: str, settings: Settings, decode: bool) -> Subject:
    torch.manual_seed(0)
    make = partial(quantized_outside, x_dtype=torch.int8) if mode == "quantized" else quantized_inside
    return make(shapes, settings.dtype, bias=not decode, gelu=settings.gelu and not decode)


def _measure(title: str, mode: str, subject: Subject, settings: Settings) -> Case:
    torch._dynamo.reset()
    gc.collect()
    measured: list[Measured] = []
    calls: list[Callable[[], object]] = []
    makers = dict(_engines(subject))
    for name in chosen({**makers, INT_MM: None}, settings.engines):
        if name not in makers:
            continue
        engine = Measured(name)
        measured.append(engine)
        inputs = subject.bf16_inputs if name.startswith("bf16") else subject.int8_inputs
        try:
            call, compiled = makers[name]()
            if compiled is not None and (compiled.report.misses or not compiled.report.matches):
                reasons = {miss.reason for miss in compiled.report.misses} or {"nothing is fused"}
                engine.absent = "; ".join(sorted(reasons))
                continue
            result = call(*inputs)
        except Exception as error:  # `_int_mm` refuses sizes; kernels of max-autotune fail
            engine.absent = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:100]
            continue
        if compiled is not None:
            engine.note = " ".join(compiled.lowerings)
        if name != INT_MM:
            engine.error = relative_error(flattened(result).cpu(), subject.reference)
        calls.append(partial(call, *inputs))
    on_gpu = subject.int8_inputs[0].device.type == "cuda"
    seconds, _ = alternate(calls, settings.rounds, wait=torch.cuda.synchronize if on_gpu else lambda: None)
    ran = [engine for engine in measured if not engine.absent]
    for engine, own in zip(ran, seconds, strict=True):
        engine.seconds = own
    return Case(title, mode, 1, measured, {}, subject.operations, subject.traffic, subject.weights)


def _engines(subject: Subject) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Return the name of each engine, and how to make it."""

    def compiled(model: Callable[..., Any], inputs: tuple[torch.Tensor, ...], **options: Any) -> Made:
        made = compile_model(model, inputs, **options)
        return made.call, made if options["fuse"] else None

    int8 = partial(compiled, subject.int8, subject.int8_inputs)
    bf16 = partial(compiled, subject.bf16, subject.bf16_inputs, fuse=False)
    for name in lowering_names("cuda"):
        yield f"int8, qfuse {name}", partial(int8, fuse=True, only_lowering=name)
    yield "int8, qfuse, max-autotune", partial(int8, fuse=True, max_autotune=True)
    yield STOCK, partial(int8, fuse=False)
    yield f"{STOCK}, max-autotune", partial(int8, fuse=False, max_autotune=True)
    yield "int8, not compiled", lambda: (subject.int8, None)
    if subject.int8_weights:
        yield INT_MM, lambda: (partial(_int_mm, subject.int8_weights), None)
    yield BF16, bf16
    yield f"{BF16}, max-autotune", partial(bf16, max_autotune=True)


def _int_mm(weights: list[torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Multiply the activations, each of which its scales follow, by the weights, [N, K]."""
    return [torch._int_mm(x, weight.t()) for x, weight in zip(inputs[::2], weights, strict=True)]
