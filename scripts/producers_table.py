"""What `scripts/producers` prints: what became of each release's models, and the graphs that are not fused."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import rich.box
from producers_case import Case
from rich.console import Console
from rich.table import Table

console = Console()
if not console.is_terminal:
    console = Console(width=140)  # a file has no width, and 80 columns are too few for the table


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Show what is being done while it is done, and afterwards how long it took."""
    start = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"{what}: {time.perf_counter() - start:.1f} s", highlight=False)


def show(found: Mapping[str, Sequence[Case]]) -> None:
    """Print the table, and then the operators around the matmul for what is not fused."""
    table = Table(
        title=f"what qfuse fuses of torchao's int8 linears, with torch {version('torch')}",
        title_justify="left",
        caption="error: of the fused result, as a multiple of the unfused one's; against the model before quantization",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    for name in ("torchao", "configuration", "model", "dtype"):
        table.add_column(name)
    for name in ("quantized", "fused", "error"):
        table.add_column(name, justify="right")
    table.add_column("pattern, or why not", overflow="fold")
    for release, cases in found.items():
        for group in alike(cases):
            table.add_row(release, *row(group), style=style(group[0]))
        table.add_section()
    console.print(table)
    for release, cases in found.items():
        for config, of_config in itertools.groupby((c for c in cases if c.sequence), key=lambda c: c.config):
            case = next(of_config)
            if not case.is_fused:
                console.print(f"torchao {release}, {config}, {case.model}, {case.dtype}: … {case.sequence} …")


def failures(found: Mapping[str, Sequence[Case]]) -> list[str]:
    """Return a sentence for everything that qfuse is there to get right, and has not."""
    return [
        f"torchao {release}, {case.config}, {case.model}, {case.dtype}: {case.failure}"
        for release, cases in found.items()
        for case in cases
        if case.failure
    ]


def alike(cases: Sequence[Case]) -> list[list[Case]]:
    """Group the cases that had the same outcome; errors whatever the model."""
    groups: dict[object, list[Case]] = {}
    for case in cases:
        key = (case.config, case.error or case.model, case.quantized, case.fused, outcome(case), case.failure)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


def row(cases: Sequence[Case]) -> tuple[str, ...]:
    """Return the cells of cases that had the same outcome."""
    first = cases[0]
    names = (first.config, *(", ".join(dict.fromkeys(names)) for names in _models_and_dtypes(cases)))
    if first.error:
        return (*names, "–", "–", "–", outcome(first))
    worst = max(case.fused_error / case.plain_error for case in cases)
    return (*names, str(first.quantized), str(first.fused), f"{worst:.2f}×" if first.fused else "–", outcome(first))


def _models_and_dtypes(cases: Sequence[Case]) -> tuple[list[str], list[str]]:
    return [case.model for case in cases], [case.dtype for case in cases]


def outcome(case: Case) -> str:
    """Say in a few words what became of a case."""
    if case.error:
        return case.error
    parts = [*case.patterns, *case.reasons]
    if not case.fused and not case.integer_matmuls:
        parts.append("no integer matmul in the graph: emulated in floats")
    return "; ".join(parts)


def style(case: Case) -> str:
    """Return the colour of a row: a failure, a result, or all well."""
    if case.failure:
        return "red"
    return "" if case.is_fused else "yellow"
