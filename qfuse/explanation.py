"""`qfuse.explain`: what would be fused in a model, without compiling its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from qfuse.config import is_enabled
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import compile_like_inductor, freezing, with_fresh_code
from qfuse.records import recording
from qfuse.report import Report

OFF = "qfuse is switched off (QFUSE, qfuse.config.enabled)"


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Say which quantized linears of `model` are fused, how, and why the others are not.

    Traces and runs `model(*args, **kwargs)` once through Inductor's passes, in the caller's grad mode, without
    generating code: seconds, where a compile takes minutes. What was compiled before stays compiled.

    Raises:
        whatever the model itself raises.
    """

    # A function of its own, so that dynamo's cache of `model` is neither read nor written.
    @with_fresh_code
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    with freezing(), recording() as (matches, misses):
        torch.compile(call, backend=_trace_only)(*args, **kwargs)
    return Report(matches, misses, note="" if is_enabled() else OFF)


def _trace_only(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_like_inductor(
            gm, example_inputs, graph_pass=FUSION_PASS, mode=None, options=None, inner_compile=_interpret
        )


def _interpret(gm: GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
    """Stand in for Inductor's code generation: run the graph node by node."""

    def run(args: list[Any]) -> Any:
        return gm(*args)

    run._boxed_call = True  # type: ignore[attr-defined]  # called with one list, as Inductor's own output is
    return run
