"""The fusion as a pass of Inductor: logged, traced, cacheable, and findable by torch's compiler bisector."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import getArtifactLogger
from torch.fx import Graph
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from qfuse import config
from qfuse.config import is_enabled
from qfuse.inductor import trace_json
from qfuse.isa import cpu_facts
from qfuse.records import publish
from qfuse.report import Report

log = logging.getLogger("qfuse")
matches_log = getArtifactLogger("qfuse", "qfuse_matches")


class FusionPass(CustomGraphPass):
    """Runs qfuse's passes on each joint graph.

    Linears, the quantization in front of them, norms in front of that, linears of one activation, and attention.
    """

    def __call__(self, graph: Graph) -> None:
        """Fuse the quantized linears of `graph` in place. Whatever goes wrong, the compile goes on without qfuse."""
        try:
            self._run(graph)
        except Exception:
            log.warning("qfuse failed and leaves the graph as it is. Please report this.", exc_info=True)

    def _run(self, graph: Graph) -> None:
        from qfuse import attention, fusion, grouping, norm, quantization

        _load_lowerings()
        try:
            if is_enabled():
                report: Report | None = _observed(graph, "qfuse.fuse", fusion.fuse)
                if report is not None:
                    _tell(report)
                if config.fuse_quantization:
                    _observed(graph, "qfuse.quantize", quantization.fuse_quantizations)
                if config.fuse_norms:
                    _observed(graph, "qfuse.norm", norm.fuse_norms)
                if config.group_linears:
                    _observed(graph, "qfuse.group", grouping.group_linears)
                if config.fuse_attention:
                    _observed(graph, "qfuse.attention", attention.fuse_attention)
        finally:  # whatever happens, Inductor's own patterns must not see what was not fused
            _observed(graph, "qfuse.shield", fusion.shield)

    def uuid(self) -> Any:
        """Return what the compile cache's key needs: any change of qfuse's source, options or CPU is another compile.

        Inductor asks for it also where a cached graph is loaded without this pass being run. That graph may call
        kernels which `qfuse.lowerings` registers, so they are registered here as well.
        """
        _load_lowerings()
        cpu = hashlib.sha256(cpu_facts().encode()).hexdigest()
        return f"qfuse-{source_hash()}-{config.get_hash().hex()}-{cpu}"

    def __deepcopy__(self, memo: object) -> FusionPass:
        return self  # Inductor copies the lists of passes that it reads; this pass is known by its identity


FUSION_PASS = FusionPass()


@functools.cache
def source_hash() -> str:
    """Hash every file of the package: a lowering changed under the same key would return the stale kernel."""
    import qfuse.lowerings
    import qfuse.patterns

    digest = hashlib.sha256()
    for package in (qfuse, qfuse.patterns, qfuse.lowerings):
        for file in sorted(Path(package.__path__[0]).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _load_lowerings() -> None:
    """Register the lowerings with Inductor: heavy, and needless before something is compiled."""
    import qfuse.lowerings.attention
    import qfuse.lowerings.int8_linear
    import qfuse.lowerings.quantize_rows  # noqa: F401


def _observed(graph: Graph, name: str, graph_pass: Callable[[Graph], Any]) -> Any:
    """Run a pass so that it is timed, and can be left out by its name: by option, or by torch's compiler bisector."""
    module = graph.owning_module
    if module is None:
        return graph_pass(graph)
    return GraphTransformObserver(module, name, subsystem="joint_graph_passes").apply_graph_pass(graph_pass)


def _tell(report: Report) -> None:
    publish(list(report.matches), list(report.misses))
    trace_json("qfuse_matches", report.to_json)
    log.info("%s", report.summary())
    for miss in report.misses:
        log.info(
            "not fused: %s %s: %s%s",
            miss.module or miss.anchor,
            miss.source,
            miss.reason,
            f" → {miss.hint}" * bool(miss.hint),
        )
    matches_log.debug("%s", report)
