"""The entry point of `torch.compile(model, backend="qfuse")`; torch imports it when that name is first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import _qfuse_autoload
import torch._dynamo

# Dynamo decides before any backend is called whether it hands over parameters as inputs or as constants that can be
# frozen. For Inductor it asks Inductor's options; for a backend there is this option alone, for the whole process.
_dynamo_config: Any = torch._dynamo.config
_dynamo_config._config["prepare_freezing"].default = True


def backend(gm: Any, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Compile like `backend="inductor"`, with qfuse on for this model only (see `qfuse.backend`)."""
    _qfuse_autoload.importing_for_backend = True
    try:
        from qfuse.backend import compile_graph
    finally:
        _qfuse_autoload.importing_for_backend = False
    return compile_graph(gm, example_inputs, **kwargs)
