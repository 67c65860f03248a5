"""The Inductor lowering of `qfuse::int8_linear`: a provider's matmul and, behind it, what no provider needs to know."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype

from qfuse.lowerings import by_name
from qfuse.provider import Provider

aten = torch.ops.aten
log = logging.getLogger("qfuse.lowerings")


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

    def lower(provider: Provider) -> ir.TensorBox:
        y = provider.matmul(x, weight, column_sums, w_scale, x_zero_point)
        y = lowerings[aten.mul.Tensor](y, _column(x_scale))
        for rows, columns in zip(offset_rows, offset_columns, strict=True):
            y = lowerings[aten.add.Tensor](y, lowerings[aten.mul.Tensor](_column(rows), columns))
        if bias is not None:
            y = lowerings[aten.add.Tensor](y, to_dtype(bias, torch.float32))
        return to_dtype(y, out_dtype)

    for name in dict.fromkeys((lowering, "aten")):
        try:
            return lower(by_name(name))
        except Exception:
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


def _column(rows: Any) -> ir.TensorBox:
    return lowerings[aten.view.default](rows, [-1, 1])
