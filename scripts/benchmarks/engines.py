"""Models compiled by Inductor, with qfuse or without."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import qfuse
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import installed_passes, with_fresh_code
from qfuse.lowerings import INT8_LINEAR, every_provider
from qfuse.records import recording


@dataclass
class Compiled:
    """A compiled model. report: what qfuse did, empty without qfuse. seconds: how long compiling took."""

    call: Callable[..., Any]
    report: qfuse.Report
    seconds: float

    @property
    def lowerings(self) -> tuple[str, ...]:
        """Return the lowerings that the compiled model's linears use."""
        return tuple(dict.fromkeys(match.lowering for match in self.report.matches))


def lowering_names(device: str = "cpu") -> list[str]:
    """Return the lowerings that there are for a type of device, the preferred one first."""
    return [provider.name for provider in INT8_LINEAR[device]]


def compile_model(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    fuse: bool,
    only_lowering: str | None = None,
    max_autotune: bool = False,
    backend: str = "inductor",
) -> Compiled:
    """Compile `model` with weights frozen, by calling it once.

    fuse: with qfuse. only_lowering: with the other lowerings disabled. max_autotune: let Inductor measure its choices.
    backend: dynamo's name for another compiler.
    """

    @with_fresh_code  # or dynamo would look for the code of this model among that of others of its class, in each call
    def run(*args: Any) -> Any:
        return model(*args)

    disabled = [name for name in every_provider() if name != only_lowering] if only_lowering else []
    compiled = torch.compile(run, backend=backend)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(freezing=True, max_autotune=max_autotune))
        stack.enter_context(qfuse.config.patch(disabled_lowerings=disabled))
        matches, misses = stack.enter_context(recording())
        stack.enter_context(_fusing(fuse))
        start = time.perf_counter()
        compiled(*inputs)
        seconds = time.perf_counter() - start
    return Compiled(compiled, qfuse.Report(matches, misses), seconds)


@contextlib.contextmanager
def _fusing(fuse: bool) -> Iterator[None]:
    """Enable or disable qfuse for a while."""
    before = FUSION_PASS in installed_passes()
    (qfuse.enable if fuse else qfuse.disable)()
    try:
        yield
    finally:
        (qfuse.enable if before else qfuse.disable)()


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the Frobenius norm of the deviation, relative to that of the reference."""
    result, reference = result.double(), reference.double()
    return ((result - reference).norm() / reference.norm()).item()
