"""The C++ microkernels, one for each instruction set: which text, which class, which headers of the compiler."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from qfuse.isa import Isa

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Microkernel:
    """A C++ class that computes blocks of 64 columns, see `block.h`.

    class_name: in the namespace `qfuse`, for unsigned rows. signed_class_name: for signed ones, if it takes these.
    max_rows: that it takes in one call. files: its text, in order. includes: headers of the system that the text needs.
    """

    class_name: str
    max_rows: int
    files: tuple[str, ...]
    includes: tuple[str, ...]
    signed_class_name: str | None = None

    @functools.cached_property
    def text(self) -> str:
        """The C++ that defines the class."""
        return "\n".join((_FOLDER / name).read_text() for name in ("block.h", *self.files))


MICROKERNELS = {
    Isa.AMX: Microkernel(
        "Amx<false>",
        32,
        ("avx512_vnni.h", "shifted.h", "amx_permission.h", "amx.h"),
        ("cstring", "immintrin.h", "type_traits", "vector", "sys/syscall.h", "unistd.h"),
        "Amx<true>",
    ),
    Isa.AVX512_VNNI: Microkernel("Avx512Vnni", 48, ("avx512_vnni.h",), ("cstring", "immintrin.h")),
    Isa.AVX_VNNI: Microkernel("AvxVnni", 48, ("portable.h", "avx_vnni.h"), ("cstring", "immintrin.h")),
    Isa.NONE: Microkernel("Portable", 48, ("portable.h",), ("cstring",)),
}
