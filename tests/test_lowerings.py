"""Each lowering of `qfuse::int8_linear` against the reference, for every class of problem, and what really ran."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from producers import quantized
from support import linear_problem, one_translation_unit, run_python
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import qfuse
from qfuse.isa import ACTIVATION_DTYPE, Isa, best_isa, cpu_isa
from qfuse.lowerings import INT8_LINEAR, by_name, choose
from qfuse.lowerings.onednn import _packed, onednn_int8_matmul
from qfuse.reasons import Decline

#: oneDNN's matmul is left out where it is never chosen: without VNNI it saturates.
LOWERINGS = [p.name for p in INT8_LINEAR["cpu"] if p.supports(linear_problem()) is None]


@dataclass(frozen=True)
class Case:
    """A class of problems: sizes are set by the test."""

    x_dtype: torch.dtype
    out_dtype: torch.dtype
    x_zero_point: int
    x_scale: str  # "row" or "tensor"
    w_scale: str  # "column" or "tensor"
    bias: torch.dtype | None
    offsets: int = 0


CASES = [
    Case(*c)
    for c in itertools.product(
        [torch.uint8],
        [torch.float32, torch.bfloat16, torch.float16],
        [0, 128, 3],
        ["row", "tensor"],
        ["column", "tensor"],
        [None, torch.float32, torch.bfloat16],
    )
] + [Case(torch.int8, torch.float32, z, "row", "column", torch.float32) for z in (0, -5)]
CASES += [
    Case(torch.uint8, dtype, 128, "row", "column", bias, n)
    for dtype, bias, n in [
        (torch.float32, None, 1),
        (torch.bfloat16, torch.bfloat16, 2),
        (torch.float16, torch.float32, 1),
    ]
]


def as_wanted(weight: Tensor, lowering: str) -> Tensor:
    """Return the weight as the lowering takes it."""
    return torch.ops.qfuse.pack_int8_weight(weight) if by_name(lowering).packs_weight else weight


class Linears(nn.Module):
    """One `qfuse::int8_linear` for each case, all compiled together."""

    def __init__(self, cases: list[Case], k: int, n: int, lowering: str) -> None:
        super().__init__()
        self.cases, self.lowering = cases, lowering
        for i, case in enumerate(cases):
            self.register_buffer(f"w{i}", quantized(n, k))
            self.register_buffer(f"ws{i}", torch.rand(n if case.w_scale == "column" else 1) / 100)
            self.register_buffer(f"offsets{i}", torch.randn(case.offsets, n))
            self.register_buffer(f"b{i}", None if case.bias is None else torch.randn(n).to(case.bias))

    def inputs(self, m: int, k: int) -> list[Tensor]:
        return [
            tensor
            for case in self.cases
            for tensor in (quantized(m, k, case.x_dtype), torch.rand(m if case.x_scale == "row" else 1) / 10)
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = []
        for i, case in enumerate(self.cases):
            x, xs = inputs[2 * i : 2 * i + 2]
            w, ws, b = (
                self.get_buffer(f"{name}{i}") if name != "b" else getattr(self, f"b{i}") for name in ("w", "ws", "b")
            )
            sums = torch.ops.qfuse.pack_column_sums(w)
            w = as_wanted(w, self.lowering)
            columns = list(self.get_buffer(f"offsets{i}").unbind())
            rows = [xs.expand(x.shape[0]) * (j + 1) for j in range(case.offsets)]
            results.append(
                torch.ops.qfuse.int8_linear(
                    x, w, sums, xs, ws, b, rows, columns, case.x_zero_point, case.out_dtype, self.lowering
                )
            )
        return tuple(results)


def _assert_equal_up_to_order(result: Tensor, reference: Tensor) -> None:
    """The two differ by the order of two multiplications in float32, and by one rounding to the result's dtype."""
    assert result.dtype is reference.dtype
    assert result.shape == reference.shape
    tolerance = 4 * torch.finfo(torch.float32).eps + (
        torch.finfo(result.dtype).eps if result.dtype is not torch.float32 else 0
    )
    largest = reference.double().abs().max() if reference.numel() else torch.tensor(1.0)
    torch.testing.assert_close(result.double(), reference.double(), rtol=tolerance, atol=float(1e-6 * largest))


