"""`python -m qfuse doctor`: what qfuse finds in this process, as text for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from qfuse import config
from qfuse.config import is_enabled
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import compiler, freezing_setting, installed_passes
from qfuse.isa import Isa, cpu_isa, cpu_name
from qfuse.problem import Problem
from qfuse.reasons import Decline

#: Whose versions matter; those that are not installed are left out.
_PACKAGES = ("qfuse", "torch", "torchao", "transformers", "triton", "numpy")

#: What torch, Inductor and qfuse read from the environment.
_VARIABLES = (
    "QFUSE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCHINDUCTOR_FREEZING",
    "CXX",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "TORCH_LOGS",
)

_X86_QUANTIZER = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


def diagnosis() -> str:
    """Return all that is known, a line each, and the known problems with what to do about them."""
    facts = [f"{label:<12}{text}" for label, text in _facts()]
    problems = [line for problem, remedy in _problems() for line in (f"- {problem}", f"  → {remedy}")]
    return "\n".join([*facts, "", "known problems" if problems else "no known problems", *problems])


def _facts() -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join([f"Python {platform.python_version()}", *_versions()])
    yield "system", platform.platform()
    yield "CPU", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "int8 ISA", cpu_isa().value
    yield "oneDNN", "available" if torch.backends.mkldnn.is_available() else "torch is built without it"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}", torch.cuda.get_device_name(i)
    yield "compiler", _compiler_version() or "none"
    yield "pass", "installed" if FUSION_PASS in installed_passes() else "not installed"
    if others := _other_passes():
        yield "and others", ", ".join(others)
    freezes, by = freezing_setting()
    yield "freezing", "{}, {}".format("on" if freezes else "off", by)
    yield "autoload", _autoload()
    variables = [v for v in os.environ if v in _VARIABLES or v.startswith("QFUSE_")]
    yield "environment", ", ".join(f"{v}={os.environ[v]}" for v in variables) or "nothing set"
    yield "config", ", ".join(_changed_options()) or "all defaults"
    for device in _devices():
        yield f"on {device}", _choice(device)


def _problems() -> Iterator[tuple[str, str]]:
    """Yield each known problem of this process, and what to do about it."""
    if not _is_supported(torch.__version__):
        yield f"qfuse is made for {_requirement()}", "install one of these versions, or a newer qfuse"
    if not is_enabled():
        yield "qfuse is switched off", "unset QFUSE, or set qfuse.config.enabled = True"
    elif FUSION_PASS not in installed_passes():
        yield "qfuse's pass is not installed in this thread", "call qfuse.enable()"
    elif not freezing_setting()[0]:
        yield (
            "freezing is off: no weight is a constant, and most linears are not fused",
            "unset TORCHINDUCTOR_FREEZING, and leave torch._inductor.config.freezing alone",
        )
    if compiler() is None:
        yield "there is no C++ compiler, which torch.compile needs on CPU", "install g++, or set CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        yield "the C headers of Python are missing", "install python3-dev (python3-devel), if compiling fails"
    if cpu_isa() is Isa.NONE:
        yield (
            "the CPU has neither AVX2, VNNI nor AMX, or oneDNN is limited to do without",
            "expect little gain here: the lowering is aten",
        )
    if not torch.backends.mkldnn.is_available():
        yield "torch is built without oneDNN", "install an official build of torch for x86"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        yield (
            "TORCH_DEVICE_BACKEND_AUTOLOAD is off: torch rejects TORCH_LOGS=qfuse_matches",
            "unset it, or use TORCH_LOGS=+qfuse, or torch._logging.set_logs after `import qfuse`",
        )
    if "missing" in _autoload():
        yield "qfuse's entry points are missing", "install qfuse with pip instead of putting it on PYTHONPATH"
    if _X86_QUANTIZER in sys.modules:
        yield (
            "torchao's x86 quantizer is imported: it adds its own int8 patterns to all of Inductor",
            "import it only in the process that quantizes, and compile in another",
        )
    if others := _other_passes():
        yield f"other passes run on the same graphs: {', '.join(others)}", "if results differ, try without them"


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {torch.__version__ if name == 'torch' else importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _requirement() -> str:
    requirements = importlib.metadata.requires("qfuse") or ()
    return next((r for r in requirements if re.match(r"torch[<>=]", r)), "torch")


def _is_supported(version: TorchVersion) -> bool:
    bounds = re.findall(r"(>=|<)([\d.]+)", _requirement())
    return all(version >= bound if sign == ">=" else version < bound for sign, bound in bounds)


def _compiler_version() -> str:
    path = compiler()
    if path is None:
        return ""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return f"{shutil.which(path) or path}: {done.stdout.partition(chr(10))[0]}"


def _autoload() -> str:
    groups = ("torch.backends", "torch_dynamo_backends")
    missing = [g for g in groups if "qfuse" not in importlib.metadata.entry_points(group=g).names]
    return f"missing in {', '.join(missing)}" if missing else "entry points present"


def _other_passes() -> list[str]:
    return [_name(p) for p in installed_passes() if p is not FUSION_PASS]


def _name(graph_pass: Any) -> str:
    named = graph_pass if hasattr(graph_pass, "__qualname__") else type(graph_pass)
    return f"{named.__module__}.{named.__qualname__}"


def _changed_options() -> Iterator[str]:
    options: Any = config
    for name, entry in options._config.items():
        if (value := getattr(config, name)) != entry.default:
            yield f"{name}={value!r}"


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _choice(device: str) -> str:
    """Say which lowering a linear of a usual size would get, with freezing on."""
    from qfuse.lowerings import choose

    problem = Problem(
        m=1024,
        k=1024,
        n=1024,
        x_dtype=torch.int8,
        out_dtype=torch.bfloat16,
        device=torch.device(device),
        isa=cpu_isa() if device == "cpu" else Isa.NONE,
        weight_is_constant=True,
        called_from_python=True,
    )
    provider = choose(problem)
    if isinstance(provider, Decline):
        return provider.reason
    x = str(provider.activation_dtype(problem)).removeprefix("torch.")
    return f"{provider.name} with {x} activations, for an int8 linear of 1024×1024×1024 with a frozen weight"
