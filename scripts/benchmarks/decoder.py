"""A Llama-like decoder, written here rather than taken from transformers, so that every engine can run its decode step.

A step takes the keys and values of the tokens before as inputs and returns those of its own token: nothing is mutated,
all shapes are static, and any exporter understands it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Of a decoder."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 8
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 4096  # of the embedding; there is no head
    positions: int = 256

    @property
    def head(self) -> int:
        """Return the size of a head."""
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """As Llama's: computed in float32."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Return x divided by the root of its mean square, times the weight."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.q = nn.Linear(size.hidden, size.heads * size.head, bias=False)
        self.k = nn.Linear(size.hidden, size.kv_heads * size.head, bias=False)
        self.v = nn.Linear(size.hidden, size.kv_heads * size.head, bias=False)
        self.o = nn.Linear(size.heads * size.head, size.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and the keys and values of x's tokens."""
        q, k, v = (
            part.view(1, x.shape[1], -1, self.size.head).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x))
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
        groups = self.size.heads // self.size.kv_heads
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=past is None)
        return self.o(y.transpose(1, 2).reshape(1, x.shape[1], -1)), k, v


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and with a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(size.hidden), RMSNorm(size.hidden)
        self.attention = Attention(size)
        self.gate = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and the keys and values of x's tokens."""
        y, k, v = self.attention(self.attention_norm(x), cos, sin, past)
        x = x + y
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), k, v


class Decoder(nn.Module):
    """Layers of a decoder. forward: see `Prefill` and `Step`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden)
        frequencies = 10000.0 ** (-torch.arange(0, size.head, 2) / size.head)
        angles = torch.outer(torch.arange(size.positions).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def run(self, ids: Tensor, first: int, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the hidden states, and each layer's keys and values, of tokens from the position `first` on."""
        x = self.embedding(ids)
        cos, sin = self.cos[first : first + ids.shape[1]], self.sin[first : first + ids.shape[1]]
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, cos, sin, (past[2 * i], past[2 * i + 1]) if past else None)
            new += (k, v)
        return self.norm(x), *new


class Prefill(nn.Module):
    """All positions at once."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids: [1, positions]."""
        return self.decoder.run(ids, 0, ())


class Step(nn.Module):
    """The last position, after all others."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """ids: [1, 1]. past: each layer's keys and values, [1, kv heads, positions − 1, head]."""
        return self.decoder.run(ids, self.decoder.size.positions - 1, past)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with rotary positions."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
