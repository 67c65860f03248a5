"""How memory is asked for: huge pages for weights, and results in memory that is there already."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21
_ALIGNMENT = 64
_ARENA = 32 << 20
_arena = memoryview(b"")  # what is left of the newest
_lock = threading.Lock()

#: The largest block after which glibc adapts itself (DEFAULT_MMAP_THRESHOLD_MAX in malloc.c, on 64 bits), less a margin
#: for what is added to a request.
_LARGEST_ADAPTED = (32 << 20) - (64 << 10)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a new CPU tensor whose memory Linux is asked to put into huge pages.

    A decode step reads every weight once, and with pages of 4 KiB spends up to a twentieth of that on finding them.
    Weights are smaller than huge pages or not much larger, so they lie side by side in arenas of 32 MiB; an arena goes
    when all of its tensors are gone. It is a hint: where /sys/kernel/mm/transparent_hugepage/enabled says "never",
    nothing changes.
    """
    global _arena
    bytes_ = math.prod(shape) * dtype.itemsize
    if bytes_ == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    with _lock:
        if len(_arena) < bytes_:
            _arena = _new_arena(max(bytes_, _ARENA))
        memory, _arena = _arena[:bytes_], _arena[-(-bytes_ // _ALIGNMENT) * _ALIGNMENT :]
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _new_arena(size: int) -> memoryview:
    """Return new memory of whole huge pages."""
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    mapped = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux that was built without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    start = -address % _HUGE_PAGE
    return memoryview(mapped)[start : start + size]


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB that was freed, instead of giving it back to Linux.

    A compiled model allocates and frees its intermediate results in each call. By default glibc gives back what is
    more than twice the largest block that was ever mapped by itself (`mallopt(3)`, M_MMAP_THRESHOLD), and the next call
    faults these pages in anew: two threads of MiniLM, 8 × 128 tokens, took up to 1.15 times as long. That limit
    grows with the blocks that are freed, so one large block, which is never touched, is all it takes. Other allocators
    do not mind.
    """
    torch.empty(_LARGEST_ADAPTED, dtype=torch.uint8, device="cpu")
