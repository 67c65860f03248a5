"""Handing the Triton kernel to Inductor as a template, so that pointwise nodes behind it are fused into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.kernel.mm_common import mm_grid
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.select_algorithm import TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V

from qfuse.lowerings.call import Int8LinearCall
from qfuse.lowerings.triton.configurations import Configuration, configurations
from qfuse.lowerings.tuning import is_wanted

_TEMPLATE = TritonTemplate(
    name="qfuse_int8_linear", grid=mm_grid, source=(Path(__file__).parent / "linear.py.jinja").read_text()
)


def int8_linear(call: Int8LinearCall) -> Any:
    """Lower a linear whose weight is [N, K]."""
    call = _signed(call)
    vectors = [call.x_scale, call.w_scale]  # and then as the template names them
    vectors += [call.column_sums] if call.x_zero_point else []
    vectors += [] if call.bias is None else [call.bias]
    for rows, columns in zip(call.offset_rows, call.offset_columns, strict=True):
        vectors += [rows, columns]
    x, weight = map(ir.ExternKernel.realize_input, (call.x, call.weight))
    nodes = [x, weight, *(ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(v)) for v in vectors)]
    m, k = x.get_size()
    n = weight.get_size()[0]
    layout = ir.FixedLayout(x.get_device_or_error(), call.out_dtype, [m, n])
    choices: list[Any] = []
    for configuration in _tried(m, layout.device):
        _TEMPLATE.maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            num_stages=configuration.stages,
            num_warps=configuration.warps,
            BLOCK_M=configuration.m,
            BLOCK_N=configuration.n,
            BLOCK_K=configuration.k,
            GROUP_M=configuration.group,
            EVEN_K=V.graph.sizevars.statically_known_multiple_of(k, configuration.k),
            ACC_TYPE="tl.float32",  # of what is stored, not of the sums: they are scaled before
            X_ZERO_POINT=call.x_zero_point,
            ONE_X_SCALE=_is_one(call.x_scale),
            ONE_W_SCALE=_is_one(call.w_scale),
            HAS_BIAS=call.bias is not None,
            ONE_BIAS=call.bias is not None and _is_one(call.bias),
            OFFSETS=len(call.offset_rows),
            ONE_COLUMNS=tuple(map(_is_one, call.offset_columns)),
        )
    node, _ = autotune_select_algorithm("qfuse_int8_linear", choices, nodes, layout)
    return node


def _signed(call: Int8LinearCall) -> Int8LinearCall:
    """Shift a uint8 activation to int8: tensor cores multiply operands of one signedness."""
    if call.x.get_dtype() is torch.int8:
        return call
    shifted = lowerings[torch.ops.aten.sub.Tensor](to_dtype(call.x, torch.int32), 128)
    return replace(call, x=to_dtype(shifted, torch.int8), x_zero_point=call.x_zero_point - 128)


def _tried(m: Any, device: torch.device) -> list[Configuration]:
    """Return the configurations to choose from: one, if nothing is to be measured."""
    limit = None
    if device.type == "cuda":
        limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    rows = V.graph.sizevars.optimization_hint(m, fallback=1024)
    found = [*configurations(rows, limit)]
    return found if is_wanted() else found[:1]


def _is_one(vector: Any) -> bool:
    """Tell whether one number stands for all."""
    return V.graph.sizevars.statically_known_equals(vector.get_size()[-1], 1)
