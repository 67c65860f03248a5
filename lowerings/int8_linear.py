"""The Inductor lowerings of `qfuse::int8_linear`, by the provider that was chosen, and of the ops beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering

from qfuse.lowerings import by_name
from qfuse.lowerings.call import Int8LinearCall

aten = torch.ops.aten
log = logging.getLogger("qfuse.lowerings")

_may_substitute = ContextVar("_may_substitute", default=True)


@contextmanager
def no_substitutes() -> Iterator[None]:
    """Let a lowering that fails raise, instead of being replaced by another, in this thread for a while."""
    token = _may_substitute.set(False)
    try:
        yield
    finally:
        _may_substitute.reset(token)


@register_lowering(torch.ops.qfuse.pack_column_sums.default, type_promotion_kind=None)
def pack_column_sums(weight: Any) -> ir.TensorBox:
    """Lower `qfuse::pack_column_sums` where freezing has not folded it."""
    return lowerings[aten.unsqueeze](lowerings[aten.sum.dim_IntList](weight, [1], dtype=torch.int32), 0)


@register_lowering(torch.ops.qfuse.int_mm.default, type_promotion_kind=None)
def int_mm(x: Any, weight_t: Any) -> ir.TensorBox:
    """Lower `qfuse::int_mm` as `aten._int_mm`."""
    return lowerings[aten._int_mm.default](x, weight_t)


@register_lowering(torch.ops.qfuse.mm.default, type_promotion_kind=None)
def mm(x: Any, weight_t: Any) -> ir.TensorBox:
    """Lower `qfuse::mm` as `aten.mm`."""
    return lowerings[aten.mm.default](x, weight_t)


@register_lowering(torch.ops.qfuse.addmm.default, type_promotion_kind=None)
def addmm(summand: Any, x: Any, weight_t: Any, *, beta: Any = 1, alpha: Any = 1) -> ir.TensorBox:
    """Lower `qfuse::addmm` as `aten.addmm`."""
    return lowerings[aten.addmm.default](summand, x, weight_t, beta=beta, alpha=alpha)


@register_lowering(torch.ops.qfuse.int8_linear.default, type_promotion_kind=None)
def int8_linear(
    x: Any,
    weight: Any,
    column_sums: Any,
    x_scale: Any,
    w_scale: Any,
    bias: Any | None,
    offset_rows: list[Any],
    offset_columns: list[Any],
    x_zero_point: int,
    out_dtype: torch.dtype,
    lowering: str,
) -> ir.TensorBox:
    """Lower `qfuse::int8_linear` by the provider chosen when the graph was matched, or else the reference."""
    call = Int8LinearCall(
        x, weight, column_sums, x_scale, w_scale, bias, offset_rows, offset_columns, x_zero_point, out_dtype
    )
    # What `aten._int_mm` refuses on GPUs, and gets wrong for K = 1, the reference computes.
    is_for_aten = x.get_device().type == "cpu" and x.get_size()[1] != 1
    for name in dict.fromkeys((lowering, "aten") if is_for_aten else (lowering,)):
        try:
            wanted = call if by_name(name).packs_weight == by_name(lowering).packs_weight else _unpacked(call)
            return by_name(name).lower(wanted)
        except Exception:
            if not _may_substitute.get():
                raise
            log.warning("lowering %s failed, another is used. Please report this.", name, exc_info=True)
    reference = fallback_handler(torch.ops.qfuse.int8_linear.default, add_to_fallback_set=False)
    return reference(
        x,
        weight,
        column_sums,
        x_scale,
        w_scale,
        bias,
        offset_rows,
        offset_columns,
        x_zero_point,
        out_dtype,
        lowering,
    )


def _unpacked(call: Int8LinearCall) -> Int8LinearCall:
    """Return `call` with the weight as [N, K], from what `qfuse::pack_int8_weight` made of it. Done in each call."""
    panels, groups, columns, four = call.weight.get_size()
    weight = lowerings[aten.permute.default](call.weight, [0, 2, 1, 3])
    weight = lowerings[aten.reshape.default](lowerings[aten.clone.default](weight), [panels * columns, groups * four])
    for dim, size in enumerate((call.column_sums.get_size()[1], call.x.get_size()[1])):
        weight = lowerings[aten.slice.Tensor](weight, dim, 0, size)
    return replace(call, weight=weight)
