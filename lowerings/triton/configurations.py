"""Which tiles the Triton kernel is tried with: tables by the size of the problem, and a static model that prunes them.

Nothing here is measured. What a table is sorted by, and what is left out of it, follows from the device's memory and
multiprocessors, and from binaries: no configuration that spills registers on an architecture it is used on is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """What of a GPU decides about tiles. The defaults are the least that Triton supports, for where nothing is known.

    shared_bytes: what a block of threads can have at most. multiprocessors: how many there are.
    """

    shared_bytes: int = 48 << 10
    multiprocessors: int = 1


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
        """The most shared memory that it takes. Triton says nothing where it exceeds the device's.

        Stages of int8, or the float32 result that changes its layout to be stored.
        """
        return max(self.stages * (self.m + self.n) * self.k, 4 * self.m * self.n)

    def blocks(self, m: int, n: int) -> int:
        """Return how many blocks of threads compute a result of that size."""
        return -(-m // self.m) * -(-n // self.n)


#: By the most rows that they are meant for, the best guess first: the larger the tile, the less is read twice.
_BY_ROWS: dict[int | None, tuple[Configuration, ...]] = {
    16: (
        Configuration(16, 32, 256, 4, 4),
        Configuration(16, 16, 256, 4, 2),
        Configuration(16, 64, 128, 4, 4),
        Configuration(16, 128, 128, 4, 4),
        Configuration(16, 64, 256, 3, 4),
    ),
    64: (
        Configuration(64, 64, 128, 4, 4),
        Configuration(64, 32, 128, 4, 4),
        Configuration(32, 64, 128, 4, 4),
        Configuration(32, 32, 128, 4, 4),
        Configuration(64, 128, 64, 4, 4),
    ),
    None: (
        Configuration(128, 128, 64, 4, 8),
        Configuration(64, 128, 64, 4, 4),
        Configuration(128, 64, 64, 4, 4),
        Configuration(64, 64, 128, 4, 4),
        Configuration(64, 32, 128, 4, 4),
        Configuration(128, 128, 128, 3, 8),
    ),
}

#: Of the persistent kernel with TMA. Fewer than 64 rows gain nothing from it: they are not multiplied by wgmma.
_WITH_TMA = (
    Configuration(128, 128, 128, 3, 8),
    Configuration(128, 128, 64, 4, 8),
    Configuration(64, 128, 128, 3, 4),
    Configuration(64, 64, 128, 4, 4),
)

#: Bytes of shared memory for the barriers of TMA: 8 for each stage.
_BARRIERS = 64

#: The share of the multiprocessors that a grid must occupy to be preferred to one of more, smaller tiles.
_FILLED = 0.75


def configurations(m: int, n: int, k: int, device: Device) -> Sequence[Configuration]:
    """Return what to try for x [m, k] and a weight [n, k], the best guess first."""
    return _ranked(next(cs for most, cs in _BY_ROWS.items() if most is None or m <= most), m, n, k, device)


def tma_configurations(m: int, n: int, k: int, device: Device) -> Sequence[Configuration]:
    """Return what to try of the persistent kernel with TMA, the best guess first."""
    beside_barriers = replace(device, shared_bytes=device.shared_bytes - _BARRIERS)
    return _ranked(_WITH_TMA, m, n, k, beside_barriers) if m > 32 else ()


def _ranked(table: Sequence[Configuration], m: int, n: int, k: int, device: Device) -> Sequence[Configuration]:
    """Return those of `table` that fit the device and the problem; those that occupy the device first.

    Few blocks of threads leave multiprocessors idle, so that where no grid occupies enough of them, that of most blocks
    is the first.
    """
    fitting = [c for c in table if c.shared_bytes <= device.shared_bytes]
    # Not more than half of a tile may lie outside; 16 rows, 16 columns and 32 along K are the least that there are.
    frugal = [c for c in fitting if c.m < 2 * max(m, 16) and c.n < 2 * max(n, 16) and c.k < 2 * max(k, 32)]
    wanted = _FILLED * device.multiprocessors
    return sorted(frugal or fitting, key=lambda c: -min(c.blocks(m, n), wanted))
