"""The entry point of `torch.compile(model, backend="qfuse")`; torch imports it when that name is first used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch._dynamo

import _qfuse_autoload

# Dynamo decides before any backend is called whether it hands over parameters as inputs or as constants that can be
# frozen. For Inductor it asks Inductor's options; for a backend there is this option alone, and it holds for the whole
# process: what is compiled for other backends is recompiled when a parameter is replaced by another object.
if os.environ.get("QFUSE", "1").lower() not in _qfuse_autoload.OFF:
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
