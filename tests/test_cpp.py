"""The C++ lowering: what Inductor fuses into it, on each instruction set that this machine has, and its functions."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from producers import quantized
from support import one_translation_unit, run_python
from test_lowerings import CASES, Linears, _assert_equal_up_to_order
from test_microkernels import _runs
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import fresh_cache, run_and_get_code

from qfuse.isa import Isa
from qfuse.lowerings.cpp import template
from qfuse.lowerings.cpp.fast_math import fast_math

K, N = 67, 130


class Followed(nn.Module):
    """A linear, and what a model does with its result."""

    def __init__(self, follow: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, n: int = N) -> None:
        super().__init__()
        self.follow, self.dtype = follow, dtype
        self.register_buffer("w", quantized(n, K))
        self.register_buffer("ws", torch.rand(n) / 400)
        self.register_buffer("b", torch.randn(n))

    def forward(self, x: Tensor, xs: Tensor, other: Tensor) -> Tensor:
        w, sums = torch.ops.qfuse.pack_int8_weight(self.w), torch.ops.qfuse.pack_column_sums(self.w)
        y = torch.ops.qfuse.int8_linear(x, w, sums, xs, self.ws, self.b, [], [], 128, self.dtype, "cpp")
        return self.follow(y, other)

    def inputs(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        return quantized(m, K, torch.uint8), torch.rand(m) / 20, torch.randn(m, self.w.shape[0]).to(self.dtype)


FOLLOWING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda y, _: F.gelu(y),
    "tanh gelu": lambda y, _: F.gelu(y, approximate="tanh"),
    "silu times": lambda y, other: F.silu(y) * other,
    "residual": lambda y, other: y + other,
    "gelu, reshape, residual": lambda y, other: F.gelu(y).view(1, *y.shape) + other[None],
    "relu squared": lambda y, _: F.relu(y) ** 2,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in FOLLOWING] + [("gelu", torch.float32), ("silu times", torch.float16)],
    ids=str,
)
def test_what_follows_is_fused(name: str, dtype: torch.dtype) -> None:
    """One kernel, no integers in memory, and no larger an error than the ops one by one."""
    model = Followed(FOLLOWING[name], dtype)
    inputs = model.inputs(37)
    with fresh_cache():
        result, (code,) = run_and_get_code(torch.compile(model), *inputs)
    assert len(re.findall(r"^cpp_fused\w+ = async_compile", code, re.M)) == 1
    assert "extern_kernels." not in code
    assert "torch.ops.qfuse" not in code
    assert "torch.int32" not in code.split("def call(")[1].split("runner =")[0]

    eager = model(*inputs)
    model.dtype = torch.float64
    exact = model(*inputs)
    slack = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (result.double() - exact).abs().max() <= 1.05 * (eager.double() - exact).abs().max() + slack
    assert result.dtype is dtype


@pytest.mark.parametrize(
    ("dtype", "stored", "rough"),
    [
        (torch.bfloat16, torch.bfloat16, "rough_"),
        (torch.float32, torch.bfloat16, "rough_"),  # as between a bfloat16 linear and its GELU
        (torch.float32, torch.float32, ""),
    ],
    ids=str,
)
def test_functions_are_chosen_by_what_is_stored(dtype: torch.dtype, stored: torch.dtype, rough: str) -> None:
    model = Followed(lambda y, _: (F.gelu(y) + torch.erf(y) + torch.sigmoid(y) + F.silu(y)).to(stored), dtype)
    with fresh_cache():
        _, (code,) = run_and_get_code(torch.compile(model), *model.inputs(5))
    used = set(re.findall(r"= qfuse::(\w*(?:gelu|erf|sigmoid|exp|div))\(", code))
    functions = ("gelu", "erf", "sigmoid", "exp") if rough else ("erf", "sigmoid", "exp")
    assert used == {f"{rough}{name}" for name in functions} | {"div"}
    assert bool(re.search(r"= qfuse::convert<(at::BFloat16|bfloat16)\b", code)) == (stored is torch.bfloat16)
    assert re.search(
        r"VectorizedN<int32_t,2>::loadu\(block( \+ static_cast<int64_t>\([^()]*\))?\)", code
    )  # all, not so many
    assert "Vectorized<int32_t>::loadu(block" not in code


AMPLIFYING: dict[str, Callable[[Tensor], Tensor]] = {
    "logarithm": lambda y: torch.log(1 - torch.exp(-F.relu(y)) + 1e-10),
    "comparison": lambda y: torch.where(torch.sigmoid(y) >= 0.5, y + 1, y - 1),
    "floor": lambda y: torch.floor(torch.sigmoid(y) + 0.5),
    "difference": lambda y: torch.exp(0.001 * y) - 1,
    "sum": lambda y: torch.exp(0.001 * y) + torch.tensor(-1.0),
    "root": lambda y: torch.sqrt(1 - torch.erf(y)),
    "gelu": F.gelu,
}


@pytest.mark.parametrize("name", AMPLIFYING)
def test_errors_are_not_amplified(name: str) -> None:
    """What follows may turn a small error of a function into a large one: at 0, and where GELU is almost 0."""
    function = AMPLIFYING[name]
    model = Followed(lambda y, other: function((y + other).float()).to(y.dtype), torch.bfloat16, n=64)
    x, xs, other = model.inputs(64)
    x.fill_(128)
    model.b.zero_()  # so that y is 0
    other[:] = torch.linspace(-6, 6, other.numel()).view(64, 64)
    other[0, ::2] = 0
    result, (code,) = run_and_get_code(torch.compile(model), x, xs, other)
    assert "qfuse::" in code
    eager, exact = model(x, xs, other), function(other.double())
    assert torch.equal(result.isfinite(), eager.isfinite())
    assert (result == eager)[0, ::2].all()
    seen = exact.isfinite()
    error, allowed = ((each.double() - exact).abs()[seen] for each in (result, eager))
    assert error.norm() <= 1.05 * allowed.norm()
    tail = other[seen] < -4.5
    assert error[tail].norm() <= 1.05 * allowed[tail].norm()


@pytest.mark.parametrize("isa", [isa for isa in Isa if _runs(isa)], ids=lambda isa: isa.name)
def test_instruction_sets(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of problem, by the kernels of each instruction set."""
    monkeypatch.setattr(template, "cpu_isa", lambda: isa)
    model = Linears([*CASES[::23], *(case for case in CASES if case.x_dtype is torch.int8)], 67, 70, "cpp")
    inputs = model.inputs(39, 67)
    with one_translation_unit(), fresh_cache():
        results, codes = run_and_get_code(torch.compile(model), *inputs)
    microkernel = template.MICROKERNELS[isa]
    for class_name in microkernel.class_names.values():
        assert f"using Microkernel = qfuse::{class_name};" in codes[0]
    for result, reference in zip(results, model(*inputs), strict=True):
        _assert_equal_up_to_order(result, reference)


