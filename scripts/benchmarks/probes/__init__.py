"""Small C++ programs that measure what the machine can do at best, in the same run as what is compared with it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.codecache import CppCodeCache

from qfuse.memory import empty_in_huge_pages

SECONDS = 0.03  # of one measurement of a peak
_FIRST_STEPS = 20_000


class Peak:
    """The int8 operations a second of one instruction, `vnni` (u8×s8) or `amx` (s8×s8), from registers only."""

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
    probes = [Peak(name, threads) for name in ("vnni", *(["amx"] if amx else []))]
    return {peak.name: peak.measure for peak in probes if peak.available}


class Reads:
    """The bandwidth of reading so many bytes of memory, which nothing else touches, in huge pages as weights are."""

    def __init__(self, size: int, threads: int) -> None:
        self.threads = threads
        self._library = _library("read")
        self._memory = empty_in_huge_pages([size], torch.uint8).fill_(1)  # pages of zeros might be one page
        self.size = size // threads // 1024 * 1024 * threads
        self.width = int(self._library.qfuse_probe_width())
        self.measure()  # starts the threads

    def measure(self) -> float:
        """Return bytes a second, of all threads together.

        It is the best of reading one place a thread and four in turn, and of fetching into the first-level cache and
        the second: CPUs differ.
        """
        return self.size / min(self._seconds(places, level) for places in (1, 4) for level in (1, 2))

    def _seconds(self, places: int, level: int) -> float:
        pointer = ctypes.c_void_p(self._memory.data_ptr())
        return float(self._library.qfuse_probe_read(pointer, ctypes.c_int64(self.size), self.threads, places, level))


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
