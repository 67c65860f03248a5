"""What a compiled Triton kernel is made of: registers, spills, shared memory, instructions, and how many blocks fit."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of threads that are resident on a multiprocessor share, with a limit on their number.

    registers: of 32 bits and one lane. shared: bytes, and those that the system takes of them for each block.
    lanes: of a warp, or a wavefront. A quarter of the registers belongs to each quarter of the warps.
    """

    registers: int
    granularity: int  # of a warp's registers
    shared: int
    reserved: int
    warps: int
    blocks: int
    lanes: int = 32


#: By architecture: NVIDIA's table of technical specifications by compute capability, AMD's CDNA 3 and 4
#: instruction sets, and LLVM's model of them.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 256, 164 << 10, 1024, 64, 32),
    "sm_86": Multiprocessor(65536, 256, 100 << 10, 1024, 48, 16),
    "sm_89": Multiprocessor(65536, 256, 100 << 10, 1024, 48, 24),
    "sm_90": Multiprocessor(65536, 256, 228 << 10, 1024, 64, 32),
    "sm_100": Multiprocessor(65536, 256, 228 << 10, 1024, 64, 32),
    "sm_120": Multiprocessor(65536, 256, 100 << 10, 1024, 48, 24),
    "gfx942": Multiprocessor(131072, 512, 64 << 10, 0, 32, 16, 64),
    "gfx950": Multiprocessor(131072, 512, 160 << 10, 0, 32, 16, 64),
}

#: The names of instructions, as they begin.
MATRIX = ("IMMA", "IGMMA", "UTCIMMA", "UTCQMMA", "v_mfma_i32")
COPIES = ("LDGSTS", "UTMALDG", "buffer_load", "global_load")
SHARED = ("LDS", "ds_read", "ds_load")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    shared: bytes of a block. registers: of a thread. stack: bytes of a thread, which are spilled registers.
    instructions: by name, and of them those of the innermost loop with matrix instructions; None if it is unrolled.
    """

    architecture: str
    warps: int
    shared: int
    registers: int
    stack: int
    instructions: Counter[str]
    loop: Counter[str] | None

    @property
    def resident(self) -> int:
        """Return how many blocks of threads a multiprocessor holds at once."""
        of = MULTIPROCESSORS[self.architecture]
        of_warp = -(-self.registers * of.lanes // of.granularity) * of.granularity
        by_registers = of.registers // 4 // of_warp * 4 // self.warps
        by_shared = of.shared // (-(-(self.shared + of.reserved) // 128) * 128)
        return min(by_registers, by_shared, of.warps // self.warps, of.blocks)

    def count(self, names: Sequence[str]) -> int:
        """Return how many of these instructions there are, in the loop if there is one."""
        return sum(n for name, n in (self.loop or self.instructions).items() if name.startswith(tuple(names)))


def read(kernel: Any, warps: int) -> Binary:
    """Return what is in a kernel that Triton has compiled, for NVIDIA's or AMD's."""
    return _nvidia(kernel, warps) if "cubin" in kernel.asm else _amd(kernel, warps)


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack."""
    usage = _tool("cuobjdump", "-res-usage", cubin)
    found = [re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")]
    assert all(found), usage
    registers, stack = (int(match[1]) for match in found if match)
    return registers, stack


def _nvidia(kernel: Any, warps: int) -> Binary:
    cubin = kernel.asm["cubin"]
    lines = _tool("nvdisasm", "-c", cubin).splitlines()
    instruction = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    mixes = _mixes(lines, instruction, r"\s*(\.L_x_\d+):", r"BRA\S*\s.*`\((\.L_x_\d+)\)")
    return Binary(f"sm_{kernel.metadata.target.arch}", warps, kernel.metadata.shared, *resources(cubin), *mixes)


def _amd(kernel: Any, warps: int) -> Binary:
    text = kernel.asm["amdgcn"]

    def fact(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match, name
        return int(match[1])

    instruction = re.compile(r"^\s+([a-z]\w+)")
    mixes = _mixes(text.splitlines(), instruction, r"(\.LBB\d+_\d+):", r"s_c?branch\w*\s+(\.LBB\d+_\d+)")
    registers = fact("vgpr_count")  # those of the accumulators among them
    stack = fact("private_segment_fixed_size")
    return Binary(kernel.metadata.target.arch, warps, kernel.metadata.shared, registers, stack, *mixes)


def _mixes(
    lines: Sequence[str], instruction: re.Pattern[str], label: str, branch: str
) -> tuple[Counter[str], Counter[str] | None]:
    """Count the instructions, and those of the innermost loop that has the most matrix instructions."""

    def counted(some: Sequence[str]) -> Counter[str]:
        return Counter(match[1] for line in some if (match := instruction.search(line)))

    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(label, line))}
    jumps = [(labels[match[1]], i) for i, line in enumerate(lines) if (match := re.search(branch, line))]
    loops = [(first, last) for first, last in jumps if first < last]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in loops)]
    mixes = [counted(lines[first:last]) for first, last in inner]
    matrix = [sum(n for name, n in mix.items() if name.startswith(MATRIX)) for mix in mixes]
    best = max(range(len(mixes)), key=matrix.__getitem__, default=None)
    return counted(lines), mixes[best] if best is not None and matrix[best] else None


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
