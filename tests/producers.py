"""The graphs that producers emit, row by row of their documentation, as modules of a given size, dtype and bias.

`ROWS` lists those that have to fuse. Rows that torchao 0.18 emits on this machine come from torchao itself; the others
are written out, with the quantized activation and its scale as inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.out_dtype import out_dtype
from torch.nn import functional as F
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType


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
        """Return a quantized activation of shape (*rows, K) and its scale of shape (*rows, 1).

        For float16 the activation is small, so that producers which convert the accumulator as it is do not overflow.
        """
        m = int(torch.tensor(rows).prod())
        q = quantized(m, self.k) // (8 if self.dtype is torch.float16 else 1)
        return q.view(*rows, self.k), (torch.rand(*rows, 1) / 10 + 0.01).to(self.dtype)

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


class T3(Written):
    """torchao 0.7 to 0.17 on CUDA: no conversion of the accumulator; float16 goes through float32 scales."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        accumulator = torch._int_mm(q.reshape(-1, self.k), self.w.t())
        xs = xs.float() if self.dtype is torch.float16 else xs
        y = (accumulator * xs.reshape(-1, 1).expand(-1, self.n)).to(self.dtype) * self.ws
        return self.plus_bias(y.reshape(*q.shape[:-1], self.n))


class T9(T8):
    """torchao 0.18 on CUDA."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        accumulator = torch._int_mm(q.reshape(-1, self.k), self.w.t())
        p = (accumulator * xs.reshape(-1, 1).expand(-1, self.n)).to(self.dtype)
        return self.plus_bias((p * self.ws.reshape(-1)).reshape(*q.shape[:-1], self.n)).to(self.dtype)


class T6(Written):
    """torchao 0.17, version 2: it removes a zero point, which a symmetric activation does not have."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        m = q.reshape(-1, self.k).shape[0]
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).to(self.dtype) * xs.reshape(-1, 1).expand(-1, self.n)
        y = y - torch.full((m, 1), 0.0, device=q.device) * xs.reshape(-1, 1) * self.w.sum(-1).to(self.dtype)
        return self.plus_bias((y * self.ws).to(self.dtype).reshape(*q.shape[:-1], self.n))


class T16(Written):
    """torchao 0.7, SmoothQuant, static: a scalar scale, and an int64 zero point that is zero."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.register_buffer("xs", torch.tensor(0.03).to(dtype))
        self.register_buffer("zero_point", torch.tensor(0))

    def inputs(self, *rows: int) -> tuple[Tensor, ...]:
        return (torch.randn(*rows, self.k, dtype=self.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        q = ((x / self.xs).round() + self.zero_point).clamp(-128, 127).to(torch.int8)
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float()
        y = (y * self.xs.reshape(1, 1).expand(y.shape)).to(self.dtype) * self.ws
        return self.plus_bias(y.reshape(*x.shape[:-1], self.n))


class Negated(Written):
    """A producer that stores negative weights."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = -torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * xs.reshape(-1, 1) * self.ws
        return self.plus_bias(y.to(self.dtype)).reshape(*q.shape[:-1], self.n)


class T17(T2):
    """torchao up to 0.15, SmoothFakeDynamicallyQuantizedLinear: the weight may be stored transposed."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.register_buffer("w_t", self.w.t().contiguous())

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w_t).to(self.dtype) * xs.reshape(-1, 1) * self.ws
        return self.plus_bias(y.reshape(*q.shape[:-1], self.n))


class T18(Written):
    """torchao quantized training: the weight's scale first, no conversion."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()) * self.ws * xs.reshape(-1, 1)
        return self.plus_bias(y.reshape(*q.shape[:-1], self.n))


class P4(Written):
    """Per-row int8 in image pipelines: converted before the bias."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.ws = self.ws.float().view(n, 1)

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * xs.float().reshape(-1, 1) * self.ws.t()
        return self.plus_bias(y.to(self.dtype)).reshape(*q.shape[:-1], self.n)


class P9(P4):
    """Trainers that scale by the weight first."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * self.ws.t() * xs.float().reshape(-1, 1)
        return self.plus_bias(y.to(self.dtype)).reshape(*q.shape[:-1], self.n)


class Float(Written):
    """A float activation in, which forward quantizes; `scale` and `zero_point` are of rows or of nothing."""

    def inputs(self, *rows: int) -> tuple[Tensor, ...]:
        return (torch.randn(*rows, self.k, dtype=self.dtype),)


