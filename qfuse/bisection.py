"""Leaving out single fusions, to find the one that is to blame for a wrong result."""

from __future__ import annotations

import itertools
import threading

from torch._inductor.compiler_bisector import CompilerBisector

from qfuse import config

_lock = threading.Lock()
_fusions = itertools.count()


def is_bisected_away(what: str) -> bool:
    """Tell whether the next fusion has to be left out, by `qfuse.config.fusion_limit` or by torch's compiler bisector.

    what: the fusion, in words, which the bisector prints when it has found the one to blame.
    """
    with _lock:
        number = next(_fusions)
    if 0 <= config.fusion_limit <= number:
        return True
    return bool(CompilerBisector.disable_subsystem("inductor", "joint_graph_passes", lambda: what))


def restart() -> None:
    """Count fusions from none again; `qfuse.reset_stats` does it."""
    global _fusions
    with _lock:
        _fusions = itertools.count()
