"""What a benchmark has measured, and how it is kept in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

#: The engines that others are compared with.
STOCK, BF16 = "int8, stock", "bf16, stock"

#: The probes that read no memory.
INSTRUCTIONS = {"vnni", "amx", "avx2"}

#: A round is disturbed in which a probe of instructions reached less than this share of its best.
UNDISTURBED = 0.9
FEWEST_UNDISTURBED = 5  # rounds that say something


def chosen(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Return the names of engines that contain one of `parts`, or all where there are none.

    Raises:
        SystemExit: no name does, with a message that tells the names.
    """
    names = list(names)
    found = [name for name in names if not parts or any(part in name for part in parts)]
    if not found:
        raise SystemExit(f"qfuse: no engine has any of {list(parts)} in its name; there are: {'; '.join(names)}")
    return found


@dataclass
class Measured:
    """One engine in one case.

    seconds: of a call, round by round; empty where the engine did not run. absent: why it did not, or "". note: a word
    for the table, as which lowering was used. error: against the reference, by `engines.relative_error`. cosine: of
    sentence embeddings. compile_seconds: of each compile, with caches that hold nothing of it.
    kernels: of `profiling.kernels`, if asked.
    """

    engine: str
    seconds: list[float] = field(default_factory=list)
    absent: str = ""
    note: str = ""
    error: float | None = None
    cosine: float | None = None
    compile_seconds: list[float] = field(default_factory=list)
    kernels: list[list[Any]] = field(default_factory=list)


@dataclass
class Case:
    """What was measured in alternating rounds.

    rates: of the probes, round by round. operations, traffic, weights: as in `linear_modules.Subject`; 0 if unknown.
    """

    title: str
    mode: str
    threads: int
    engines: list[Measured]
    rates: dict[str, list[float]] = field(default_factory=dict)
    operations: int = 0
    traffic: int = 0
    weights: int = 0

    def ran(self, engine: str) -> Measured | None:
        """Return the engine of that name, if it ran."""
        return next((e for e in self.engines if e.engine == engine and e.seconds), None)

    def undisturbed(self, best: Mapping[str, float]) -> Case | None:
        """Return the rounds in which every probe was near its best, as a case; None if these are all or hardly any.

        On a virtual machine, neighbours take a part of what the probes measure, for seconds or minutes.
        best: of `best_rates`.
        """
        rounds = len(next(iter(self.rates.values()), []))
        kept = [i for i in range(rounds) if all(self.rates[name][i] >= UNDISTURBED * best[name] for name in best)]
        if not FEWEST_UNDISTURBED <= len(kept) < rounds:
            return None
        return replace(
            self,
            title=f"in {len(kept)} undisturbed of {rounds} rounds",
            engines=[replace(e, seconds=[e.seconds[i] for i in kept] if e.seconds else []) for e in self.engines],
            rates={name: [r[i] for i in kept] for name, r in self.rates.items()},
        )


@dataclass
class Run:
    """All that one process measured. machine, summary: of `machine.Machine`. notes: what a reader has to know."""

    machine: dict[str, Any]
    summary: str
    options: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def grouped(cases: Sequence[Case]) -> list[tuple[tuple[int, str], list[Case]]]:
    """Return the cases by number of threads and mode, in the order in which these were measured."""
    groups: dict[tuple[int, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.threads, case.mode), []).append(case)
    return list(groups.items())


def best_rates(cases: Iterable[Case]) -> dict[str, float]:
    """Return the best that each probe of instructions reached in all of these cases, which have as many threads."""
    rates: dict[str, float] = {}
    for case in cases:
        for name in INSTRUCTIONS & case.rates.keys():
            rates[name] = max(rates.get(name, 0), *case.rates[name])
    return rates


def save(runs: list[Run], path: Path) -> None:
    """Write runs as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def load(path: Path) -> list[Run]:
    """Read what `save` has written."""
    runs = []
    for run in json.loads(path.read_text()):
        cases = [Case(**{**case, "engines": [Measured(**e) for e in case["engines"]]}) for case in run.pop("cases")]
        runs.append(Run(**run, cases=cases))
    return runs
