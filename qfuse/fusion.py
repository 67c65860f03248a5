"""The pass: every quantized matmul of a graph is matched, lowered or explained."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target

from qfuse import config, graph_text, hints
from qfuse.bisection import is_bisected_away
from qfuse.constants import Constants
from qfuse.family import Anchor, Family
from qfuse.inductor import fake_value, is_training_graph
from qfuse.match import Walk, walk
from qfuse.problem import Problem
from qfuse.reasons import Decline
from qfuse.records import Match, Miss, is_observed, match_record, miss_record
from qfuse.report import Report
from qfuse.rewrite import replace_by_int8_linear
from qfuse.verification import difference

log = logging.getLogger(__name__)

_TRAINING = Decline("the graph computes gradients", hint="compile and run the model under torch.no_grad()")


def fuse(graph: Graph) -> Report:
    """Fuse the quantized linears of `graph`, in place, and report what was done. What fails is a miss."""
    from qfuse.patterns import FAMILIES

    _warn_of_unknown_names(tuple(config.disabled_patterns), FAMILIES)
    matches: list[Match] = []
    misses: list[Miss] = []
    constants = Constants(graph)
    training = is_training_graph(graph)
    for node, candidates in list(_anchors(graph, FAMILIES)):
        outcome = _fuse_by_first(candidates, node, constants, training)
        matches += [outcome] if isinstance(outcome, Match) else []
        misses += [outcome] if isinstance(outcome, Miss) else []
    if matches:
        graph.eliminate_dead_code()
    return Report(matches, misses)


@functools.cache
def _warn_of_unknown_names(names: tuple[str, ...], families: tuple[Family, ...]) -> None:
    known = [pattern.name for family in families for pattern in family.patterns]
    for name in set(names) - set(known):
        log.warning("qfuse.config.disabled_patterns: there is no pattern %r; there are %s", name, ", ".join(known))


def shield(graph: Graph) -> None:
    """Hide integer matmuls that were not fused from Inductor's own patterns (as of torch 2.13).

    They run under freezing, which qfuse has switched on. They take any two multiplications behind an `_int_mm` for
    scales, whatever their shapes: results are wrong with the weight's scale first, and K = 0 ends the process. And they
    pack the weight of any `mm` or `addmm` as if it were float, which fails for integers.
    """
    matmuls = [n for target in _HIDDEN for n in graph.find_nodes(op="call_function", target=target)]
    of_integers = [n for n in matmuls if not fake_value(n).dtype.is_floating_point]
    if not of_integers:
        return  # most graphs: spare them another look for constants
    constants = Constants(graph)
    for node in of_integers:
        if node.args[-1] in constants:
            node.target = _HIDDEN[node.target]


_HIDDEN: dict[Target, Target] = {
    torch.ops.aten._int_mm.default: torch.ops.qfuse.int_mm.default,
    torch.ops.aten.mm.default: torch.ops.qfuse.mm.default,
    torch.ops.aten.addmm.default: torch.ops.qfuse.addmm.default,
}


def _anchors(graph: Graph, families: tuple[Family, ...]) -> Iterator[tuple[Node, list[tuple[Family, Anchor]]]]:
    by_target: dict[object, list[tuple[Family, Anchor]]] = {}
    for family in families:
        for anchor in family.anchors:
            for target in anchor.targets:
                by_target.setdefault(target, []).append((family, anchor))
    for node in graph.nodes:
        if found := by_target.get(node.target) or by_target.get(str(node.target)):
            yield node, found


def _fuse_by_first(
    candidates: list[tuple[Family, Anchor]], node: Node, constants: Constants, training: bool
) -> Match | Miss | None:
    """Fuse by the first family that can; if none can, the first that knows the node says why."""
    first_miss = None
    for family, anchor in candidates:
        outcome = _fuse_one(family, anchor, node, constants, training)
        if isinstance(outcome, Match):
            return outcome
        first_miss = first_miss or outcome
    return first_miss


def _fuse_one(family: Family, anchor: Anchor, node: Node, constants: Constants, training: bool) -> Match | Miss | None:
    try:
        walked = walk(family, anchor, node, constants)
        if walked is None:
            return None
        if training:
            return miss_record(node, family.name, _TRAINING, walked.trail)
        return _replace(family, node, walked, constants)
    except Exception as error:
        log.debug("qfuse failed at %s", node.format_node(), exc_info=True)
        reason = f"internal error, please report it: {error!r}"
        return miss_record(node, family.name, Decline(reason, hint=hints.INTERNAL_ERROR))


def _replace(family: Family, node: Node, walked: Walk, constants: Constants) -> Match | Miss:
    from qfuse.lowerings import choose

    log.debug("%s: %s stopped at %s: %s", family.name, node, walked.stop.node, walked.stop.reason)
    form = walked.form
    if form is None:
        nearest = family.name if walked.reached is None else family.name_of(walked.reached, constants)
        return miss_record(node, nearest, walked.stop, walked.trail)
    pattern = family.name_of(form, constants)
    if pattern in config.disabled_patterns:
        disabled = Decline("disabled by qfuse.config.disabled_patterns", hint=hints.DISABLED_PATTERN)
        return miss_record(node, pattern, disabled, walked.trail)
    problem = Problem.of(form, constants)
    provider = choose(problem)
    if isinstance(provider, Decline):
        return miss_record(node, pattern, replace(provider, hint=hints.for_lowering(problem)), walked.trail)
    record = match_record(form, pattern, provider.name)
    if is_bisected_away(f"qfuse: {pattern} {record.module or node.name}"):
        return miss_record(node, pattern, Decline("left out to bisect"), walked.trail)
    before = set(node.graph.nodes) if is_observed() else None
    if before is not None:
        record = replace(record, before=graph_text.lines(walked.trail[: walked.trail.index(form.value) + 1]))
    check = difference if config.verify else None
    declined = replace_by_int8_linear(form, provider, provider.activation_dtype(problem), constants, check)
    if declined is not None:
        return miss_record(node, pattern, declined, walked.trail)
    if before is not None:
        record = replace(record, after=graph_text.lines([n for n in node.graph.nodes if n not in before]))
    return record
