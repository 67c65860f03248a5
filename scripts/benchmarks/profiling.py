"""Time by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table
from torch.profiler import ProfilerActivity, profile

WARM_UP_CALLS = 3
CALLS = 5
SHOWN = 15


def kernels(call: Callable[[], Any]) -> list[list[Any]]:
    """Return name, milliseconds a call and number of calls of what took longest by itself, and of all the rest.

    Generated kernels show up where they were compiled with `torch._inductor.config.cpp.enable_kernel_profile`.
    """
    for _ in range(WARM_UP_CALLS):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS):
            call()
    rows = [[e.key, e.self_cpu_time_total / CALLS / 1e3, e.count / CALLS] for e in profiler.key_averages()]
    return _longest(rows)


def summed(ran: Iterable[tuple[str, float]]) -> list[list[Any]]:
    """Return what `kernels` does, from the name and milliseconds of everything that runs in a call."""
    times: dict[str, list[float]] = {}
    for name, milliseconds in ran:
        times.setdefault(name, []).append(milliseconds)
    return _longest([[name, sum(each), len(each)] for name, each in times.items()])


def _longest(rows: list[list[Any]]) -> list[list[Any]]:
    rows = sorted(rows, key=lambda row: -row[1])
    rest = rows[SHOWN:]
    return rows[:SHOWN] + ([[f"{len(rest)} others", sum(r[1] for r in rest), sum(r[2] for r in rest)]] if rest else [])


def kernel_table(title: str, rows: list[list[Any]]) -> Table:
    """Return what `kernels` found as a table."""
    total = sum(row[1] for row in rows)
    table = Table(title=f"{title}: {total:.2f} ms", title_justify="left", box=None)
    table.add_column("kernel")
    for name in ("ms", "%", "calls"):
        table.add_column(name, justify="right")
    for name, milliseconds, calls in rows:
        table.add_row(name, f"{milliseconds:.3f}", f"{100 * milliseconds / (total or 1):.0f}", f"{calls:g}")
    return table
