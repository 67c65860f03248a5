"""The linears that are measured: quantized outside, quantized inside, and chains of them for one token."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from qfuse.isa import ACTIVATION_DTYPE, cpu_isa

ZERO_POINT = 128  # of an activation in uint8


@dataclass(frozen=True)
class Shape:
    """M rows, K features in, N out."""

    m: int
    k: int
    n: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read MxKxN.

        Raises:
            ValueError: the text is something else.
        """
        m, k, n = (int(size) for size in text.lower().replace("×", "x").split("x"))
        return cls(m, k, n)

    def __str__(self) -> str:
        return f"{self.m}×{self.k}×{self.n}"


@dataclass
class Subject:
    """One thing to measure, as an int8 model and as a bf16 model, each with its inputs.

    operations: integer operations of the matmuls. traffic: bytes of weights, activations and results of the int8 model,
    each moved once. weights: bytes of the int8 weights alone. int8_weights: [N, K] each, where the
    activations are quantized before.
    """

    int8: nn.Module
    int8_inputs: tuple[Tensor, ...]
    bf16: nn.Module
    bf16_inputs: tuple[Tensor, ...]
    reference: Tensor
    operations: int
    traffic: int
    weights: int
    int8_weights: list[Tensor] = field(default_factory=list)


class QuantizedLinear(nn.Module):
    """A linear as torchao 0.18 writes it, whose activation has been quantized before: int8, or uint8 around 128."""

    def __init__(self, k: int, n: int, dtype: torch.dtype, *, bias: bool, gelu: bool) -> None:
        super().__init__()
        self.dtype, self.gelu = dtype, gelu
        self.register_buffer("weight", torch.randint(-127, 128, (n, k), dtype=torch.int8))
        self.register_buffer("w_scale", torch.rand(n, 1) * (0.02 / k**0.5) + 0.001 / k**0.5)
        self.register_buffer("bias", torch.randn(n).to(dtype) if bias else None)

    def forward(self, x: Tensor, x_scale: Tensor) -> Tensor:
        """x: [M, K], x_scale: [M, 1] float32."""
        accumulator = torch._int_mm(x, self.weight.t())
        if x.dtype is torch.uint8:
            accumulator = accumulator - self.weight.t().sum(0, keepdim=True, dtype=torch.int32) * ZERO_POINT
        y = (accumulator.float() * x_scale).to(self.dtype) * self.w_scale.reshape(-1)
        if self.bias is not None:
            y = y + self.bias
        y = y.to(self.dtype)
        return F.gelu(y) if self.gelu else y

    def in_floats(self, dtype: torch.dtype) -> nn.Module:
        """Return the float linear that this is."""
        n, k = self.weight.shape
        linear = nn.Linear(k, n, bias=self.bias is not None)
        linear.weight.copy_(self.weight.float() * self.w_scale)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return nn.Sequential(linear, nn.GELU() if self.gelu else nn.Identity()).to(dtype)


class Separate(nn.Module):
    """Linears side by side, each with inputs of its own; the results one below the other."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: those of the first linear, then those of the second, and so on."""
        each = len(inputs) // len(self.linears)
        return tuple(linear(*inputs[i * each : (i + 1) * each]) for i, linear in enumerate(self.linears))


def activation_dtype() -> torch.dtype:
    """Return the signedness that the CPU is fast in."""
    return ACTIVATION_DTYPE.get(cpu_isa(), torch.int8)


def quantized_rows(m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an activation as if quantized symmetrically, in int8 or shifted into uint8, and the scale of each row."""
    q = torch.randn(m, k).mul_(32).round_().clamp_(-127, 127)
    return (q + (ZERO_POINT if dtype is torch.uint8 else 0)).to(dtype), torch.rand(m, 1) / 10 + 0.01


def dequantized(x: Tensor, x_scale: Tensor) -> Tensor:
    """Return the activation in float32."""
    return (x.float() - (ZERO_POINT if x.dtype is torch.uint8 else 0)) * x_scale


def quantized_outside(
    shapes: list[Shape], dtype: torch.dtype, *, bias: bool, gelu: bool, x_dtype: torch.dtype | None = None
) -> Subject:
    """Return a linear whose activation is quantized already, or several, each with an activation of its own.

    x_dtype: None for the signedness that the CPU is fast in.
    """
    linears = [QuantizedLinear(s.k, s.n, dtype, bias=bias, gelu=gelu) for s in shapes]
    inputs = [quantized_rows(s.m, s.k, x_dtype or activation_dtype()) for s in shapes]
    floats = [dequantized(*pair) for pair in inputs]
    reference = [linear.in_floats(torch.float32)(x) for linear, x in zip(linears, floats, strict=True)]
    return Subject(
        Separate(list(linears)),
        tuple(tensor for pair in inputs for tensor in pair),
        Separate([linear.in_floats(torch.bfloat16) for linear in linears]),
        tuple(x.bfloat16() for x in floats),
        flattened(reference),
        *_sizes(shapes, x_bytes=1, out=dtype),
        [linear.weight for linear in linears],
    )


def quantized_inside(shapes: list[Shape], dtype: torch.dtype, *, bias: bool, gelu: bool) -> Subject:
    """Return a chain of linears (or one) that torchao has quantized: each quantizes its activation itself."""
    layers: list[nn.Module] = []
    for s in shapes:
        layers += [nn.Linear(s.k, s.n, bias=bias), *([nn.GELU()] if gelu else [])]
        nn.init.normal_(layers[-2 if gelu else -1].weight, std=s.k**-0.5)
    model = nn.Sequential(*layers)
    x = torch.randn(shapes[0].m, shapes[0].k)
    reference = model(x)
    bf16_model = copy.deepcopy(model).bfloat16()
    int8_model = model.to(dtype)  # in place: a chain is large
    quantize_(int8_model, Int8DynamicActivationInt8WeightConfig())
    inputs = (x.to(dtype),)
    sizes = _sizes(shapes, x_bytes=dtype.itemsize, out=dtype)
    return Subject(int8_model, inputs, bf16_model, (x.bfloat16(),), flattened(reference), *sizes)


def moved(subject: Subject, device: str) -> Subject:
    """Return `subject` on a device; the reference stays where it is."""
    return replace(
        subject,
        int8=subject.int8.to(device),
        int8_inputs=tuple(tensor.to(device) for tensor in subject.int8_inputs),
        bf16=subject.bf16.to(device),
        bf16_inputs=tuple(tensor.to(device) for tensor in subject.bf16_inputs),
        int8_weights=[weight.to(device) for weight in subject.int8_weights],
    )


def flattened(results: Any) -> Tensor:
    """Return the values of a tensor or of several as one vector."""
    tensors = results if isinstance(results, (tuple, list)) else [results]
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])


def _sizes(shapes: list[Shape], *, x_bytes: int, out: torch.dtype) -> tuple[int, int, int]:
    """Return the operations, the traffic and the bytes of weights of `Subject`."""
    weights = sum(s.k * s.n for s in shapes)
    traffic = weights + sum(s.m * s.k * x_bytes + s.m * s.n * out.itemsize for s in shapes)
    return sum(2 * s.m * s.k * s.n for s in shapes), traffic, weights
