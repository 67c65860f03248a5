"""What a family of patterns is: where matching starts, by which rules it goes on, and what its patterns are called."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node
from torch.fx.node import Target

from qfuse.constants import Constants
from qfuse.normal_form import QLinear
from qfuse.reasons import Decline
from qfuse.steps import Step


class Anchor(abc.ABC):
    """An operator that every graph of a family contains: matching starts at its nodes."""

    #: Operators, or the names of operators that are registered only where their library is imported.
    targets: ClassVar[tuple[Target, ...]]

    @abc.abstractmethod
    def start(self, node: Node, constants: Constants) -> QLinear | Decline | None:
        """Return the form of `node` itself, say why it is none, or None if it has nothing to do with quantization."""


@dataclass(frozen=True)
class Pattern:
    """A named kind of quantized linear.

    name: `family.variant`, as in logs, statistics and `qfuse.config.disabled_patterns`.
    producers: who emits it, and which versions do.
    is_kind: whether a form is of this kind; a family's first pattern that says yes names the match.
    graph: what it computes, in the notation of `docs/patterns.md`.
    conditions: what has to hold beyond the family's conditions.
    test: the file that tests it.

    All but `is_kind` is for people: `scripts/docs` writes it to `docs/patterns.md`.
    """

    name: str
    producers: tuple[str, ...]
    is_kind: Callable[[QLinear, Constants], bool]
    graph: str
    conditions: tuple[str, ...]
    test: str


@dataclass(frozen=True)
class Family:
    """Patterns that share their anchors and their algebra.

    anchors, steps, patterns: in the order in which they are tried.
    conditions: what has to hold for any of the patterns to be fused, for people.
    """

    name: str
    anchors: tuple[Anchor, ...]
    steps: tuple[Step, ...]
    patterns: tuple[Pattern, ...]
    conditions: tuple[str, ...] = ()

    def name_of(self, form: QLinear, constants: Constants) -> str:
        """Return the name of the first pattern that `form` is one of, or the family's while it has no scale."""
        if not form.scales:
            return self.name
        return next((p.name for p in self.patterns if p.is_kind(form, constants)), self.name)
