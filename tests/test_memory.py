"""Where weights and intermediate results lie."""

from __future__ import annotations

import mmap
import platform
import re
from pathlib import Path

import pytest
import torch
from support import run_python

from qfuse.memory import _ARENA, empty_in_huge_pages

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_tensors_do_not_overlap() -> None:
    """Also where one arena is full, and where others have gone."""
    sizes = [(7, 64), (1,), (_ARENA // 3,), (_ARENA // 2,), (_ARENA // 2, 1), (0, 4), (2, _ARENA), (3, 5)]
    tensors = [empty_in_huge_pages(size, torch.int8).fill_(i) for i, size in enumerate(sizes)]
    del tensors[2]
    kept = [i for i in range(len(sizes)) if i != 2]
    for i, tensor in zip(kept, tensors, strict=True):
        assert tensor.shape == sizes[i]
        assert tensor.is_contiguous()
        assert tensor.eq(i).all()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # what is saved of it


def test_dtype() -> None:
    assert empty_in_huge_pages((3, 2), torch.bfloat16).fill_(2).sum() == 12


@pytest.mark.skipif(not _THP.exists() or "[never]" in _THP.read_text(), reason="huge pages are switched off")
def test_huge_pages() -> None:
    def kilobytes() -> int:
        return int(re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[0])

    before = kilobytes()
    tensor = empty_in_huge_pages((64 << 20,), torch.int8).fill_(1)
    assert kilobytes() - before >= tensor.nbytes // 1024 // 2  # Linux may have too few


FAULTS = """
    import ctypes, resource, torch, qfuse

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def faults():
        for _ in range(20):
            blocks = [libc.malloc(18 << 20) for _ in range(3)]
            for block in blocks:
                ctypes.memset(block, 1, 18 << 20)
            for block in blocks:
                libc.free(ctypes.c_void_p(block))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    faults()
    print(-faults() + faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept() -> None:
    """54 MiB in each call, which is more than imports leave free and than glibc keeps by itself.

    Not in tensors: each has a small block too, and where that lies above the large ones glibc cannot give these back.
    """
    given_back, kept = (int(run_python(FAULTS, QFUSE=on).stdout) for on in ("0", "1"))
    assert given_back > 20 * 20  # huge pages, at least
    assert kept < min(1024, given_back / 20)


def test_linux_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `madvise` fails."""

    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert empty_in_huge_pages((_ARENA, 2), torch.int8).fill_(3).eq(3).all()
