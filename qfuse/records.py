"""What happened to each quantized matmul of a graph, for reports, logs and statistics."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.fx import Node

from qfuse import bisection, graph_text
from qfuse.inductor import is_traced
from qfuse.normal_form import QLinear
from qfuse.reasons import Decline

#: Where qfuse's own code is; `explain` stands on the stack of what it traces.
_PACKAGE = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Match:
    """A quantized linear that was fused.

    shape: M×K×N; a dynamic M as its symbol. dtypes: activation → output. module: the module's path in the model, or "".
    source: file:line of the call in the user's code, or "". before, after: the graph around it, a line a node; empty
    unless somebody is looking (`is_observed`).
    """

    pattern: str
    lowering: str
    shape: str
    dtypes: str
    module: str
    source: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Miss:
    """A quantized matmul that was not fused, and why.

    anchor: the operator and its name in the graph. pattern: the nearest pattern. hint: what to change, or "".
    node: where matching ended; node_source and code: its place in the user's code. step: the rule that declined, or "".
    module, source: of the anchor. chain: the graph from there to what uses the last node that matched, as in `Match`.
    """

    anchor: str
    pattern: str
    reason: str
    node: str
    hint: str
    module: str
    source: str
    step: str = ""
    node_source: str = ""
    code: str = ""
    chain: tuple[str, ...] = ()


def match_record(form: QLinear, pattern: str, lowering: str) -> Match:
    """Record that `form` was fused."""
    x, out = form.x_dtype, form.dtype
    return Match(
        pattern=pattern,
        lowering=lowering,
        shape=f"{form.m}×{form.k}×{form.n}",
        dtypes=f"{x} → {out}".replace("torch.", ""),
        module=_module(form.anchor),
        source=_source(form.anchor)[0],
    )


def miss_record(anchor: Node, pattern: str, decline: Decline, trail: Sequence[Node] = ()) -> Miss:
    """Record that the matmul `anchor` was not fused. trail: the nodes that matched."""
    node_source, code = ("", "") if decline.node is None else _source(decline.node)
    return Miss(
        anchor=f"{anchor.target} ({anchor.name})",
        pattern=pattern,
        reason=decline.reason,
        node=decline.node.name if decline.node is not None else "",
        hint=decline.hint,
        module=_module(anchor),
        source=_source(anchor)[0],
        step=decline.step,
        node_source=node_source,
        code=code,
        chain=graph_text.lines([*trail, *trail[-1].users]) if trail and is_observed() else (),
    )


def _module(node: Node) -> str:
    """Return the path of the innermost module around `node`, as in `model.get_submodule`."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ""
    # dynamo's source expression: L['self'].encoder.layer[0], with _modules['encoder'] here and there
    path = re.sub(r"^L\['\w+'\]", "", stack[-1][0])
    return re.sub(r"(?:\._modules)?\['?([^'\]]+)'?\]", r".\1", path).lstrip(".")


def _source(node: Node) -> tuple[str, str]:
    """Return file:line of the innermost frame of the user's code, and the code there."""
    frame = r'File "(.+)", line (\d+).*(?:\n(?! *File ")(.*))?'  # without code, where Python does not find the file
    frames = re.findall(frame, node.meta.get("stack_trace") or "")
    of_user = [(f"{path}:{line}", code.strip()) for path, line, code in frames if not path.startswith(_PACKAGE)]
    return of_user[-1] if of_user else ("", "")


class _Statistics:
    """Counts of fused linears by pattern, over all threads of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, matches: list[Match]) -> None:
        with self._lock:
            self._counts.update(m.pattern for m in matches)

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._counts.items()))

    def reset(self) -> None:
        with self._lock:
            self._counts.clear()


statistics = _Statistics()


def stats() -> dict[str, int]:
    """Return how many linears were fused by each pattern, in the whole process, since the last `reset_stats()`.

    Counted when a graph is matched. A graph that comes out of AOTAutograd's cache is not matched again, and not
    counted; under freezing that cache is not used.
    """
    return statistics.counts()


def reset_stats() -> None:
    """Set the counts of `stats()`, and that of `qfuse.config.fusion_limit`, back to none."""
    statistics.reset()
    bisection.restart()


_recorder: contextvars.ContextVar[tuple[list[Match], list[Miss]] | None] = contextvars.ContextVar("qfuse", default=None)


@contextlib.contextmanager
def recording() -> Iterator[tuple[list[Match], list[Miss]]]:
    """Collect the matches and misses of every graph that is compiled inside, in this thread."""
    lists: tuple[list[Match], list[Miss]] = ([], [])
    token = _recorder.set(lists)
    try:
        yield lists
    finally:
        _recorder.reset(token)


def is_observed() -> bool:
    """Tell whether somebody will look at records closely: then they hold the graph's text as well, which takes time."""
    return _recorder.get() is not None or is_traced()


def publish(matches: list[Match], misses: list[Miss]) -> None:
    """Hand the records of one graph to the recording in progress, or else to the statistics."""
    if (lists := _recorder.get()) is None:
        statistics.add(matches)
    else:
        lists[0].extend(matches)
        lists[1].extend(misses)
