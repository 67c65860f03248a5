"""What the CPU can do with 8-bit integers, and which signedness of the activation it is fast in."""

from __future__ import annotations

import enum
import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch


class Isa(enum.Enum):
    """The best instructions of a CPU for int8 dot products. AVX2's, without VNNI, are for integers of 16 bits."""

    AMX = "amx_int8"
    AVX512_VNNI = "avx512_vnni"
    AVX_VNNI = "avx_vnni"
    AVX2 = "avx2"
    NONE = "none"


#: The activation's dtype that the matmul is fast in. AMX multiplies signed by signed. The VNNI instruction `vpdpbusd`
#: takes unsigned times signed: there oneDNN runs a signed activation through a reference loop, far slower. CPUs
#: without either are not here: oneDNN runs reference loops for both, or saturates (`lowerings/onednn.py`).
ACTIVATION_DTYPE = {
    Isa.AMX: torch.int8,
    Isa.AVX512_VNNI: torch.uint8,
    Isa.AVX_VNNI: torch.uint8,
}


#: Which of them oneDNN still uses under each limit that a user can set in the environment, as oneDNN documents it.
#: A limit that is not here, like AVX512_CORE_AMX, leaves all of them.
_UNDER_LIMIT = {
    **dict.fromkeys(("SSE41", "AVX"), frozenset[Isa]()),
    **dict.fromkeys(("AVX2", "AVX512_CORE"), frozenset({Isa.AVX2})),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), frozenset({Isa.AVX_VNNI, Isa.AVX2})),
    **dict.fromkeys(("AVX512_CORE_VNNI", "AVX512_CORE_BF16"), frozenset({Isa.AVX512_VNNI, Isa.AVX2})),
    **dict.fromkeys(
        ("AVX512_CORE_FP16", "AVX10_1", "AVX10_1_512", "AVX10_2", "AVX10_2_512"),
        frozenset({Isa.AVX512_VNNI, Isa.AVX_VNNI, Isa.AVX2}),
    ),
}


@functools.cache
def cpu_name() -> str:
    """Return what the CPU's maker calls it, as far as the operating system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def cpu_isa() -> Isa:
    """Return the best of the instruction sets that this CPU has, and that oneDNN has not been told to do without."""
    return best_isa(torch.cpu.get_capabilities(), os.environ)


def cpu_facts() -> str:
    """Return all that generated code may depend on of this CPU, for the key of a cache that CPUs share.

    The instruction sets are not all: attention asks for bfloat16 and for the maker, and blocks fit into caches.
    """
    facts = sorted(torch.cpu.get_capabilities().items())
    return f"{cpu_isa().value} {facts} {os.environ.get('ATEN_CPU_CAPABILITY')}"


def best_isa(has: Mapping[str, object], environment: Mapping[str, str]) -> Isa:
    """Return the best of the instruction sets that a CPU has, under the limit that the environment sets to oneDNN.

    The limit counts because the signedness of the activation hangs on it: on a CPU with AMX, oneDNN without AMX would
    take a signed activation through its reference loop. It holds for qfuse's own kernels as well, but for attention,
    which multiplies floats: that follows Inductor's choice of vectors (`ATEN_CPU_CAPABILITY`), and the limit as to AMX.
    """
    allowed = _UNDER_LIMIT.get(_limit(environment), frozenset(Isa))
    return next((isa for isa in Isa if isa in allowed and has.get(isa.value)), Isa.NONE)


def _limit(environment: Mapping[str, str]) -> str:
    """Read the limit as oneDNN does: in any case of letters, and by the older name where the newer one is not set."""
    values = (environment.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    return next((value.upper() for value in values if value), "")
