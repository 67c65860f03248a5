"""The static model that chooses and prunes the tiles of the Triton kernel. Neither Triton nor a GPU is needed."""

from __future__ import annotations

import itertools

import pytest

from qfuse.lowerings.triton.configurations import Configuration, Device, configurations, tma_configurations

A100 = Device(166912, 108)
L40S = Device(101376, 142)
H100 = Device(232448, 132)
MI300X = Device(64 << 10, 304)
UNKNOWN = Device()

SIZES = list(itertools.product((1, 16, 17, 64, 65, 4096), (7, 64, 4096), (1, 32, 100, 4096)))


@pytest.mark.parametrize("device", [A100, L40S, H100, MI300X, UNKNOWN])
def test_there_is_one_and_all_fit(device: Device) -> None:
    for m, n, k in SIZES:
        found = configurations(m, n, k, device)
        assert found
        assert all(c.shared_bytes <= device.shared_bytes for c in (*found, *tma_configurations(m, n, k, device)))


def test_the_memory_of_barriers_counts() -> None:
    """A tile that takes all of the shared memory leaves none for what TMA signals with."""
    (largest, *_) = tma_configurations(4096, 4096, 4096, H100)
    exactly = Device(largest.shared_bytes, H100.multiprocessors)
    assert largest not in tma_configurations(4096, 4096, 4096, exactly)
    assert largest in configurations(4096, 4096, 4096, exactly)


def test_not_more_than_half_of_a_tile_lies_outside() -> None:
    assert all(c.m < 2 * 17 for c in configurations(17, 4096, 4096, H100))
    assert all(c.n <= 64 for c in configurations(4096, 64, 4096, H100))
    assert all(c.k <= 64 for c in configurations(4096, 4096, 64, H100))


def test_what_nothing_is_small_enough_for_is_still_computed() -> None:
    assert configurations(1, 1, 1, H100)
    assert configurations(4096, 1, 1, H100)


def test_large_tiles_where_there_is_work_for_all() -> None:
    first = configurations(8192, 8192, 4096, H100)[0]
    assert (first.m, first.n) == (128, 128)


@pytest.mark.parametrize("m", [1, 48, 512])
def test_small_tiles_where_multiprocessors_would_be_idle(m: int) -> None:
    """The first has most of the multiprocessors busy, or else no other has more blocks."""
    for n in (256, 1024, 4096, 14336):
        for device in (A100, L40S, H100, MI300X):
            first, *others = configurations(m, n, 4096, device)
            blocks = first.blocks(m, n)
            assert blocks >= 0.75 * device.multiprocessors or all(c.blocks(m, n) <= blocks for c in others)


def test_idle_multiprocessors_are_few_enough() -> None:
    """128 of 132 busy: larger tiles are better than twice as many blocks."""
    assert configurations(512, 4096, 4096, H100)[0].blocks(512, 4096) == 128


def test_few_rows_gain_nothing_from_tma() -> None:
    assert not tma_configurations(32, 4096, 4096, H100)
    assert tma_configurations(33, 4096, 4096, H100)


def test_shared_bytes() -> None:
    """Of the stages, or of a float32 result that is larger."""
    assert Configuration(64, 64, 128, 4, 4).shared_bytes == 4 * (64 + 64) * 128
    assert Configuration(128, 128, 32, 2, 8).shared_bytes == 128 * 128 * 4