def _one_translation_unit(lowering: str) -> AbstractContextManager[None]:
    """Do what `one_translation_unit` does, where the kernels of `lowering` can be called from C++."""
    is_called_from_cpp = by_name(lowering).supports(linear_problem(called_from_python=False)) is None
    return one_translation_unit() if is_called_from_cpp else nullcontext()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_class_of_problem(lowering: str) -> None:
    """All of one activation and one weight, so that where it can Inductor makes few kernels of what follows."""
    model = Linears(CASES, 67, 33, lowering)
    inputs = model.inputs(19, 67)
    xs = {x.dtype: x for x in inputs[::2]}
    inputs[::2] = [xs[x.dtype] for x in inputs[::2]]
    for i in range(len(CASES)):
        model.register_buffer(f"w{i}", model.w0)
    with _one_translation_unit(lowering):
        results = torch.compile(model)(*inputs)
    for result, reference in zip(results, model(*inputs), strict=True):
        _assert_equal_up_to_order(result, reference)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_sizes(lowering: str, dynamic: bool) -> None:
    """Odd K and N, one row, one column, no rows, and more than one cache block."""
    case = Case(torch.uint8, torch.float32, 128, "row", "column", torch.float32)
    sizes = [(3, 1), (2, 5), (64, 48), (127, 129), (1030, 260)]
    if lowering != "aten":
        sizes += [(1, 1), (1, 5)]
    models = nn.ModuleList(Linears([case], k, n, lowering) for k, n in sizes)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(m(x, xs)[0] for m, x, xs in zip(models, inputs[::2], inputs[1::2], strict=True))

    compiled = torch.compile(run, dynamic=dynamic)
    for m in (5, 1, 0, 130) if dynamic else (1, 37):
        inputs = [t for (k, _), model in zip(sizes, models, strict=True) for t in model.inputs(m, k)]
        with _one_translation_unit(lowering):
            results = compiled(*inputs)
        for result, reference in zip(results, run(*inputs), strict=True):
            _assert_equal_up_to_order(result, reference)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_strides(lowering: str) -> None:
    """Activations, scales and weights in any layout."""

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w_columns", quantized(64, 48).t())
            self.register_buffer("w_slice", quantized(48, 128)[:, ::2])
            self.register_buffer("ws", torch.rand(96)[::2])

        def forward(self, x_columns: Tensor, x_slice: Tensor, xs: Tensor) -> tuple[Tensor, ...]:
            def linear(x: Tensor, w: Tensor) -> Tensor:
                sums = torch.ops.qfuse.pack_column_sums(w)
                w = as_wanted(w, lowering)
                return torch.ops.qfuse.int8_linear(x, w, sums, xs, self.ws, None, [], [], 128, torch.float32, lowering)

            return linear(x_columns, self.w_columns), linear(x_slice, self.w_slice), linear(x_slice, self.w_columns)

    model = Strided()
    u8 = torch.uint8
    inputs = quantized(64, 7, u8).t(), quantized(14, 192, u8)[::2, ::3], torch.rand(21)[::3]
    for result, reference in zip(torch.compile(model)(*inputs), model(*inputs), strict=True):
        _assert_equal_up_to_order(result, reference)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_which_kernel_is_called(lowering: str) -> None:
    case = Case(torch.uint8, torch.bfloat16, 128, "row", "column", torch.bfloat16)
    model = Linears([case], 64, 48, lowering)
    with fresh_cache():
        _, (*_, code) = run_and_get_code(torch.compile(model), *model.inputs(9, 64))
    assert code.count("extern_kernels.qfuse_onednn_int8_matmul(") == (lowering == "onednn")
    assert code.count("extern_kernels._int_mm(") == (lowering == "aten")
    assert code.count("Microkernel microkernel(K, ") == (lowering == "cpp")
    assert "torch.ops.qfuse.int8_linear.default(" not in code  # the reference


