"""LayerNorm and RMSNorm as models write them: for the tests of the pass and of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import producers
import torch
from support import Model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import qfuse

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: How the kernel is called in generated code.
KERNEL = "q::normalize<"


class Normed(nn.Module):
    """An int8 linear behind a norm that a test writes down, and what else is computed of the norm.

    norm: x, [..., K], weight and bias, [K] → [..., K]. is_used: the norm is returned as well.
    """

    def __init__(self, norm: Callable[..., Tensor], k: int = 67, is_used: bool = False) -> None:
        super().__init__()
        self.norm, self.k, self.is_used = norm, k, is_used
        self.register_buffer("w", producers.quantized(32, k))
        self.register_buffer("ws", torch.rand(32) / 100 + 0.01)
        self.register_buffer("weight", torch.rand(k) + 0.5)
        self.register_buffer("bias", torch.randn(k))

    def forward(self, x: Tensor) -> Any:
        v = self.norm(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        scale = v.abs().amax(-1, True).float().clamp(min=1e-5) / 127
        q = (v / scale).round().clamp(-127, 127).to(torch.int8)
        y = torch._int_mm(q.reshape(-1, self.k), self.w.t()).float() * scale.reshape(-1, 1) * self.ws
        y = y.reshape(*x.shape[:-1], -1)
        return (y, v) if self.is_used else y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def of_llama(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As transformers write it: rounded in front of the weight, which comes first."""
    v = _float(x)
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * v.to(x.dtype)


def of_gemma(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The weight is one more than what is stored, in float32; the square is a product."""
    v = _float(x)
    v = v * torch.rsqrt(1e-6 + (v * v).mean(-1, keepdim=True))
    return (v * (1.0 + _float(weight))).to(x.dtype)


def of_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Reshaped on the way, and back."""
    v = x.reshape(-1, x.shape[-1])
    return nn.functional.layer_norm(v, v.shape[-1:], weight, bias).reshape(x.shape)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In the activation's dtype."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return bias[None] + weight * (torch.rsqrt(variance + 1e-5) * (x - mean))


NORMS = (layer_norm, without_bias, plain, rms_norm, of_llama, of_gemma, of_rows, by_hand)


def assert_no_worse(model: Normed, x: Tensor) -> None:
    """Compare with float64, where nothing is quantized, beside what Inductor makes of the norm."""
    code, result = code_and_result(model, x)
    with qfuse.config.patch(fuse_norms=False):
        other_code, other = code_and_result(model, x)
    assert (code.count(KERNEL), other_code.count(KERNEL)) == (1, 0)
    assert_result_is_no_worse(result, other, model, x)


def assert_result_is_no_worse(result: tuple[Tensor, ...], other: tuple[Tensor, ...], model: Normed, x: Tensor) -> None:
    """Compare results that are there already, as `assert_no_worse` does."""
    v = model.norm(x.double(), *(t.to(x.dtype).double() for t in (model.weight, model.bias)))
    exact = v @ (model.w.double() * model.ws[:, None].double()).t(), v
    for got, beside, want in zip(result, other, exact, strict=True):
        assert got.dtype is beside.dtype
        assert error(got, want) <= 1.05 * error(beside, want) + torch.finfo(torch.float32).eps


def code_and_result(model: Model, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    torch._dynamo.reset()
    result, codes = run_and_get_code(torch.compile(model, **kwargs), *args)
    return "".join(codes), result


def error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()
