"""Dynamic quantizations as producers write them: for the tests of the pass and of the kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import producers
import pytest
import torch
from support import Model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from qfuse.row_program import RowProgram

#: What the rewritten op is called where its outputs are taken in generated code, once a kernel.
KERNEL = "q::for_lanes(K"


class Quantized(nn.Module):
    """A linear behind a quantization that a test writes down.

    quantize: x, [..., K] → q int8 and the scale, [..., 1]; and the zero point, if there is one.
    """

    def __init__(self, quantize: Callable[..., tuple[Tensor, ...]], k: int = 67, n: int = 32) -> None:
        super().__init__()
        self.quantize, self.k = quantize, k
        self.register_buffer("w", producers.quantized(n, k))
        self.register_buffer("ws", torch.rand(n) / 100 + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        q, scale, *_ = self.quantize(x)
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * scale.float().reshape(-1, 1) * self.ws
        return y.reshape(*x.shape[:-1], -1)


def absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row absmax, as most write it."""
    scale = x.abs().amax(-1, True).float().clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplied by an inverse scale, rounded to the activation's dtype on the way."""
    scale = 127 / x.abs().amax(-1, True).clamp_min(1e-5)
    return (x * scale).round().clamp(-128, 127).to(torch.int8), 1 / scale


def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A comparison and a choice where a row is zero, and a maximum with its index."""
    largest = x.abs().max(-1, keepdim=True).values
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8), scale


def unsigned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Half-precision activations are converted first; integers, in the end."""
    v = x.float()
    scale = torch.maximum(v.amax(-1, True), -v.amin(-1, True)) / 127
    return (v * scale.reciprocal()).round().to(torch.int32).clamp(-127, 127).to(torch.int8), scale


def of_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """A reduction of what is computed from the elements, and not read off their bits."""
    largest = (x.float() * x.float()).amax(-1, True) + 1
    scale = largest / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def without_dimension(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced dimension is dropped, and put back later."""
    scale = (x.abs().amax(-1) / 127.5).float().clamp_min(1e-5)
    return (x * (1.0 / scale).unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8), scale.unsqueeze(-1)


def unrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers by truncation."""
    scale = x.abs().amax(-1, True) / 127
    return (x / scale).to(torch.int8), scale


WRITTEN = (absmax, inverse, guarded, unsigned, of_squares, without_dimension, unrounded)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRODUCERS = ("T4", "T7-torchao", "T7-torchao-reduced", "T10-torchao", "T13-torchao", "P12")


def compile_and_count(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """Compile and run; return the result, and the number of quantization kernels in the code."""
    torch._dynamo.reset()
    result, codes = run_and_get_code(torch.compile(model, **kwargs), *args)
    return result, sum(code.count('extern "C"\nvoid kernel(const') and code.count(KERNEL) for code in codes)


@contextlib.contextmanager
def parsed_programs() -> Iterator[list[str]]:
    """Note the programs that are parsed."""
    seen: list[str] = []
    parse = RowProgram.parse

    def noted(text: str) -> RowProgram:
        seen.append(text)
        return parse(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowProgram, "parse", noted)
        yield seen
