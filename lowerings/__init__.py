"""The lowerings of the canonical ops, one provider a file, and the one table that says which is preferred where."""

from __future__ import annotations

from qfuse import config
from qfuse.isa import Isa
from qfuse.lowerings import tuning
from qfuse.lowerings.aten import Aten
from qfuse.lowerings.cpp import Cpp
from qfuse.lowerings.onednn import OneDNN
from qfuse.lowerings.triton import Triton
from qfuse.problem import Problem
from qfuse.provider import Provider
from qfuse.reasons import Decline

_CPP, _ONEDNN, _ATEN, _TRITON = Cpp(), OneDNN(), Aten(), Triton()

#: For each platform, the providers of `qfuse::int8_linear`, the best first.
INT8_LINEAR: dict[str, tuple[Provider, ...]] = {
    "cpu": (_CPP, _ONEDNN, _ATEN),
    "cpu without AVX2": (_ATEN, _CPP),
    "cuda": (_TRITON, _ATEN),
}


def choose(problem: Problem) -> Provider | Decline:
    """Return the best provider that supports `problem`, or why none does.

    The best is the first; under `max_autotune` it is the one that is measured to be the fastest.
    """
    supporting, refusals = [], []
    for provider in INT8_LINEAR.get(platform_of(problem), ()):
        reason = _refusal(provider, problem)
        if reason is None:
            supporting.append(provider)
        else:
            refusals.append(f"{provider.name}: {reason}")
    if not supporting:
        return Decline("no lowering: " + ("; ".join(refusals) or f"none for device {problem.device.type}"))
    if len(supporting) > 1 and tuning.is_wanted():
        return tuning.fastest(problem, supporting)
    return supporting[0]


def platform_of(problem: Problem) -> str:
    """Return the key of `INT8_LINEAR` for `problem`, which may be missing there."""
    is_plain = problem.device.type == "cpu" and problem.isa is Isa.NONE
    return "cpu without AVX2" if is_plain else problem.device.type


def _refusal(provider: Provider, problem: Problem) -> str | None:
    if provider.name in config.disabled_lowerings:
        return "disabled by qfuse.config.disabled_lowerings"
    return provider.supports(problem)


def by_name(name: str) -> Provider:
    """Return the provider called `name`."""
    return every_provider()[name]


def every_provider() -> dict[str, Provider]:
    """Return the providers of all platforms, by name."""
    return {provider.name: provider for providers in INT8_LINEAR.values() for provider in providers}
