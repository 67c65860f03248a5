"""Attention as models write it, and as it is called by itself: for the tests of the pass and of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_


class Block(nn.Module):
    """Attention as models write it: heads of 32 between linears, keys and values shared by pairs of heads."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.attend, self.sizes = attend, (heads, kv_heads, kv_heads)
        self.projections = nn.ModuleList(nn.Linear(64, 32 * n, bias=False) for n in self.sizes)
        self.out = nn.Linear(32 * heads, 64, bias=False)

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, n, 32).transpose(1, 2)
            for projection, n in zip(self.projections, self.sizes, strict=True)
        )
        y = self.attend(q, k, v, *mask)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


def int8(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = model.bfloat16().eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def repeat_kv(x: Tensor, groups: int = 2) -> Tensor:
    """As transformers repeats heads."""
    batch, heads, tokens, size = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, size).reshape(batch, heads * groups, tokens, size)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v))


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask, scale=0.3)


def tokens(count: int = 9) -> Tensor:
    return torch.randn(2, count, 64, dtype=torch.bfloat16)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Compute attention in float64; what sees no key is 0, as in ATen."""
    q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(unseen, 0).softmax(-1).masked_fill(unseen, 0) @ v


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Run the compiled kernel, with symbolic sizes."""
    torch._dynamo.reset()
    keep_head_size(q, k, v)
    return compiled(q, k, v, mask, is_causal, scale)


def keep_head_size(*tensors: Tensor) -> None:
    """Have Dynamo take the size of a head for a constant, as in models, where all else is symbolic."""
    for tensor in tensors:
        torch._dynamo.mark_static(tensor, 3)


@torch.compile(dynamic=True)
def compiled(*args: Any) -> Tensor:
    return torch.ops.qfuse.attention(*args)


def heads(batch: int, count: int, rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(batch, rows, count, size).to(dtype).transpose(1, 2)


def _strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(result: Tensor, *args: Any) -> None:
    """Compare the error with that of ATen's op."""
    reference, true = torch.ops.qfuse.attention(*args), exact(*args)
    assert _strides(result) == _strides(reference)
    error, allowed = (result - true).norm(), 1.05 * (reference - true).norm()
    # in float32 both are a few ulp, and which order of sums is luckier is chance
    chance = torch.finfo(result.dtype).eps / (4 if result.dtype is torch.float32 else 64)
    assert error <= allowed + chance * true.norm()
