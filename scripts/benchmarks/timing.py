"""Times of calls that alternate, and how they compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]

WARM_UP_CALLS = 3
MOST_CALLS = 1000  # in one sample


def alternate(
    calls: Sequence[Call],
    rounds: int,
    *,
    sample_seconds: float = 0.005,
    probes: Mapping[str, Callable[[], float]] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[list[float]], dict[str, list[float]]]:
    """Time the calls in rounds, so that whatever else the machine does falls on all of them.

    sample_seconds: a short call is repeated for that long, and the sample is the mean; before each sample is a call
    that is not timed, which brings caches back into the state that the repeated call leaves them in.
    probes: what the machine can do at best, measured once in each round.
    progress: called after each round.

    Returns:
        the seconds of each call, round by round, and the rates of each probe.
    """
    repeats = [_repeats(call, sample_seconds) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    rates: dict[str, list[float]] = {name: [] for name in probes or {}}
    for done in range(rounds):
        for name, probe in (probes or {}).items():
            rates[name].append(probe())
        for position in range(len(calls)):
            i = (position + done) % len(calls)  # each is the first in some round
            calls[i]()
            seconds[i].append(_sample(calls[i], repeats[i]))
        progress()
    return seconds, rates


def _repeats(call: Call, sample_seconds: float) -> int:
    for _ in range(WARM_UP_CALLS):
        call()
    return min(MOST_CALLS, max(1, math.ceil(sample_seconds / _sample(call, 1))))


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def ratio(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of value / other in the same round.

    Rather than the ratio of medians: what is measured in one round is measured at one time, and suffers alike from what
    else the machine does.
    """
    return quartiles([value / other for value, other in zip(values, others, strict=True)])
