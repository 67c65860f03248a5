"""The canonical op of attention.

`qfuse::attention(q, k, v, mask, is_causal, scale) -> out`
    softmax(q kᵀ · scale + mask) v. q: [B, H, M, D] of any float dtype; k, v: [B, H / G, N, D] of the same dtype, where
    a head of k and v serves G heads of q, in order. mask: none, or [B, H, M, N] or [M, N], each of them 1 where it is
    broadcast, of q's dtype or float32. is_causal: the first query sees the first key only, the second one two, and so
    on. scale: by default D^-0.5. A query that sees no key gets zeros. out: like `torch.empty_like(q)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("qfuse", "FRAGMENT")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale) -> Tensor")


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Compute `qfuse::attention` by ATen, which takes as many heads of k and v as of q."""
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q)  # ATen's op divides by zero
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    # ATen's op reads rows as if their elements were next to each other, wherever they are
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out: Tensor = flash(*rows, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
    return out if rows[0] is q else torch.empty_like(q).copy_(out)


@torch.library.register_fake("qfuse::attention", lib=_library)
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return torch.empty_like(q)