@pytest.mark.parametrize(
    "isa", [isa for isa in (Isa.AVX_VNNI, Isa.AVX2, Isa.NONE) if _runs(isa)], ids=lambda isa: isa.name
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shorter_vectors(isa: Isa, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows, as on a CPU without AVX-512."""
    monkeypatch.setattr(template, "cpu_isa", lambda: isa)
    model = Followed(lambda y, other: F.gelu(y) + F.silu(y) * torch.tanh(other) + y / (other**2 + 1), dtype)
    inputs = model.inputs(37)
    with inductor_config.patch({"cpp.simdlen": 256}), fresh_cache():
        assert pick_vec_isa().nelements(torch.float32) == 8
        result, (code,) = run_and_get_code(torch.compile(model), *inputs)
    assert "= qfuse::div(" in code
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result, model(*inputs), **tolerance)


def test_one_compile_for_all_rows() -> None:
    model = Followed(FOLLOWING["gelu, reshape, residual"], torch.bfloat16)
    compiled = torch.compile(model, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (37, 2, 33, 200):
            inputs = model.inputs(m)
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads(threads: int) -> None:
    """Every grid of threads computes everything once, for one row and for many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Followed(FOLLOWING["residual"], torch.float32)
        compiled = torch.compile(model, dynamic=True)
        for m in (3000, 400, 70, 2, 1):
            inputs = model.inputs(m)
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", [isa for isa in Isa if _runs(isa)], ids=lambda isa: isa.name)
def test_split_k(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five threads and two panels: of few rows, two threads each take a part of K, whose tail is odd."""
    monkeypatch.setattr(template, "cpu_isa", lambda: isa)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        k = 2 * template.LEAST_K_OF_SPLIT + 53
        model = Linears([*CASES[::46], *(case for case in CASES[::3] if case.x_dtype is torch.int8)], k, 70, "cpp")

        def check(compiled: Callable[..., tuple[Tensor, ...]], m: int) -> None:
            inputs = model.inputs(m, k)
            for result, reference in zip(compiled(*inputs), model(*inputs), strict=True):
                _assert_equal_up_to_order(result, reference)

        with one_translation_unit(), fresh_cache():
            compiled, inputs = torch.compile(model), model.inputs(7, k)
            for tensor in inputs:
                if tensor.shape[0] == 7:
                    torch._dynamo.mark_dynamic(tensor, 0)
            _, (code,) = run_and_get_code(compiled, *inputs)
            assert code.count("splits = 2,") == code.count("using Microkernel = ") > 0
            with torch._dynamo.config.patch(error_on_recompile=True):
                for m in (2, 16, 17, 500):
                    check(compiled, m)
            for m in (0, 1):
                check(torch.compile(model), m)
    finally:
        torch.set_num_threads(before)


def test_splits_are_for_many_threads_and_long_k() -> None:
    least = template.LEAST_K_OF_SPLIT
    assert template.split_k(n=64, k=4 * least, threads=1) == 1
    assert template.split_k(n=130, k=4 * least, threads=5) == 1
    assert template.split_k(n=130, k=4 * least, threads=6) == 2
    assert template.split_k(n=64, k=2 * least - 1, threads=64) == 1
    assert template.split_k(n=0, k=least, threads=64) == 1
    assert template.split_k(n=64, k=4 * least, threads=64) == 4


def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give fewer; the others' shares are not left undone."""
    run_python(
        """
        import torch
        from test_cpp import FOLLOWING, Followed

        torch.set_grad_enabled(False)
        torch.set_num_threads(4)
        model = Followed(FOLLOWING["residual"], torch.float32)
        inputs = model.inputs(400)
        torch.testing.assert_close(torch.compile(model)(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
        """,
        OMP_THREAD_LIMIT="1",
    )


DIVISIONS = (lambda x: (x + 9) / x, lambda x: x / (x + 1), lambda x: (x * 1e30) / 1e-30, lambda x: 1e-30 / (x * 1e30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values(dtype: torch.dtype) -> None:
    """The template's functions: infinities, NaN, where they round to their limits, and what is between."""

    def each(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y, other: function(torch.where(y < 1e9, other, y))  # all of other, and the linear is needed

    values = [0.0, -0.0, 1e-30, -1e-30, 0.3, -0.6, 0.93, 1.0, -3.0, 4.0, 5.5, 12.0, -30.0, 87.0, 88.7, 89.0, -87.0]
    values += [-103.0, -104.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")]
    tolerance = 5e-7 if dtype is torch.float32 else 2**-7  # a unit in the last place: what is near a tie
    for function in (torch.exp, torch.erf, torch.tanh, torch.sigmoid, *DIVISIONS):
        model = Followed(each(function), dtype, n=64)
        x, xs, other = model.inputs(64)
        other[:] = torch.linspace(-6, 6, other.numel()).view(64, 64)
        other[0, : len(values)] = torch.tensor(values)
        result, expected = torch.compile(model)(x, xs, other), function(other.double()).to(dtype)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=1e-37, equal_nan=True)
        zero = expected == 0
        assert torch.equal(result[zero].signbit(), expected[zero].signbit())


def test_quotients_are_those_of_the_instruction() -> None:
    """To the bit, the sign of zero included, whatever is divided by what."""
    positive = torch.logspace(-44, 38, 28).double().float()
    others = torch.tensor([0.0, -0.0, 1.0, 3.0, 1e-18, 1e18, float("inf"), float("nan")])
    values = torch.cat([positive, -positive, others])
    model = Followed(lambda y, other: torch.where(y < 1e9, other, y) / other[:, :1], torch.float32, n=64)
    x, xs, other = model.inputs(64)
    for i in range(64):
        other[i] = values.roll(-i)
    result, (code,) = run_and_get_code(torch.compile(model), x, xs, other)
    assert "= qfuse::div(" in code
    expected = other / other[:, :1]
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(result.signbit() & ~result.isnan(), expected.signbit() & ~expected.isnan())


SCALARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda y, other: F.gelu(y) * (other[:, :1] * other[:, 1:2]),
    "by a constant": lambda y, other: y * y * (other[0, 0] * 2),
    "erf": lambda y, other: y * torch.erf(other[:, :1]),
    "quotient": lambda y, other: y * (other[:, :1] / other[:, 1:2]),
    "gelu": lambda y, other: y * F.gelu(other[:, :1]),
}


@pytest.mark.parametrize("name", SCALARS)
def test_functions_of_scalars(name: str) -> None:
    """One number for a whole row, or for all rows, is no vector, and has Inductor's own functions."""
    model = Followed(SCALARS[name], torch.bfloat16)
    inputs = model.inputs(5)
    with fresh_cache():
        result = torch.compile(model)(*inputs)
    torch.testing.assert_close(result, model(*inputs), rtol=0.05, atol=0.05)


ROOT = 0.7071067811865476

NOT_GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "another constant": lambda y: y * 0.5 * (torch.erf(y * 0.7071) + 1),
    "half of another": lambda y: (y + 2) * 0.5 * (torch.erf(y * ROOT) + 1),
    "erf of another": lambda y: y * 0.5 * (torch.erf((y + 2) * ROOT) + 1),
    "minus": lambda y: y * 0.5 * (torch.erf(y * ROOT) - 1),
    "a sum": lambda y: y * 0.5 + (torch.erf(y * ROOT) + 1),
    "not by half": lambda y: y * 0.25 * (torch.erf(y * ROOT) + 1),
    "tanh": lambda y: y * 0.5 * (torch.tanh(y * ROOT) + 1),
}


@pytest.mark.parametrize("name", NOT_GELU)
def test_what_is_not_gelu(name: str) -> None:
    """GELU's function replaces exactly its formula."""
    model = Followed(lambda y, _: NOT_GELU[name](y), torch.bfloat16)
    inputs = model.inputs(5)
    with fresh_cache():
        result, (code,) = run_and_get_code(torch.compile(model), *inputs)
    assert "= qfuse::rough_gelu(" not in code
    torch.testing.assert_close(result, model(*inputs), rtol=0.05, atol=0.05)


def test_rough_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order it is written, and where what it is made of is used otherwise."""
    monkeypatch.setattr(template, "fast_math", lambda stored, used: fast_math({torch.bfloat16}, {"erf"}))
    orders: list[Callable[[Tensor], Tensor]] = [
        F.gelu,
        lambda y: (1 + torch.erf(ROOT * y)) * (0.5 * y),
        lambda y: (1 + torch.erf(y * ROOT)) * (y * 0.5) + 0 * torch.erf(y * ROOT),
    ]
    specials = torch.tensor([0.0, -0.0, float("nan"), 1e30, -1e30, 1e-30, -1e-30])
    for order in orders:
        model = Followed(lambda y, other, f=order: f(torch.where(y < 1e9, other, y)), torch.float32, n=64)  # type: ignore[misc]
        x, xs, _ = model.inputs(1000)
        other = torch.linspace(-9, 9, 64000).view(1000, 64)
        other[0, : len(specials)] = specials
        result, (code,) = run_and_get_code(torch.compile(model), x, xs, other)
        assert "= qfuse::rough_gelu(" in code
        exact = (torch.special.ndtr(other.double()) * other.double()).float()
        torch.testing.assert_close(result, exact, rtol=2e-6, atol=1e-6, equal_nan=True)
        tail = (other < -3.5) & (other > -5)
        torch.testing.assert_close(result[tail], exact[tail], rtol=1.5e-3, atol=0)


def test_rough_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are rounded to bfloat16, they are far more exact than that."""
    monkeypatch.setattr(template, "fast_math", lambda stored, used: fast_math({torch.bfloat16}, {"erf"}))
    functions: list[tuple[str, Callable[[Tensor], Tensor], float]] = [
        ("erf", torch.erf, 2.5e-6),
        ("sigmoid", torch.sigmoid, 1e-6),
        ("exp", torch.exp, 7e-7),
    ]
    for name, function, tolerance in functions:
        model = Followed(lambda y, other, f=function: f(torch.where(y < 1e9, other, y)), torch.float32, n=64)
        x, xs, _ = model.inputs(1000)
        other = torch.linspace(-7, 7, 64000).view(1000, 64)
        result, (code,) = run_and_get_code(torch.compile(model), x, xs, other)
        assert f"= qfuse::rough_{name}(" in code
        torch.testing.assert_close(result, function(other.double()).float(), rtol=tolerance, atol=0)
