"""The walk: from an anchor down its users, as far as the algebra goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from qfuse import hints
from qfuse.constants import Constants
from qfuse.family import Anchor, Family
from qfuse.graph_text import operator
from qfuse.normal_form import QLinear
from qfuse.reasons import Decline
from qfuse.steps import steps_by_target


@dataclass(frozen=True)
class Walk:
    """Where a walk ended.

    form: the furthest complete quantized linear, or None.
    reached: the furthest form, complete or not.
    stop: why the walk did not go on from there.
    trail: the nodes that were passed, from the anchor on.
    """

    form: QLinear | None
    reached: QLinear | None
    stop: Decline
    trail: tuple[Node, ...] = ()


def walk(family: Family, anchor: Anchor, node: Node, constants: Constants) -> Walk | None:
    """Follow the users of `node` while there is one and a step of `family` knows it.

    A value with several users ends the walk: they need it as it is. What is complete by then is fused all the same.
    None if `node` has nothing to do with the family.
    """
    form = anchor.start(node, constants)
    if form is None:
        return None
    if isinstance(form, Decline):
        return Walk(None, None, form, (node,))
    complete: QLinear | None = None
    trail: list[Node] = []
    while True:
        trail.append(form.value)
        if form.is_complete:
            complete = form
        following = _next(form, family, constants)
        if isinstance(following, Decline):
            return Walk(complete, form, following, tuple(trail))
        form = following


def _next(form: QLinear, family: Family, constants: Constants) -> QLinear | Decline:
    users = [user for user in form.value.users if user not in assertions(form.value)]
    if len(users) != 1:
        operators = ", ".join(operator(user) for user in users) or "nothing"
        return Decline(f"used by {len(users)} nodes: {operators}", form.value, hints.SEVERAL_USERS)
    (user,) = users
    step = steps_by_target(family.steps).get(user.target)
    if step is None:
        what = "the graph's output" if user.op == "output" else str(user.target)
        reason = f"used by {what}, which is no part of a quantized linear"
        return Decline(reason, user, hints.for_unknown_operator(user))
    following = step.apply(form, user, constants)
    if isinstance(following, QLinear):
        return following
    hint = following.hint or hints.for_step(form, user, constants)
    return replace(following, step=type(step).__name__, hint=hint)


def erase_assertions(nodes: Iterable[Node]) -> None:
    """Erase what asserts the dtypes of `nodes`, and would keep them alive (`torch.export` puts it there)."""
    for node in nodes:
        for assertion in assertions(node):
            node.graph.erase_node(assertion)


def assertions(node: Node) -> list[Node]:
    """Return the users of `node` that look at its dtype only, and compute nothing."""
    return [user for user in node.users if user.target is torch.ops.aten._assert_tensor_metadata.default]
