"""Which tiles the Triton kernel is tried with, by the size of the problem: a table, and what prunes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """A tile of the result, [m, n], computed k at a time.

    stages: tiles of x and w that are on their way at once. warps: of one block of threads. group: rows of tiles that
    pass by a column of tiles together.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int
    group: int = 8

    @property
    def shared_bytes(self) -> int:
        """The shared memory that the tiles of int8 take. Triton says nothing where it exceeds the device's."""
        return self.stages * (self.m + self.n) * self.k


#: By the most rows that they are meant for; of each list, the first is taken where nothing is measured. Every first one
#: compiles without spills on sm_80 to sm_120, with an activation and a residual fused, and the last list's on gfx942 as
#: well: see the tests.
_BY_ROWS: dict[int | None, tuple[Configuration, ...]] = {
    16: (
        Configuration(16, 64, 128, 4, 4),
        Configuration(16, 32, 256, 4, 4),
        Configuration(16, 128, 128, 4, 4),
        Configuration(16, 64, 256, 3, 4),
    ),
    64: (
        Configuration(64, 64, 128, 4, 4),
        Configuration(32, 64, 128, 4, 4),
        Configuration(64, 128, 64, 4, 4),
        Configuration(64, 32, 128, 4, 4),
    ),
    None: (
        Configuration(128, 128, 64, 4, 8),
        Configuration(64, 128, 64, 4, 4),
        Configuration(128, 64, 64, 4, 4),
        Configuration(128, 128, 128, 3, 8),
        Configuration(128, 256, 128, 3, 8),
        Configuration(64, 64, 128, 4, 4),
    ),
}

#: The least shared memory that a block of threads can have on the devices that Triton supports, in bytes.
_LEAST_SHARED_BYTES = 48 << 10


def configurations(rows: int, shared_bytes: int | None) -> Sequence[Configuration]:
    """Return what to try for so many rows, the best guess first.

    shared_bytes: what a block of threads can have on the device; None where that is not known.
    """
    fitting = next(cs for most, cs in _BY_ROWS.items() if most is None or rows <= most)
    limit = _LEAST_SHARED_BYTES if shared_bytes is None else shared_bytes
    return [c for c in fitting if c.shared_bytes <= limit]
