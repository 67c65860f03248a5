"""An engine in a process of its own, which takes orders: one sample at a time, so that processes can alternate."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Sampler

SCRIPT = Path(__file__).resolve().parents[1] / "bench.py"


class EngineError(Exception):
    """An engine could not run the model; the message is the last line of what it said."""


class EngineProcess:
    """The end that gives orders.

    first: the first output of the model. compile_seconds, note: see `model_engines.Prepared`. kernels: with
    `profile`, rows of `profiling.kernels`.
    """

    def __init__(self, model: str, engine: str, threads: int, isa: str, *, profile: bool = False) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory, "first.pt")
            command = [sys.executable, str(SCRIPT), "engine", model, engine, "--threads", str(threads), "--isa", isa]
            self._process = subprocess.Popen(
                [*command, "--first", str(output), *(["--profile"] if profile else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            ready = self._reply()
            self.first: torch.Tensor = torch.load(output)
        self.compile_seconds: float | None = ready["compile_seconds"]
        self.note: str = ready["note"]
        self.kernels: list[list[Any]] = ready["kernels"]

    def sample(self) -> float:
        """Return the seconds of a call."""
        assert self._process.stdin
        self._process.stdin.write("sample\n")
        self._process.stdin.flush()
        return float(self._reply()["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            reply: dict[str, Any] = json.loads(line)
            return reply
        status = self._process.wait()
        if status < 0:
            raise EngineError(f"it crashed: {signal.Signals(-status).name}")
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        self._log.close()
        raise EngineError(lines[-1] if lines else f"it ended with {status}")


def serve(options: argparse.Namespace) -> None:
    """Be the end that takes orders, until there are no more."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not mixed with replies
    from benchmarks.model_engines import ENGINES
    from benchmarks.models import make

    try:
        with torch.no_grad():
            prepared = ENGINES[options.engine].prepare(make(options.model), options.threads[0])
            torch.save(prepared.first, options.first)
            kernels: list[list[Any]] = []
            if options.profile:
                from benchmarks.profiling import kernels as profiled

                kernels = prepared.kernels() if prepared.kernels else profiled(prepared.call)
            ready = {"compile_seconds": prepared.seconds, "note": prepared.note, "kernels": kernels}
            print(json.dumps(ready), file=replies)
            sampler = Sampler(prepared.call)
            for _ in sys.stdin:
                print(json.dumps({"seconds": sampler.sample()}), file=replies)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", file=sys.stderr)
        sys.exit(1)
