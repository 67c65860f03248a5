"""Why something was not fused, in words that help."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Decline:
    """What a check returns instead of a result: nothing is fused beyond this point, and the user is told why.

    reason: what does not hold, in terms of the user's graph.
    node: the graph node where it does not hold.
    hint: what the user can change, or "" where nothing is wrong on his side.
    step: the rule of the algebra that declined, or "" where there is none for the operator.
    """

    reason: str
    node: Node | None = None
    hint: str = ""
    step: str = ""
