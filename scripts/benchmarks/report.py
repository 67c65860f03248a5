"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import rich.box
from rich.table import Table

from benchmarks.results import BF16, STOCK, Case, Measured, best_rates, grouped
from benchmarks.timing import quartiles, ratio

_DISTURBED = (
    " A round is undisturbed if both probes, small C++ programs that multiply in registers, reached 90 % of their best "
    "with as many threads: neighbours on the same machine take the rest."
)
LEGEND = {
    "linear": (
        "GOP/s counts a multiplication and an addition as two. % is of what small C++ programs reached: in the same "
        "rounds, but reading only once before them where it is not a chain for one token. GB/s: weights, activation "
        "and result, each once; for decode, weights. ×: times as fast, median of the rounds' ratios. error: relative "
        "Frobenius norm, against the same linear in float32. default: what qfuse "
        "chooses." + _DISTURBED
    ),
    "model": (
        "×: times as fast, median of the rounds' ratios. error: relative Frobenius norm of the output, against the "
        "model in float32, not compiled. compile: median, with caches that "
        "hold nothing of the model, the first call included; of ONNX Runtime and OpenVINO without the export, but with "
        "quantization." + _DISTURBED
    ),
}
PEAKS = {"vnni": "% VNNI", "amx": "% AMX", "avx2": "% AVX2"}


def linear_tables(cases: Sequence[Case]) -> Iterable[Table]:
    """Return one table for each number of threads and mode, with a section for each shape."""
    best = _best(cases)
    for (threads, mode), group in grouped(cases):
        table = _table(
            f"linear, {mode}, {threads} thread{'s' * (threads > 1)}",
            "M×K×N",
            *("engine", "median µs", "quartiles", "GOP/s", *PEAKS.values(), "GB/s", "% read"),
            *("× stock int8", "× stock bf16", "error"),
        )
        for case in _with_undisturbed(group, best[threads]):
            for i, engine in enumerate(case.engines):
                table.add_row(case.title if i == 0 else "", *_linear_row(case, engine))
            rates = ", ".join(f"{name} {_rate(name, values)}" for name, values in case.rates.items())
            table.add_row("", f"[dim]probes, median and best: {rates}[/dim]" if rates else "", end_section=True)
        yield table


def _linear_row(case: Case, engine: Measured) -> list[str]:
    name = f"{engine.engine} ({engine.note})" if engine.note else engine.engine
    if not engine.seconds:
        return [name, f"[dim]{engine.absent}[/dim]"]
    low, middle, high = quartiles(engine.seconds)
    moved = case.weights if case.mode.startswith("decode") else case.traffic
    if engine.engine == BF16:
        moved = 2 * case.weights if case.mode.startswith("decode") else 0  # others' traffic is not its own
    return [
        name,
        f"{middle * 1e6:.1f}",
        f"{low * 1e6:.1f} – {high * 1e6:.1f}",
        f"{case.operations / middle / 1e9:.0f}",
        *(_percent(case, engine, peak, case.operations) for peak in PEAKS),
        f"{moved / middle / 1e9:.1f}" if moved else "",
        _percent(case, engine, "read", moved) if moved else "",
        *(_speed(case, engine, other) for other in (STOCK, BF16)),
        _number(engine.error, ".2e"),
    ]


def model_tables(cases: Sequence[Case]) -> Iterable[Table]:
    """Return one table for each number of threads, with a section for each model."""
    best = _best(cases)
    for (threads, _), group in grouped(cases):
        table = _table(
            f"models, {threads} thread{'s' * (threads > 1)}",
            "model",
            *(
                "engine",
                "median ms",
                "quartiles",
                "× stock int8",
                "× bf16",
                "error",
                "cosine",
                "compile s",
                "/ stock int8",
            ),
        )
        for case in _with_undisturbed(group, best[threads]):
            for i, engine in enumerate(case.engines):
                table.add_row(case.title if i == 0 else "", *_model_row(case, engine))
            table.add_section()
        yield table


def _best(cases: Sequence[Case]) -> dict[int, dict[str, float]]:
    return {threads: best_rates(c for c in cases if c.threads == threads) for threads in {c.threads for c in cases}}


def _with_undisturbed(cases: Iterable[Case], best: Mapping[str, float]) -> Iterable[Case]:
    for case in cases:
        yield case
        if (undisturbed := case.undisturbed(best)) is not None:
            yield undisturbed


def _model_row(case: Case, engine: Measured) -> list[str]:
    name = f"{engine.engine} ({engine.note})" if engine.note else engine.engine
    times = [f"[dim]{engine.absent}[/dim]", "", "", ""]
    if engine.seconds:
        low, middle, high = quartiles(engine.seconds)
        times = [
            f"{middle * 1e3:.2f}",
            f"{low * 1e3:.2f} – {high * 1e3:.2f}",
            *(_speed(case, engine, other) for other in (STOCK, BF16)),
        ]
    return [
        name,
        *times,
        _number(engine.error, ".2e"),
        _number(engine.cosine, ".4f"),
        _number(median(engine.compile_seconds) if engine.compile_seconds else None, ".1f"),
        _compile_ratio(case, engine),
    ]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=name == "quartiles")
    return table


def _percent(case: Case, engine: Measured, probe: str, amount: int) -> str:
    """Return amount a second as a percentage of the probe's rate, the median of the rounds' ratios."""
    if not case.rates.get(probe):
        return ""
    shares = [amount / s / rate for s, rate in zip(engine.seconds, case.rates[probe], strict=True)]
    return f"{100 * median(shares):.0f}"


def _speed(case: Case, engine: Measured, other: str) -> str:
    found = case.ran(other)
    return f"{ratio(found.seconds, engine.seconds)[1]:.2f}" if found else ""


def _compile_ratio(case: Case, engine: Measured) -> str:
    """Return the compile time as a multiple of stock int8's, the median of the turns' ratios."""
    stock = case.ran(STOCK)
    if not engine.compile_seconds or not stock or len(stock.compile_seconds) != len(engine.compile_seconds):
        return ""
    return f"{ratio(engine.compile_seconds, stock.compile_seconds)[1]:.2f}"


def _rate(name: str, values: Sequence[float]) -> str:
    digits, unit = (1, "GB/s") if name == "read" else (0, "GOP/s")
    return " and ".join(f"{rate / 1e9:.{digits}f}" for rate in (median(values), max(values))) + f" {unit}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
