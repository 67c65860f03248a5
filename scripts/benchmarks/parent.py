"""Starts one process for each number of threads, gathers what they measured, and shows it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.plot import plot
from benchmarks.profiling import kernel_table
from benchmarks.report import LEGEND, linear_tables, model_tables
from benchmarks.results import Case, Run, load, save
from benchmarks.worker import ISA_LIMITS

WIDTH = 170  # of tables in a file
QUIET = 0.3  # load average of a machine on which nothing else runs


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Do what the command line says, and return the exit status."""
    on_gpu = getattr(options, "device", "cpu") == "cuda"  # of `linear` alone
    if on_gpu and (missing := missing_gpu()):
        print(f"qfuse: {missing}", file=sys.stderr)
        return 1
    before = os.getloadavg()[0]  # before our own processes add to it
    name = options.command if options.isa == "native" else f"{options.command}_{options.isa}"
    name += "_cuda" * on_gpu
    runs: list[Run] = []
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        for threads in options.threads if not on_gpu else [1]:  # a GPU does not care
            results = Path(directory, f"{threads}.json")
            if status := _worker(threads, results, options.isa, arguments):
                print(f"qfuse: the process that measured {threads} threads ended with {status}.", file=sys.stderr)
                failed = 1
            if results.exists():
                runs += load(results)
                save(runs, options.out / f"{name}.json")  # so it is not lost if the rest is
    if not runs:
        return 1
    if before > QUIET:
        runs[0].notes.append(f"Other processes were running (load average {before:.2f}): these times mean little.")
    save(runs, options.out / f"{name}.json")
    cases = [case for run in runs for case in run.cases]
    screen = Console()
    # A pipe has no width, and 80 columns are too few.
    show(runs, cases, options.command, screen if screen.is_terminal else Console(width=WIDTH))
    with (options.out / f"{name}.txt").open("w") as file:
        show(runs, cases, options.command, Console(file=file, width=WIDTH))
    is_drawn = plot(cases, runs[0].summary, options.out / f"{name}.svg")
    print(f"written to {options.out}: {name}.json, {name}.txt" + f", {name}.svg" * is_drawn)
    return failed


def missing_gpu() -> str:
    """Return why there is nothing to measure with `--device cuda`, and what to do, or ''."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"--device cuda needs a build of torch for GPUs, and torch {torch.__version__} is none: "
            "install one of the same version into .venv, as CONTRIBUTING.md tells, and run this again."
        )
    return (
        "--device cuda needs a GPU, and torch finds none: see that nvidia-smi (rocm-smi) lists one, and run this again."
    )


def _worker(threads: int, results: Path, isa: str, arguments: list[str]) -> int:
    """Measure with so many threads, in a process of its own, because libraries read their number and the ISA once."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **ISA_LIMITS[isa]}
    script = Path(__file__).resolve().parents[1] / "bench.py"
    command = [sys.executable, str(script), *arguments, "--threads", str(threads), "--worker", str(results)]
    return subprocess.run(command, env=environment, check=False).returncode


def show(runs: list[Run], cases: list[Case], command: str, console: Console) -> None:
    """Print the machine, the tables and the notes."""
    console.print(runs[0].summary, highlight=False)
    for table in (linear_tables if command == "linear" else model_tables)(cases):
        console.print(table)
    for case in cases:
        for engine in case.engines:
            if engine.kernels:
                title = f"{case.title}, {case.mode}, {engine.engine}, {case.threads} threads"
                console.print(kernel_table(title, engine.kernels))
    console.print(LEGEND[command], highlight=False)
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        console.print(note, highlight=False, markup=False)
