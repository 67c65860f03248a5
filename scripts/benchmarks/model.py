"""Measure whole models: each engine in a process of its own, one sample of each in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.engine_process import EngineError, EngineProcess
from benchmarks.engines import relative_error
from benchmarks.model_engines import ENGINES
from benchmarks.models import MODELS, make
from benchmarks.probes import peaks
from benchmarks.results import Case, Measured

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Settings:
    """What to measure.

    models: names of `models.MODELS`. engines: names of `ENGINES`. isa, compiles: as on the command line.
    """

    models: Sequence[str]
    engines: Sequence[str] = tuple(ENGINES)
    isa: str = "native"
    rounds: int = 30
    threads: int = 1
    profile: bool = False
    compiles: int = 1


def measure(settings: Settings, say: Callable[[str], None] = lambda line: None) -> Iterable[Case]:
    """Measure each model.

    say: called with what is done next.
    """
    for model in settings.models:
        title = MODELS[model][0]
        example = make(model)
        reference = example.model(*example.inputs)[0]
        embeds = example.embeds
        del example
        case = Case(title, "models", settings.threads, [])
        with contextlib.ExitStack() as stack:
            running: list[tuple[Measured, EngineProcess]] = []
            for name in settings.engines:
                say(f"{title}: {name}")
                measured = Measured(name)
                case.engines.append(measured)
                if missing := ENGINES[name].missing():
                    measured.absent = f"not installed: {', '.join(missing)}"
                    continue
                try:
                    process = EngineProcess(model, name, settings.threads, settings.isa, profile=settings.profile)
                except EngineError as error:
                    measured.absent = str(error)
                    continue
                stack.callback(process.close)
                measured.note, measured.kernels = process.note, process.kernels
                measured.compile_seconds += [] if process.compile_seconds is None else [process.compile_seconds]
                measured.error = relative_error(process.first, reference)
                if embeds:
                    measured.cosine = cosine(process.first, reference)
                if ENGINES[name].timed:
                    running.append((measured, process))
                else:
                    measured.absent = "not timed"
                    process.close()
            say(f"{title}: {settings.rounds} rounds")
            probes = peaks(settings.threads, amx=settings.isa == "native")
            case.rates = {name: [] for name in probes}
            for done in range(WARM_UP_ROUNDS + settings.rounds):
                for name, probe in probes.items() if done >= WARM_UP_ROUNDS else ():
                    case.rates[name].append(probe())
                for position in range(len(running)):
                    measured, process = running[(position + done) % len(running)]  # each is the first in some round
                    seconds = process.sample()
                    if done >= WARM_UP_ROUNDS:
                        measured.seconds.append(seconds)
        _compile_again(model, case, settings, say)
        yield case


def _compile_again(model: str, case: Case, settings: Settings, say: Callable[[str], None]) -> None:
    """Compile as often as asked, all engines in turn; the first time is done."""
    for done in range(1, settings.compiles):
        for measured in case.engines:
            if measured.compile_seconds:
                say(f"{case.title}: compile {done + 1} of {settings.compiles}, {measured.engine}")
                process = EngineProcess(model, measured.engine, settings.threads, settings.isa)
                assert process.compile_seconds is not None
                measured.compile_seconds.append(process.compile_seconds)
                process.close()


def cosine(result: Tensor, reference: Tensor) -> float:
    """Return the mean cosine similarity of the texts' embeddings; all tokens count."""
    pairs = zip(result.mean(1), reference.mean(1), strict=True)
    return torch.stack([torch.cosine_similarity(own, other, dim=0) for own, other in pairs]).mean().item()
