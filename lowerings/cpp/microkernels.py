"""The C++ microkernels, one for each instruction set: which text, which class, which headers of the compiler."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from qfuse.isa import Isa

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Microkernel:
    """A C++ class that computes blocks of 64 columns, see `block.h`.

    class_names: by the dtype of the rows, in the namespace `qfuse`. max_rows: that it takes in one call. files: its
    text, in order. includes: headers of the system that the text needs.
    """

    class_names: dict[torch.dtype, str]
    max_rows: int
    files: tuple[str, ...]
    includes: tuple[str, ...]

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that an activation of `dtype`, int8 or uint8, has to have."""
        return dtype if dtype in self.class_names else torch.uint8

    @functools.cached_property
    def text(self) -> str:
        """The C++ that defines the class."""
        return "\n".join((_FOLDER / name).read_text() for name in ("block.h", *self.files))


MICROKERNELS = {
    Isa.AMX: Microkernel(
        {torch.uint8: "Amx<false>", torch.int8: "Amx<true>"},
        32,
        ("avx512_vnni.h", "shifted.h", "amx_permission.h", "amx.h"),
        ("atomic", "cstring", "immintrin.h", "type_traits", "utility", "vector", "sys/syscall.h", "unistd.h"),
    ),
    Isa.AVX512_VNNI: Microkernel(
        {torch.uint8: "Avx512Vnni"},
        48,
        ("avx512_vnni.h",),
        ("atomic", "cstring", "immintrin.h", "type_traits", "utility"),
    ),
    Isa.AVX_VNNI: Microkernel(
        {torch.uint8: "AvxVnni"}, 48, ("portable.h", "avx_vnni.h"), ("atomic", "cstring", "immintrin.h", "type_traits")
    ),
    Isa.AVX2: Microkernel(
        {torch.uint8: "Avx2<false>", torch.int8: "Avx2<true>"},
        48,
        ("avx2.h",),
        ("atomic", "cstring", "immintrin.h", "type_traits"),
    ),
    Isa.NONE: Microkernel({torch.uint8: "Portable"}, 48, ("portable.h",), ("atomic", "cstring", "type_traits")),
}
