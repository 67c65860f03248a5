"""What the CPU can do with 8-bit integers, and which signedness of the activation it is fast in."""

from __future__ import annotations

import enum
import functools

import torch


class Isa(enum.Enum):
    """The best int8 dot-product instructions of a CPU."""

    AMX = "amx_int8"
    AVX512_VNNI = "avx512_vnni"
    AVX_VNNI = "avx_vnni"
    NONE = "none"


#: The activation's dtype that the matmul is fast in. AMX multiplies signed by signed. The VNNI instruction `vpdpbusd`
#: takes unsigned times signed: there oneDNN runs a signed activation through a reference loop, far slower.
ACTIVATION_DTYPE = {
    Isa.AMX: torch.int8,
    Isa.AVX512_VNNI: torch.uint8,
    Isa.AVX_VNNI: torch.uint8,
}


@functools.cache
def cpu_isa() -> Isa:
    """Return the best of the instruction sets that this CPU has."""
    has = torch.cpu.get_capabilities()
    return next((isa for isa in Isa if has.get(isa.value)), Isa.NONE)
