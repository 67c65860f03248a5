"""`max_autotune`: of the lowerings that compute a linear, the one that is fastest on this machine.

Each is compiled by itself, with bias and cast but without what follows, and timed on random values. Inductor keeps the
times in its cache of autotuning results.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PersistentCache
from torch._inductor.runtime.benchmarking import benchmarker
from torch.fx import Graph, GraphModule

from qfuse.inductor import compile_frozen_graph, concrete, real_tensors
from qfuse.isa import cpu_name
from qfuse.problem import Problem
from qfuse.provider import Provider

#: Times that differ less are as good as equal.
_HARDLY = 1.05

ops = torch.ops.qfuse
log = logging.getLogger("qfuse.lowerings")


def is_wanted() -> bool:
    """Tell whether the user lets Inductor measure what is fastest."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


def fastest(problem: Problem, providers: Sequence[Provider]) -> Provider:
    """Return the one of `providers`, all of which support `problem`, that takes the least time.

    The first is preferred to one that is hardly faster: equal linears should have equal lowerings, or they would not be
    grouped. A symbolic M is measured at the size that the graph was traced with. What fails is not chosen.
    """
    if concrete(problem.m) is None:
        return providers[0]
    try:
        times = _times(problem, providers)
    except Exception:
        log.warning("the times of lowerings cannot be read or written, %s is used", providers[0].name, exc_info=True)
        return providers[0]
    log.info("%s: %s", problem.cache_key(), ", ".join(f"{p.name} {ms:.3f} ms" for p, ms in times.items()))
    fastest = min(times, key=times.__getitem__)
    return providers[0] if times[providers[0]] <= _HARDLY * times[fastest] else fastest


def _times(problem: Problem, providers: Sequence[Provider]) -> dict[Provider, float]:
    """Return the milliseconds that each takes, from Inductor's cache or measured. Failures are not remembered."""
    from qfuse.fusion_pass import source_hash

    choices: Any = [_Choice(provider) for provider in providers]  # any that have `hash_key` will do
    versions = f"torch {torch.__version__}, qfuse {source_hash()}"
    key = f"{problem.cache_key()}, {cpu_name()}, {torch.get_num_threads()} threads, {versions}"
    times: dict[Any, float] = PersistentCache().lookup(choices, "qfuse::int8_linear", key, None)
    if len(times) < len(choices):
        measured: Any = _measured(problem, choices)
        times = measured
        if all(map(math.isfinite, measured.values())):
            PersistentCache().lookup(choices, "qfuse::int8_linear", key, lambda choices: measured)
    return {choice.provider: ms for choice, ms in times.items()}


@dataclass(frozen=True)
class _Choice:
    """What Inductor's cache takes for a choice."""

    provider: Provider

    def hash_key(self) -> str:
        return self.provider.name


def _measured(problem: Problem, choices: Sequence[_Choice]) -> dict[_Choice, float]:
    """Return the milliseconds that each choice takes, infinity where it fails."""
    with real_tensors():
        return {choice: _milliseconds(problem, choice.provider) for choice in choices}


def _milliseconds(problem: Problem, provider: Provider) -> float:
    try:
        return benchmarker.benchmark(_compiled(problem, provider), device=problem.device)
    except Exception:
        log.warning("lowering %s failed while it was measured", provider.name, exc_info=True)
        return float("inf")


def _compiled(problem: Problem, provider: Provider) -> Callable[[], Any]:
    """Compile a linear like `problem`, with scales of rows and of columns and a bias."""
    from qfuse.lowerings.int8_linear import no_substitutes  # heavy: registers the lowerings with Inductor

    m, device, x_dtype = concrete(problem.m), problem.device, provider.activation_dtype(problem)
    info = torch.iinfo(x_dtype)
    x = torch.randint(info.min, info.max + 1, (m, problem.k), dtype=x_dtype, device=device)
    weight = torch.randint(-128, 128, (problem.n, problem.k), dtype=torch.int8, device=device)
    constants = {
        "weight": ops.pack_int8_weight(weight) if provider.packs_weight else weight,
        "column_sums": ops.pack_column_sums(weight),
        "w_scale": torch.rand(problem.n, device=device),
        "bias": torch.rand(problem.n, device=device),
    }
    inputs = [x, torch.rand(m, device=device)]
    graph = Graph()
    x_node, x_scale = graph.placeholder("x"), graph.placeholder("x_scale")
    weight_node, sums, w_scale, bias = map(graph.get_attr, constants)
    zero_point = 128 if x_dtype is torch.uint8 else 0
    result = graph.call_function(
        ops.int8_linear.default,
        (x_node, weight_node, sums, x_scale, w_scale, bias, [], [], zero_point, problem.out_dtype, provider.name),
    )
    graph.output((result,))
    with no_substitutes():
        compiled = compile_frozen_graph(GraphModule(constants, graph), inputs)
    return lambda: compiled(list(inputs))
