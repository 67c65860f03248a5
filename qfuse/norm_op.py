"""The canonical op of a norm with the quantization behind it.

`qfuse::norm_quantize_rows(x, weight, bias, eps, is_centered, dtype, program) -> values`
    v = (x − mean(x)) / √(mean((x − mean(x))²) + eps) · weight + bias for each row of x, [M, K] of any float dtype;
    without its mean if not is_centered, which is RMSNorm (Zhang & Sennrich 2019) instead of LayerNorm (Ba et al. 2016).
    weight and bias: [K] of any float dtype, or none. It is computed in float32 and rounded once, to `dtype`. Returns v
    and then what `qfuse::quantize_rows(v, program)` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfuse.quantize_op import quantize_rows_fake, quantize_rows_reference

_library = torch.library.Library("qfuse", "FRAGMENT")
_library.define(
    "norm_quantize_rows(Tensor x, Tensor? weight, Tensor? bias, float eps, bool is_centered, ScalarType dtype, "
    "str program) -> Tensor[]"
)


@torch.library.impl(_library, "norm_quantize_rows", "CompositeExplicitAutograd")
def norm_quantize_rows_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    is_centered: bool,
    dtype: torch.dtype,
    program: str,
) -> list[Tensor]:
    """Compute `qfuse::norm_quantize_rows`, operator by operator."""
    v = x.float()
    if is_centered:
        v = v - v.mean(-1, keepdim=True)
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        v = v * weight.float()
    if bias is not None:
        v = v + bias.float()
    v = v.to(dtype).contiguous()
    return [v, *quantize_rows_reference(v, program)]


@torch.library.register_fake("qfuse::norm_quantize_rows", lib=_library)
def _norm_quantize_rows_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    is_centered: bool,
    dtype: torch.dtype,
    program: str,
) -> list[Tensor]:
    v = x.new_empty(x.shape, dtype=dtype)
    return [v, *quantize_rows_fake(v, program)]
