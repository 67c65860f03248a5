"""Times of calls that alternate, and how they compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]

SAMPLE_SECONDS = 0.005
WARM_UP_SECONDS = 0.03
WARM_UP_CALLS = 3
MOST_CALLS = 1000  # in one sample


def alternate(
    calls: Sequence[Call],
    rounds: int,
    *,
    probes: Mapping[str, Callable[[], float]] | None = None,
    wait: Callable[[], object] = lambda: None,
) -> tuple[list[list[float]], dict[str, list[float]]]:
    """Time the calls in rounds, so that whatever else the machine does falls on all of them.

    probes: what the machine can do at best, measured once in each round.
    wait: returns when the device is done with what it was given.

    Returns:
        the seconds of each call, round by round, and the rates of each probe.
    """
    samplers = [Sampler(call, wait=wait) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    rates: dict[str, list[float]] = {name: [] for name in probes or {}}
    for done in range(rounds):
        for name, probe in (probes or {}).items():
            rates[name].append(probe())
        for position in range(len(calls)):
            i = (position + done) % len(calls)  # each is the first in some round
            seconds[i].append(samplers[i].sample())
    return seconds, rates


class Sampler:
    """Takes samples of the time of a call.

    A short call is repeated for `sample_seconds`, and the sample is the mean. Before each sample are calls that are not
    timed, which bring caches back into the state that repeated calls leave them in: a decoder that reads 90 MB a call
    takes 4.5 ms at first, after another has run, and 2.5 ms after ten calls.
    """

    def __init__(
        self, call: Call, sample_seconds: float = SAMPLE_SECONDS, wait: Callable[[], object] = lambda: None
    ) -> None:
        self._call, self._wait = call, wait
        for _ in range(WARM_UP_CALLS):
            call()
        self._repeats = 1
        self._repeats = min(MOST_CALLS, max(1, math.ceil(sample_seconds / self.sample())))

    def sample(self) -> float:
        """Return the seconds of a call."""
        start = time.perf_counter()
        while True:
            self._call()
            self._wait()
            if time.perf_counter() - start >= WARM_UP_SECONDS:
                break
        start = time.perf_counter()
        for _ in range(self._repeats):
            self._call()
        self._wait()
        return (time.perf_counter() - start) / self._repeats


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