@pytest.mark.parametrize("broken", [("onednn",), ("onednn", "aten"), ("cpp",), ("cpp", "aten")], ids=str)
def test_a_failing_lowering_is_replaced(broken: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next one, and in the end by the reference op."""

    def fail(*args: object) -> None:
        raise RuntimeError("broken on purpose")

    case = Case(torch.uint8, torch.float32, 128, "row", "column", None)
    model = Linears([case], 61, 48, broken[0])  # K is padded where the weight is packed
    inputs = model.inputs(9, 61)
    for name in broken:
        monkeypatch.setattr(type(by_name(name)), "lower", fail)
    with fresh_cache():
        (result,), (*_, code) = run_and_get_code(torch.compile(model), *inputs)
    _assert_equal_up_to_order(result, model(*inputs)[0])
    assert ("extern_kernels._int_mm(" in code) == ("aten" not in broken)
    assert ("torch.ops.qfuse.int8_linear.default(" in code) == ("aten" in broken)


def test_packed_weight_lives_as_long_as_the_graph() -> None:
    before = len(_packed)
    weight = quantized(48, 64)
    sums = torch.ops.qfuse.pack_column_sums(weight)
    for _ in range(2):
        onednn_int8_matmul(quantized(3, 64, torch.uint8), weight, sums, torch.ones(48), 128)
    assert len(_packed) == before + 1
    del sums
    assert len(_packed) == before


def _chosen(**facts: object) -> str:
    choice = choose(linear_problem(**{"isa": Isa.AVX512_VNNI} | facts))
    return choice.reason if isinstance(choice, Decline) else choice.name


def test_choice() -> None:
    for isa in set(Isa) - {Isa.NONE}:
        assert _chosen(isa=isa) == "cpp"
    assert _chosen(isa=Isa.NONE) == "aten"
    assert _chosen(isa=Isa.NONE, k=1) == "cpp"
    assert _chosen(called_from_python=False) == "cpp"
    assert "not a constant" in _chosen(weight_is_constant=False)
    assert "none for device mps" in _chosen(device=torch.device("mps"))
    cuda = torch.device("cuda")
    assert _chosen(device=cuda, isa=Isa.NONE, m=1, k=63, weight_is_constant=False) == "triton"
    with qfuse.config.patch(disabled_lowerings=["triton"]):
        assert _chosen(device=cuda, isa=Isa.NONE, m=17, weight_is_constant=False) == "aten"
        assert "M > 16" in _chosen(device=cuda, isa=Isa.NONE, m=16)
        assert "divisible by 8" in _chosen(device=cuda, isa=Isa.NONE, m=17, k=63)
        assert "int8 activation" in _chosen(device=cuda, isa=Isa.NONE, m=17, x_dtype=torch.uint8)
    with qfuse.config.patch(disabled_lowerings=["cpp"]):
        assert _chosen() == "onednn"
        assert _chosen(called_from_python=False) == "aten"
        assert _chosen(isa=Isa.AVX2) == "aten"
        assert "K = 1" in _chosen(k=1, isa=Isa.NONE)
    with qfuse.config.patch(disabled_lowerings=["cpp", "onednn", "aten"]):
        assert _chosen().count("disabled by qfuse.config.disabled_lowerings") == 3


def test_signedness_by_isa() -> None:
    """uint8 where only VNNI is; where AMX is, oneDNN takes int8, and the C++ kernel what is there, as for AVX2."""
    onednn = by_name("onednn")
    assert onednn.activation_dtype(linear_problem(isa=Isa.AVX512_VNNI)) is torch.uint8
    assert onednn.activation_dtype(linear_problem(isa=Isa.AVX_VNNI)) is torch.uint8
    assert onednn.activation_dtype(linear_problem(isa=Isa.AMX)) is torch.int8
    for dtype in (torch.int8, torch.uint8):
        assert by_name("cpp").activation_dtype(linear_problem(isa=Isa.AVX512_VNNI, x_dtype=dtype)) is torch.uint8
        for isa in (Isa.AMX, Isa.AVX2):
            assert by_name("cpp").activation_dtype(linear_problem(isa=isa, x_dtype=dtype)) is dtype


@pytest.mark.parametrize(
    ("limit", "isa"),
    [
        ("", Isa.AMX),
        ("DEFAULT", Isa.AMX),
        ("no such limit", Isa.AMX),
        ("SSE41", Isa.NONE),
        ("AVX", Isa.NONE),
        ("AVX2", Isa.AVX2),
        ("AVX2_VNNI", Isa.AVX_VNNI),
        ("AVX2_VNNI_2", Isa.AVX_VNNI),
        ("AVX512_CORE", Isa.AVX2),
        ("AVX512_CORE_VNNI", Isa.AVX512_VNNI),
        ("AVX512_CORE_BF16", Isa.AVX512_VNNI),
        ("avx512_core_bf16", Isa.AVX512_VNNI),
        ("AVX512_CORE_FP16", Isa.AVX512_VNNI),
        ("AVX10_1_512", Isa.AVX512_VNNI),
        ("AVX512_CORE_AMX", Isa.AMX),
        ("AVX512_CORE_AMX_FP16", Isa.AMX),
        ("AVX10_1_512_AMX", Isa.AMX),
    ],
)
def test_isa_under_the_limit_of_onednn(limit: str, isa: Isa) -> None:
    everything = {each.value: True for each in Isa}
    assert best_isa(everything, {"ONEDNN_MAX_CPU_ISA": limit}) is isa
    assert best_isa(everything, {"DNNL_MAX_CPU_ISA": limit}) is isa
    assert best_isa({}, {"ONEDNN_MAX_CPU_ISA": limit}) is Isa.NONE
    assert best_isa(everything, {"ONEDNN_MAX_CPU_ISA": "AVX", "DNNL_MAX_CPU_ISA": limit}) is Isa.NONE


@pytest.mark.skipif(cpu_isa() not in ACTIVATION_DTYPE, reason="oneDNN has fast int8 only with VNNI or AMX")
@pytest.mark.parametrize("isa", ["", "AVX512_CORE_BF16", "AVX2_VNNI"])
def test_onednn_runs_no_reference_implementation(isa: str) -> None:
    """Every row of the producers', compiled and run, with oneDNN telling which implementation it chose."""
    limit = {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    if best_isa(torch.cpu.get_capabilities(), limit) not in ACTIVATION_DTYPE:
        pytest.skip(f"the CPU has nothing for int8 under {isa}")
    env = {"ONEDNN_VERBOSE": "1", "QFUSE_DISABLED_LOWERINGS": "cpp"} | limit
    code = """
        import torch, producers, qfuse
        with torch.no_grad():
            for row in producers.ROWS:
                for dtype in (torch.float32, torch.bfloat16):
                    torch._dynamo.reset()
                    model = row.make(48, 64, dtype, True)
                    torch.compile(model)(*model.inputs(7))
        assert sum(qfuse.stats().values()) == 2 * len(producers.ROWS), qfuse.stats()
    """
    lines = [line.split(",") for line in run_python(code, **env).stdout.splitlines()]
    implementations = {fields[6] for fields in lines if fields[3:6] == ["exec", "cpu", "matmul"]}
    assert implementations
    assert not [i for i in implementations if "ref" in i], implementations


class Bits(nn.Module):
    """A linear whose operands are in memory in other dtypes of the same width, and one that quantizes such floats."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", quantized(48, 64, torch.uint8))
        self.register_buffer("ws", torch.rand(48))

    def forward(self, x: Tensor, xs: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w_t, scale = self.w.view(torch.int8).t(), v.view(torch.bfloat16).abs().amax(1, keepdim=True).float() / 127
        q = (v.view(torch.bfloat16) / scale).round().clamp(-127, 127).to(torch.int8)
        return tuple(  # type: ignore[return-value]
            torch._int_mm(operand, w_t).float() * rows * self.ws
            for operand, rows in ((x.view(torch.int8), xs), (q, scale))
        )


@pytest.mark.parametrize("lowering", [provider.name for provider in INT8_LINEAR["cpu"]])
def test_bits_viewed_in_another_dtype(lowering: str) -> None:
    """A kernel that is handed a pointer to the buffer would misread them, or not compile."""
    others = [provider.name for provider in INT8_LINEAR["cpu"] if provider.name != lowering]
    inputs = quantized(7, 64, torch.uint8), torch.rand(7, 1), torch.randn(7, 64).bfloat16().view(torch.int16)
    model = Bits()
    with qfuse.config.patch(disabled_lowerings=others):
        result = torch.compile(model)(*inputs)
    for one, expected in zip(result, model(*inputs), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-4)
