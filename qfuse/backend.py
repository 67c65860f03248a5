"""`torch.compile(model, backend="qfuse")`: Inductor with qfuse, for this model only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from qfuse.config import is_enabled
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import compile_like_inductor
from qfuse.memory import keep_freed_memory


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile `gm` with Inductor, qfuse and freezing, whatever `qfuse.enable` and `qfuse.disable` have set.

    mode, options: as of `torch.compile`. Freezing stays off where the user has decided so. With QFUSE=0 this is plain
    Inductor.

    Raises:
        RuntimeError: for a mode or an option that Inductor does not know.
    """
    graph_pass = FUSION_PASS if is_enabled() else None
    if graph_pass is not None:
        keep_freed_memory()
    return compile_like_inductor(gm, example_inputs, graph_pass=graph_pass, mode=mode, options=options)
