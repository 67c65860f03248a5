"""The graphs that producers emit, row by row of their documentation, as modules of a given size, dtype and bias.

`ROWS` lists those that have to fuse. Rows that torchao 0.18 emits on this machine come from torchao itself; the others
are written out, with the quantized activation and its scale as inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, PerTensor, quantize_


def quantized(m: int, k: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Return random integers over the whole range of `dtype`."""
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, (m, k), dtype=dtype)


class Written(nn.Module):
    """A linear whose forward is a row's dequantization: int8 weight [N, K], one scale a channel, bias."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.n, self.k, self.dtype = n, k, dtype
        self.register_buffer("w", quantized(n, k))
        self.register_buffer("ws", torch.rand(n).to(dtype) / 100 + 0.001)
        self.register_buffer("b", torch.randn(n).to(dtype) if bias else None)

    def inputs(self, *rows: int) -> tuple[Tensor, ...]:
        """Return a quantized activation of shape (*rows, K) and its scale of shape (*rows, 1)."""
        m = int(torch.tensor(rows).prod())
        return quantized(m, self.k).view(*rows, self.k), (torch.rand(*rows, 1) / 10 + 0.01).to(self.dtype)

    def plus_bias(self, y: Tensor) -> Tensor:
        return y if self.b is None else y + self.b


class T2(Written):
    """torchao 0.7 to 0.17, version 1, symmetric, CPU."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).to(self.dtype)
        y = y * xs.reshape(-1, 1).expand(-1, self.n) * self.ws
        return self.plus_bias(y.reshape(*q.shape[:-1], self.n))


class T5(Written):
    """torchao 0.15 and 0.16, version 2: T2 with the weight's scale stored as [N, 1]."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.ws = self.ws.view(n, 1)

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).to(self.dtype)
        y = y * xs.reshape(-1, 1).expand(-1, self.n) * self.ws.reshape(-1)
        return self.plus_bias(y.reshape(*q.shape[:-1], self.n))


class T8(Written):
    """torchao 0.18, CPU with AMX or without VNNI."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.ws = self.ws.float().view(n, 1)

    def inputs(self, *rows: int) -> tuple[Tensor, ...]:
        q, xs = super().inputs(*rows)
        return q, xs.float()

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        d = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float()
        p = (d * xs.reshape(-1, 1)).to(self.dtype)
        return self.plus_bias((p * self.ws.reshape(-1)).reshape(*q.shape[:-1], self.n)).to(self.dtype)


class T7(T8):
    """torchao 0.18, CPU with VNNI and no AMX: T8 on an activation shifted to uint8."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        u = (q.reshape(-1, self.k).to(torch.int32) + 128).to(torch.uint8)
        compensation = self.w.t().sum(0, keepdim=True, dtype=torch.int32) * 128
        d = (torch._int_mm(u, self.w.t()) - compensation).float()
        p = (d * xs.reshape(-1, 1)).to(self.dtype)
        return self.plus_bias((p * self.ws.reshape(-1)).reshape(*q.shape[:-1], self.n)).to(self.dtype)


class P1(Written):
    """SDNQ: weight stored as [K, N] with stride (1, K); the bias, where there is one (P2), by addcmul."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.w = self.w.t()
        self.ws = self.ws.float().view(1, n)
        self.b = None if self.b is None else self.b.float()

    def inputs(self, *rows: int) -> tuple[Tensor, ...]:
        q, xs = super().inputs(*rows)
        return q, xs.float()

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w).float() * xs.reshape(-1, 1)
        y = y * self.ws if self.b is None else torch.addcmul(self.b, y, self.ws)
        return y.to(self.dtype).reshape(*q.shape[:-1], self.n)


class TorchAO(nn.Module):
    """A linear quantized by torchao itself: float activation in, float out."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool, **config: Any) -> None:
        super().__init__()
        self.k, self.dtype = k, dtype
        self.linear = nn.Linear(k, n, bias=bias, dtype=dtype)
        quantize_(self, Int8DynamicActivationInt8WeightConfig(**config))

    def inputs(self, *rows: int) -> tuple[Tensor, ...]:
        return (torch.randn(*rows, self.k, dtype=self.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class Row:
    """A producer's graph: how to make it, and the pattern that it has to match."""

    name: str
    make: Callable[[int, int, torch.dtype, bool], Any]
    pattern: str

    def __str__(self) -> str:
        return self.name


def _torchao(**config: Any) -> Callable[[int, int, torch.dtype, bool], Any]:
    return lambda n, k, dtype, bias: TorchAO(n, k, dtype, bias, **config)


PER_TOKEN, PER_TENSOR = "int8.dynamic_per_token", "int8.dynamic_per_tensor"

ROWS = (
    Row("T2", T2, PER_TOKEN),
    Row("T5", T5, PER_TOKEN),
    Row("T7", T7, PER_TOKEN),
    Row("T7-torchao", _torchao(), PER_TOKEN),
    Row("T7-torchao-reduced", _torchao(reduce_range=True), PER_TOKEN),
    Row("T8", T8, PER_TOKEN),
    Row("T11-torchao", _torchao(granularity=[PerTensor(), PerRow()]), PER_TENSOR),
    Row("T12-torchao", _torchao(granularity=[PerRow(), PerTensor()]), PER_TOKEN),
    Row("T11+T12-torchao", _torchao(granularity=PerTensor()), PER_TENSOR),
    Row("P1/P2", P1, PER_TOKEN),
)
