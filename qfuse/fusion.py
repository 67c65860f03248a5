"""The pass: every quantized matmul of a graph is matched, lowered or explained."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch.fx import Graph, Node

from qfuse import config
from qfuse.constants import Constants
from qfuse.family import Anchor, Family
from qfuse.inductor import is_training_graph
from qfuse.match import walk
from qfuse.problem import Problem
from qfuse.reasons import Decline
from qfuse.records import Match, Miss, match_record, miss_record
from qfuse.report import Report
from qfuse.rewrite import replace_by_int8_linear

log = logging.getLogger(__name__)

_TRAINING = "the graph computes gradients"
_LIVE = "the weight is not a constant of the graph"
_NO_GRAD = "compile and run the model under torch.no_grad(), with freezing on"


def fuse(graph: Graph) -> Report:
    """Fuse the quantized linears of `graph`, in place, and report what was done. Never raises: what fails is a miss."""
    from qfuse.patterns import FAMILIES

    matches: list[Match] = []
    misses: list[Miss] = []
    constants = Constants(graph)
    training = is_training_graph(graph)
    for family, anchor, node in list(_anchors(graph, FAMILIES)):
        try:
            outcome = Decline(_TRAINING, hint=_NO_GRAD) if training else _fuse_one(family, anchor, node, constants)
        except Exception as error:
            log.debug("qfuse failed at %s", node.format_node(), exc_info=True)
            outcome = Decline(f"internal error, please report it: {type(error).__name__}: {error}")
        if isinstance(outcome, Match):
            matches.append(outcome)
        else:
            misses.append(miss_record(node, family.name, outcome))
    if matches:
        graph.eliminate_dead_code()
    return Report(matches, misses)


def _anchors(graph: Graph, families: tuple[Family, ...]) -> Iterator[tuple[Family, Anchor, Node]]:
    by_target = {t: (family, anchor) for family in families for anchor in family.anchors for t in anchor.targets}
    for node in graph.nodes:
        if found := by_target.get(node.target):
            yield *found, node


def _fuse_one(family: Family, anchor: Anchor, node: Node, constants: Constants) -> Match | Decline:
    from qfuse.lowerings import choose

    walked = walk(family, anchor, node, constants)
    log.debug("%s: %s stopped at %s: %s", family.name, node, walked.stop.node, walked.stop.reason)
    form = walked.form
    if form is None:
        return walked.stop
    pattern = family.name_of(form, constants)
    if pattern in config.disabled_patterns:
        return Decline(f"{pattern} is disabled by qfuse.config.disabled_patterns")
    problem = Problem.of(form, constants)
    provider = choose(problem)
    if isinstance(provider, Decline):
        return provider
    record = match_record(form, pattern, provider.name)
    replace_by_int8_linear(form, provider.name, provider.activation_dtype(problem), constants)
    return record
