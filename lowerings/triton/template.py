"""Handing the Triton kernel to Inductor as a template, so that pointwise nodes behind it are fused into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.kernel.mm_common import mm_grid, persistent_mm_grid
from torch._inductor.lowering import get_constant_value
from torch._inductor.select_algorithm import TritonTemplate, autotune_select_algorithm
from torch._inductor.utils import can_use_tma, get_num_sms
from torch._inductor.virtualized import V

from qfuse.lowerings.call import Int8LinearCall, in_memory
from qfuse.lowerings.triton.configurations import Configuration, Device, configurations, tma_configurations
from qfuse.lowerings.tuning import is_wanted

_HERE = Path(__file__).parent


def source(name: str) -> str:
    """Return the text of a template, and what all of them share in front of it."""
    return (_HERE / "macros.jinja").read_text() + (_HERE / name).read_text()


def _template(name: str, grid: Any, file: str) -> TritonTemplate:
    # Strides of the inputs are settled at once: there is no other kernel to fall back on if they change.
    return TritonTemplate(name, grid, source(file), always_freeze_layout=True)


_BY_POINTERS = _template("qfuse_int8_linear", mm_grid, "linear.py.jinja")
_BY_TMA = _template("qfuse_int8_linear_tma", persistent_mm_grid, "linear_tma.py.jinja")


def int8_linear(call: Int8LinearCall) -> Any:
    """Lower a linear whose weight is [N, K]."""
    call = call.with_activation(torch.int8)  # tensor cores multiply operands of one signedness
    scales_rows = not _is_number_one(call.x_scale)
    vectors = [call.x_scale] if scales_rows else []  # in the order of names in the template
    vectors += [call.w_scale]
    vectors += [call.column_sums] if call.x_zero_point else []
    vectors += [] if call.bias is None else [call.bias]
    for rows, columns in zip(call.offset_rows, call.offset_columns, strict=True):
        vectors += [rows, columns]
    x, weight = map(in_memory, (call.x, call.weight))
    nodes = [x, weight, *(ir.ExternKernel.require_contiguous(in_memory(v)) for v in vectors)]
    size = [x.get_size()[0], weight.get_size()[0]]
    layout = ir.FixedLayout(x.get_device_or_error(), call.out_dtype, size)
    choices: list[Any] = []
    for template, configuration, options in _candidates(x, weight):
        template.maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            num_stages=configuration.stages,
            num_warps=configuration.warps,
            BLOCK_M=configuration.m,
            BLOCK_N=configuration.n,
            BLOCK_K=configuration.k,
            GROUP_M=configuration.group,
            ACC_TYPE="tl.float32",  # of what is stored, not of the sums: they are scaled before
            X_ZERO_POINT=call.x_zero_point,
            HAS_X_SCALE=scales_rows,
            ONE_X_SCALE=_is_one(call.x_scale),
            ONE_W_SCALE=_is_one(call.w_scale),
            HAS_BIAS=call.bias is not None,
            ONE_BIAS=call.bias is not None and _is_one(call.bias),
            OFFSETS=len(call.offset_rows),
            ONE_COLUMNS=tuple(map(_is_one, call.offset_columns)),
            **options,
        )
    node, _ = autotune_select_algorithm("qfuse_int8_linear", choices, nodes, layout)
    return node


def _candidates(x: Any, weight: Any) -> list[tuple[TritonTemplate, Configuration, dict[str, Any]]]:
    """Return templates, tiles, and the template's options, to choose from: one, if nothing is to be measured."""
    m, k = x.get_size()
    n = weight.get_size()[0]
    rows, columns, depth = V.graph.sizevars.optimization_hints((m, n, k), fallback=1024)
    device = _device(x.get_device_or_error())
    found: list[tuple[TritonTemplate, Configuration, dict[str, Any]]] = [
        (_BY_POINTERS, c, {"EVEN_K": V.graph.sizevars.statically_known_multiple_of(k, c.k)})
        for c in configurations(rows, columns, depth, device)
    ]
    if not is_wanted():
        return found[:1]
    if _may_use_tma(x, weight):
        options = {"NUM_SMS": get_num_sms()}
        found += [(_BY_TMA, c, options) for c in tma_configurations(rows, columns, depth, device)]
    return found


def _may_use_tma(x: Any, weight: Any) -> bool:
    """Tell whether TMA can load tiles of both, and the user has switched it on, as for Inductor's own matmuls.

    It is off by default, in Inductor as here: Triton keeps descriptors in memory that Inductor provides in the context
    of a kernel's first call only, so that a compiled model cannot be called from another thread.
    """
    sizes = V.graph.sizevars
    return (
        inductor_config.triton.enable_persistent_tma_matmul
        and torch.version.hip is None
        and all(
            sizes.statically_known_equals(t.get_stride()[1], 1)
            and sizes.statically_known_multiple_of(t.get_stride()[0], 16)
            and sizes.statically_known_multiple_of(t.get_size()[1], 16)
            and sizes.statically_known_multiple_of(t.get_layout().offset, 16)
            and sizes.guard_or_false(sympy.Lt(t.get_size()[0], 2**31))  # coordinates are int32
            for t in (x, weight)
        )
        and can_use_tma(x, weight)
    )


def _device(device: torch.device) -> Device:
    """Return what decides about tiles on `device`, or the least there is where it is not known."""
    if device.type != "cuda":
        return Device()
    properties = torch.cuda.get_device_properties(device)
    # Of AMD's, torch tells only one limit.
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(shared_bytes, properties.multi_processor_count)


def _is_one(vector: Any) -> bool:
    """Tell whether one number stands for all."""
    return V.graph.sizevars.statically_known_equals(vector.get_size()[-1], 1)


def _is_number_one(scale: Any) -> bool:
    """Tell whether a scale is the number 1, as that of rows is where the activation's is static: in that of columns."""
    constant = get_constant_value(scale)
    return constant is not None and constant.value == 1