class T1(Written):
    """torchao up to 0.6, CPU: both operands dequantized, no integer matmul."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.register_buffer("zero_point", torch.zeros(n, dtype=torch.int64))

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        x = q.to(torch.int32).to(self.dtype) * xs
        w = (self.w.to(torch.int32) - self.zero_point.to(torch.int32).view(-1, 1)).to(self.dtype) * self.ws.view(-1, 1)
        return F.linear(x, w, self.b)


class T4(Float):
    """torchao 0.7 to 0.17, asymmetric activation: a zero point of rows, in float."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, True).clamp_max(0), x.amax(-1, True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps).to(torch.float32)
        zero_point = (-128 - (low / scale).round()).clamp(-128, 127).to(torch.int8)
        q = ((x * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)
        x = ((q.to(torch.float32) - zero_point.to(torch.float32)) * scale).to(self.dtype)
        return F.linear(x, self.w.to(self.dtype) * self.ws.view(-1, 1), self.b)


class T4Old(T4):
    """torchao 0.7 and 0.9: the zero point is int64, the scale float64."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, True).clamp_max(0), x.amax(-1, True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps).to(torch.float64)
        zero_point = (-128 - (low / scale).round()).clamp(-128, 127).to(torch.int64)
        q = ((x * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)
        x = ((q.to(torch.int32) - zero_point.to(torch.int32)).to(torch.float32) * scale).to(self.dtype)
        return F.linear(x, self.w.to(self.dtype) * self.ws.view(-1, 1), self.b)


class X1(Written):
    """torch_xla: an integer matmul of three dimensions, the weight's scale first."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch.matmul(q.to(torch.int32), self.w.t().to(torch.int32))
        return self.plus_bias((y * self.ws * xs).to(self.dtype))


class Einsum(X1):
    """The same, written with einsum and float operands that hold integers."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = torch.einsum("...k,nk->...n", q.float(), self.w.float()).to(torch.int32)
        return self.plus_bias((y * self.ws * xs).to(self.dtype))


class OutDtype(Written):
    """torchao's safe_int_mm on CPU, compiled: `out_dtype` of a float matmul."""

    def forward(self, q: Tensor, xs: Tensor) -> Tensor:
        y = out_dtype(torch.ops.aten.mm.default, torch.int32, q.reshape(-1, self.k).float(), self.w.t().float())
        return self.plus_bias((y * self.ws * xs.reshape(-1, 1)).to(self.dtype).reshape(*q.shape[:-1], self.n))


class P12(Float):
    """compressed-tensors, llm-compressor W8A8: quantized and dequantized without ever being int8."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, True) / 127.5
        x = (x / scale).clamp(-128, 127).round() * scale
        return F.linear(x, self.w.to(self.dtype) * self.ws.view(-1, 1), self.b)


class P12Static(Float):
    """The same with a calibrated scale and zero point."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.register_buffer("scale", torch.tensor([0.03]).to(dtype))
        self.register_buffer("zero_point", torch.tensor([5], dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        q = (x / self.scale + self.zero_point.to(self.dtype)).clamp(-128, 127).round()
        x = (q.to(self.dtype) - self.zero_point.to(self.dtype)) * self.scale
        return F.linear(x, self.w.to(self.dtype) * self.ws.view(-1, 1), self.b)


class P14(Float):
    """transformers, Gemma with static ranges: its own module, calibrated for the input."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        from transformers.integrations.gemma_quant import QuantizedLinear  # a second, which few processes need

        super().__init__(n, k, dtype, bias)
        self.linear = QuantizedLinear(k, n, bias).to(dtype)
        with torch.no_grad():
            self.linear.weight.copy_(self.w)
            self.linear.weight_scale.copy_(self.ws.view(-1, 1))
            self.linear.input_activation_scale.fill_(0.03)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


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


class Static(TorchAO):
    """torchao 0.18 with an activation scale, and zero point, that were calibrated before."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool, symmetric: bool = True) -> None:
        nn.Module.__init__(self)
        self.k, self.dtype = k, dtype
        self.linear = nn.Linear(k, n, bias=bias, dtype=dtype)
        mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=torch.tensor([[[0.03]]]),
            act_quant_zero_point=torch.tensor([[[0 if symmetric else 7]]], dtype=torch.int8),
            granularity=PerTensor(),
            act_mapping_type=mapping,
        )
        quantize_(self, config)

    def forward(self, x: Tensor) -> Tensor:
        # torchao calibrates for one rank of the activation; three dimensions here
        return self.linear(x) if x.dim() == 3 else self.linear(x[None])[0]


class Smooth(TorchAO):
    """torchao's SmoothQuant: the activation is multiplied by a scale of its columns before it is quantized."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__(n, k, dtype, bias)
        self.linear.weight.act_pre_scale = (torch.rand(k) + 0.5).to(dtype)


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


PER_TOKEN, PER_TENSOR, STATIC = "int8.dynamic_per_token", "int8.dynamic_per_tensor", "int8.static_per_tensor"

ROWS = (
    Row("T1", T1, PER_TOKEN),
    Row("T2", T2, PER_TOKEN),
    Row("T3", T3, PER_TOKEN),
    Row("T4", T4, PER_TOKEN + "_asymmetric"),
    Row("T4-float64", T4Old, PER_TOKEN + "_asymmetric"),
    Row("T5", T5, PER_TOKEN),
    Row("T6", T6, PER_TOKEN),
    Row("T7", T7, PER_TOKEN),
    Row("T7-torchao", _torchao(), PER_TOKEN),
    Row("T7-torchao-reduced", _torchao(reduce_range=True), PER_TOKEN),
    Row("T8", T8, PER_TOKEN),
    Row("T9", T9, PER_TOKEN),
    Row("T10-torchao", _torchao(act_mapping_type=MappingType.ASYMMETRIC), PER_TOKEN + "_asymmetric"),
    Row("T11-torchao", _torchao(granularity=[PerTensor(), PerRow()]), PER_TENSOR),
    Row("T12-torchao", _torchao(granularity=[PerRow(), PerTensor()]), PER_TOKEN),
    Row("T11+T12-torchao", _torchao(granularity=PerTensor()), PER_TENSOR),
    Row("T13-torchao", Smooth, PER_TOKEN),
    Row("T14-torchao", Static, STATIC),
    Row("T14-torchao-asymmetric", partial(Static, symmetric=False), STATIC),
    Row("T16-static", T16, STATIC),
    Row("T17", T17, PER_TOKEN),
    Row("T18", T18, PER_TOKEN),
    Row("P1/P2", P1, PER_TOKEN),
    Row("P4", P4, PER_TOKEN),
    Row("P9", P9, PER_TOKEN),
    Row("P12", P12, PER_TOKEN),
    Row("P12-static", P12Static, STATIC),
    Row("P14", P14, STATIC),
    Row("negated", Negated, PER_TOKEN),
    Row("X1", X1, PER_TOKEN),
    Row("einsum", Einsum, PER_TOKEN),
    Row("out_dtype", OutDtype, PER_TOKEN),
)
