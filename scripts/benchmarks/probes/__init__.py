"""Small C++ programs that measure what the machine can do at best, in the same run as what is compared with it."""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch._inductor.codecache import CppCodeCache

from qfuse.memory import empty_in_huge_pages

SECONDS = 0.03  # of one measurement of a peak
_FIRST_STEPS = 20_000
_READ = "read "  # how the name of each way of reading begins


class Peak:
    """The operations a second of one instruction, from registers only.

    name: `vnni` (u8×s8), `amx` (s8×s8), or `avx2` (s16×s16), which only counts for a CPU that has neither.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self._library = _library(name)
        self.operations = int(self._library.qfuse_probe_operations())
        self._steps = _FIRST_STEPS
        if self.operations:
            self._run()  # starts the threads
            self._steps = max(1, int(_FIRST_STEPS * SECONDS / self._run()))

    @property
    def available(self) -> bool:
        """Tell whether this CPU has the instruction, and the kernel allows it."""
        return self.operations > 0

    def measure(self) -> float:
        """Return operations a second, of all threads together."""
        return self.operations * self._steps * self.threads / self._run()

    def _run(self) -> float:
        return float(self._library.qfuse_probe_run(self.threads, ctypes.c_int64(self._steps)))


def peaks(threads: int, *, amx: bool) -> dict[str, Callable[[], float]]:
    """Return what measures the peak of each instruction of this CPU, by name. amx: whether its AMX counts."""
    probes = [Peak(name, threads) for name in ("vnni", "avx2", *(["amx"] if amx else []))]
    return {peak.name: peak.measure for peak in probes if peak.available}


class Reads:
    """The bandwidth of reading so many bytes of memory, which nothing else touches, in huge pages as weights are."""

    def __init__(self, size: int, threads: int) -> None:
        self.threads = threads
        self._library = _library("read")
        self._memory = empty_in_huge_pages([size], torch.uint8).fill_(1)  # pages of zeros might be one page
        self.size = size // threads // 1024 * 1024 * threads
        self.width = int(self._library.qfuse_probe_width())
        self.measure(1, 1)  # starts the threads

    def ways(self) -> dict[str, Callable[[], float]]:
        """Return what measures each way of reading, by name: CPUs differ in which is the best. See `best_read`."""
        return {
            f"{_READ}{places} {level}": functools.partial(self.measure, places, level)
            for places in (1, 4)
            for level in (1, 2)
        }

    def measure(self, places: int, level: int) -> float:
        """Return bytes a second, of all threads together.

        places: that each thread reads in turn, 1 or 4. level: of the cache that it fetches into, 1 or 2.
        """
        pointer, size = ctypes.c_void_p(self._memory.data_ptr()), ctypes.c_int64(self.size)
        return self.size / float(self._library.qfuse_probe_read(pointer, size, self.threads, places, level))


def best_read(rates: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return `rates` with one way of reading, as `read`: the one whose median is the best.

    Not the best of each round, as what is compared with it is not: where times scatter, the best of four samples is
    faster than any way of reading.
    """
    ways = [values for name, values in rates.items() if name.startswith(_READ)]
    others = {name: list(values) for name, values in rates.items() if not name.startswith(_READ)}
    return others | ({"read": list(max(ways, key=statistics.median))} if ways else {})


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    """Compile a probe with Inductor's compiler and flags, or take it from Inductor's cache, and load it."""
    library = CppCodeCache.load(Path(__file__).with_name(f"{name}.cpp").read_text())
    assert isinstance(library, ctypes.CDLL)
    for function in ("qfuse_probe_run", "qfuse_probe_read"):
        if hasattr(library, function):
            getattr(library, function).restype = ctypes.c_double
    if hasattr(library, "qfuse_probe_operations"):
        library.qfuse_probe_operations.restype = ctypes.c_int64
    return library
