"""Huge pages for what is read from memory again and again."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_HUGE_PAGE = 1 << 21


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to put new memory, which nothing has been written to yet, into huge pages; return the tensor.

    A decode step reads every weight once, and with pages of 4 KiB spends up to a twentieth of that on finding them. It
    is a hint: where /sys/kernel/mm/transparent_hugepage/enabled says "never", nothing changes.
    """
    first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE - first
    if hasattr(mmap, "MADV_HUGEPAGE") and tensor.device.type == "cpu" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return tensor
