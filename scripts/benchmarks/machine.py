"""A description of the machine that a benchmark ran on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Machine:
    """What decides how fast things are.

    caches: level → size, of the first core. isa_limit: what oneDNN is limited to. load_average: of 1, 5 and 15 minutes.
    gpu: its name, or "".
    """

    cpu: str
    flags: list[str]
    logical_cpus: int
    hyper_threading: bool
    virtual: bool
    caches: dict[str, str]
    memory_gib: float
    isa_limit: str
    kernel: str
    python: str
    torch: str
    compiler: str
    commit: str
    date: str
    load_average: tuple[float, ...]
    gpu: str

    def summary(self) -> str:
        """Return two lines for people."""
        caches = ", ".join(f"{name} {size}" for name, size in self.caches.items())
        load = " ".join(f"{value:.2f}" for value in self.load_average)
        limit = f", limited to {self.isa_limit}" if self.isa_limit else ""
        return (
            f"{self.cpu}{' (virtual machine)' if self.virtual else ''}, {self.logical_cpus} CPUs "
            f"({' '.join(self.flags)}{limit}), {caches}, {self.memory_gib:.0f} GiB{self.gpu and f', {self.gpu}'}\n"
            f"torch {self.torch}, {self.compiler}, Python {self.python}, commit {self.commit}, {self.date}, "
            f"load average {load}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return asdict(self)


def describe() -> Machine:
    """Look at this machine."""
    cpuinfo = _cpuinfo()
    has = torch.cpu.get_capabilities()
    return Machine(
        cpu=cpuinfo.get("model name", platform.machine()),
        flags=[flag for flag in ISA_FLAGS if has.get(flag)],
        logical_cpus=len(os.sched_getaffinity(0)),
        hyper_threading=_read(Path("/sys/devices/system/cpu/smt/active")) == "1",
        virtual="hypervisor" in cpuinfo.get("flags", "").split(),
        caches=_caches(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        isa_limit=os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        kernel=platform.release(),
        python=platform.python_version(),
        torch=torch.__version__,
        compiler=_compiler(),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        load_average=os.getloadavg(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    )


def _cpuinfo() -> dict[str, str]:
    """Return the facts of the first CPU of /proc/cpuinfo."""
    first = _read(Path("/proc/cpuinfo")).split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(index / "type")
        if kind != "Instruction":
            found[f"L{_read(index / 'level')}{'d' if kind == 'Data' else ''}"] = _read(index / "size")
    return found


def _compiler() -> str:
    return _output([os.environ.get("CXX", "g++"), "--version"]).partition("\n")[0]


def _commit() -> str:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit or 'unknown'}{' with changes' if changed else ''}"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
