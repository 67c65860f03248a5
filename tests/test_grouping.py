"""Linears that share an activation become one."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from producers import quantized
from support import assert_no_worse, compile_and_run, trace, without_amx
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import qfuse

K = 64


def int8(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = model.to(dtype).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


class Heads(nn.Module):
    """Query, key and value, of different sizes, the first and the last without a bias."""

    def __init__(self, sizes: tuple[int, ...] = (96, 70, 33)) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, n, bias=i == 1) for i, n in enumerate(sizes))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x).softmax(-1) for linear in self.linears]


class Returned(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


class Literal(nn.Module):
    """Constants that are no parameters, made where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(quantized(70, K), requires_grad=False) for _ in range(2))

    def forward(self, x: Tensor, xs: Tensor) -> list[Tensor]:
        scales = torch.tensor(0.02), torch.tensor(0.03)
        products = (torch._int_mm(x, w.t()).float() for w in (self.a, self.b))
        return [(y * xs * scale).softmax(-1) for y, scale in zip(products, scales, strict=True)]


class GateAndUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, 96), nn.Linear(K, 96)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


class TwoActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, 96), nn.Linear(K, 96)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x * 2 + 1)


def _linears(model: nn.Module, *args: Tensor) -> int:
    return trace(model, *args).after.count("qfuse.int8_linear.default")


@pytest.mark.parametrize(("dtype", "m"), [(torch.float32, 7), (torch.bfloat16, 1)], ids=str)
def test_grouped(dtype: torch.dtype, m: int) -> None:
    model, x = int8(Heads(), dtype), torch.randn(m, K, dtype=dtype)
    assert _linears(model, x) == 1
    results, report = compile_and_run(model, x)
    assert len(report.matches) == 3
    with qfuse.config.patch(group_linears=False):
        assert _linears(model, x) == 3
        alone, _ = compile_and_run(model, x)
    for result, expected in zip(results, alone, strict=True):
        assert torch.equal(result, expected)


def test_no_worse_than_the_graph() -> None:
    model = int8(Heads())
    for i in range(3):
        assert_no_worse(
            trace(model, x := torch.randn(9, K, dtype=torch.bfloat16)).result[i], lambda x, i=i: model(x)[i], x
        )


def test_kernels() -> None:
    """One to quantize, and one for all three linears: no op of ATen's or of ours, and no integers in memory."""

    class Attention(Heads):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.scaled_dot_product_attention(*(linear(x)[None, None] for linear in self.linears))

    model = int8(Attention((96, 96, 96)))
    # not every CPU has a kernel for attention
    with fresh_cache(), qfuse.config.patch(fuse_attention=False), without_amx():
        _, (*_, code) = run_and_get_code(torch.compile(model), torch.randn(9, K, dtype=torch.bfloat16))
    assert code.count("Microkernel microkernel(K, ") == 1
    body = code.split("def call(")[1].split("runner =")[0]
    assert "extern_kernels._int_mm" not in body
    assert "torch.int32" not in body
    assert "qfuse" not in body
    # what a name says between "fused" and the number depends on the signedness that the CPU takes
    calls = re.findall(r"^ +(cpp_fused)\w+(_\d+)\(", body, re.M)
    assert_expected_inline(
        "\n".join(map("".join, calls)),
        """\
cpp_fused_0
cpp_fused_1""",
    )


def test_a_fused_user_keeps_a_linear_alone() -> None:
    """Both halves of a gated unit are followed by pointwise operators, which are fused into their kernels."""
    assert _linears(int8(GateAndUp()), torch.randn(7, K, dtype=torch.bfloat16)) == 2


def test_other_activations_are_not_grouped() -> None:
    assert _linears(int8(TwoActivations()), torch.randn(7, K, dtype=torch.bfloat16)) == 2


def test_what_is_returned_has_the_strides_of_eager() -> None:
    model, x = int8(Returned()), torch.randn(7, K, dtype=torch.bfloat16)
    assert _linears(model, x) == 3
    assert [y.stride() for y in torch.compile(model)(x)] == [y.stride() for y in model(x)]


def test_constants_that_come_later() -> None:
    model, x, xs = Literal(), quantized(7, K), torch.rand(7, 1)
    results, report = compile_and_run(model, x, xs)
    assert len(report.matches) == 2
    for result, expected in zip(results, model(x, xs), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_disabled_lowering_is_not_grouped() -> None:
    with qfuse.config.patch(disabled_lowerings=["cpp"]):
        assert _linears(int8(Heads()), torch.randn(7, K, dtype=torch.bfloat16)) == 3
