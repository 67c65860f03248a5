"""The kernels of `qfuse::attention`: that they compute what ATen's does, as exactly, and that they are what runs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import Block, check, compiled, heads, int8, interleaved, keep_head_size, plain, run, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import at_end_of_page, calls_of_kernels, compile_together, run_python
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import qfuse
from qfuse.lowerings import attention as lowering

needs_avx512 = pytest.mark.skipif(not lowering._has_avx512(), reason="this machine has no AVX-512")
needs_any = pytest.mark.skipif(not (lowering._has_avx512() or lowering._has_avx2()), reason="this machine has no AVX2")


#: batch, heads, heads of keys, queries, keys, size of a head
SIZES = [
    (3, 2, 1, 5, 3, 64),
    (2, 6, 3, 600, 513, 64),
    (1, 16, 4, 1, 256, 64),
    (1, 2, 1, 9, 4500, 64),
    (2, 4, 2, 33, 65, 80),
    (2, 4, 1, 7, 300, 20),
    (1, 2, 1, 5, 70, 256),
]


AMX, AVX512, AVX512_BF16, AVX2 = "AMX", "AVX-512", "AVX-512 BF16", "AVX2"


def widest_dtype(kernel: str) -> torch.dtype:
    return torch.float32 if kernel in (AVX512, AVX2) else torch.bfloat16


@pytest.fixture(params=[AMX, AVX512, AVX512_BF16, AVX2])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel that runs, whether it would be chosen or not."""
    has = torch.cpu.get_capabilities().get
    chosen, runs = {
        AMX: (lowering._AMX, lowering._has_amx()),
        AVX512: (lowering._AVX512, lowering._has_avx512()),
        AVX512_BF16: (lowering._AVX512_BF16, lowering._has_avx512() and has("avx512_bf16")),
        AVX2: (lowering._AVX2, has("avx2")),
    }[request.param]
    if not runs:
        pytest.skip("this machine has not the instructions")
    monkeypatch.setattr(lowering, "kernel_for", lambda q, k: chosen)
    monkeypatch.setattr(lowering, "_reference", None)  # which would run if the kernel failed
    torch._dynamo.reset()
    with fresh_cache():
        yield request.param


@needs_any
def test_elements_that_lie_apart() -> None:
    """The result has q's strides, and the kernel stores rows of elements: this is ATen's."""
    q = torch.randn(2, 4, 32, 70).bfloat16().transpose(2, 3)
    k, v = heads(2, 4, 70, 32), heads(2, 4, 70, 32)
    torch._dynamo.reset()
    with fresh_cache():
        result, (code,) = run_and_get_code(torch.compile(torch.ops.qfuse.attention), q, k, v, None, False, None)
    assert "qfuse.attention.default(" in code
    check(result, q, k, v, None, False, None)


def _check_together(cases: list[tuple[Any, ...]], kernel: str, subtests: pytest.Subtests, *, dynamic: bool) -> None:
    """Check the operator with each case's arguments, all compiled together, each into a kernel."""
    for case in cases:
        keep_head_size(*case[:3])
    results, code = compile_together([torch.ops.qfuse.attention] * len(cases), cases, dynamic=dynamic)
    assert calls_of_kernels(kernel, code) == len(cases)
    for result, (q, k, v, mask, *options) in zip(results, cases, strict=True):
        with subtests.test(q=q.shape, k=k.shape, mask=None if mask is None else mask.shape, options=options):
            check(result, q, k, v, mask, *options)


@pytest.mark.usefixtures("kernel")
class TestKernel:
    @pytest.mark.parametrize(
        ("kernel", "dtype"),
        [
            (AMX, torch.bfloat16),
            (AVX512_BF16, torch.bfloat16),
            (AVX512, torch.float32),
            (AVX512, torch.bfloat16),
            (AVX512, torch.float16),
            (AVX2, torch.float32),
            (AVX2, torch.bfloat16),
            (AVX2, torch.float16),
        ],
        ids=str,
        indirect=["kernel"],
    )
    def test_numbers(self, kernel: str, dtype: torch.dtype, subtests: pytest.Subtests) -> None:
        torch.manual_seed(0)
        is_narrow = kernel in (AVX512, AVX2) and dtype is not torch.float32  # of a kernel that has all cases in float32
        cases: list[tuple[Any, ...]] = []
        for batch, count, shared, queries, keys, size in SIZES:
            rows = max(queries, 70) if dtype is torch.float32 else queries  # it would not be chosen for fewer
            q = heads(batch, count, rows, size, dtype)
            k, v = heads(batch, shared, keys, size, dtype), heads(batch, shared, keys, size, dtype)
            of_columns = torch.rand(batch, 1, 1, keys).log().to(dtype)
            of_rows = torch.randn(1, count, rows, 1).to(dtype)
            # a negative scale only where all keys are seen: ATen multiplies −∞ by it
            masks = [
                (None, True, None),
                (torch.randn(rows, keys), False, -0.3),
                (of_columns, False, 0.2),
                (torch.randn(keys, rows).t(), True, None),
                (of_rows, False, None),
            ]
            some = masks[:2] if size != 64 else masks[2:3] if is_narrow else masks
            cases += [(q, k, v, *mask) for mask in some]
        _check_together(cases, "qfuse::attend<qfuse::", subtests, dynamic=True)

    def test_many_keys(self, kernel: str) -> None:
        """Sums of values that do not cancel out: of all keys, they are as exact as ATen's."""
        torch.manual_seed(0)
        dtype = widest_dtype(kernel)
        for q in (heads(1, 1, 64, 64, dtype), torch.zeros(1, 1, 64, 64, dtype=dtype)):
            k, v = heads(1, 1, 8192, 64, dtype), heads(1, 1, 8192, 64, dtype).abs()
            check(run(q, k, v), q, k, v, None, False, None)

    def test_large_scores(self, kernel: str) -> None:
        """Scaled and masked with one rounding, as in ATen; the scale is no power of two."""
        dtype = widest_dtype(kernel)
        torch.manual_seed(0)
        q, k, v = heads(8, 4, 70, 8, dtype) + 5, heads(8, 4, 17, 8, dtype) + 5, heads(8, 4, 17, 8, dtype)
        mask = torch.randn(8, 1, 70, 17)
        check(run(q, k, v, mask), q, k, v, mask, False, None)

    def test_one_compile_for_all_sizes(self) -> None:
        """Sizes are symbols of the kernel."""
        torch.manual_seed(0)
        run(heads(2, 6, 5, 64), heads(2, 3, 7, 64), heads(2, 3, 7, 64))  # no two sizes alike: they would stay so
        with torch.compiler.set_stance("fail_on_recompile"):
            some = [(4, 6, 40, 9), (5, 6, 2, 700), (2, 6, 129, 130)]
            # any number of rows in the last block: 3 times as many as queries of a head
            for batch, count, rows, keys in some + [(2, 9, rows, 30) for rows in range(3, 35)]:
                q, k, v = heads(batch, count, rows, 64), heads(batch, 3, keys, 64), heads(batch, 3, keys, 64)
                check(compiled(q, k, v, None, False, None), q, k, v, None, False, None)

    def test_no_queries_or_keys(self) -> None:
        """ATen's op divides by zero; its caller, the reference, does not."""
        for batch, queries, keys in ((2, 0, 5), (0, 3, 5), (2, 3, 0)):
            q, k, v = heads(batch, 4, queries, 32), heads(batch, 4, keys, 32), heads(batch, 4, keys, 32)
            for result in (run(q, k, v), torch.ops.qfuse.attention(q, k, v, None, False, None)):
                assert torch.equal(result, torch.zeros_like(q))

    def test_rows_that_see_nothing(self) -> None:
        q, k, v = heads(1, 2, 40, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
        mask = torch.zeros(40, 300)
        mask[3] = -torch.inf
        mask[5, :290] = -torch.inf
        result = run(q, k, v, mask)
        assert result[:, :, 3].eq(0).all()
        check(result, q, k, v, mask, False, None)

    def test_mask_of_zeros(self) -> None:
        """As models write it where nothing is padded: it is left out, if it is zero for all keys of a block of rows."""
        q, k, v = heads(2, 2, 40, 32), heads(2, 2, 300, 32), heads(2, 2, 300, 32)
        mask = torch.zeros(2, 1, 40, 300)
        assert torch.equal(run(q, k, v, mask), run(q, k, v))
        mask[0, 0, 39, 299], mask[1, 0, 0, 3] = 5.0, -torch.inf
        check(run(q, k, v, mask), q, k, v, mask, False, None)

    @pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e10, -1e30])
    def test_rows_masked_by_the_least_number(self, least: float) -> None:
        """As models write masks: all keys weigh the same then."""
        q, k, v = heads(1, 2, 40, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
        mask = torch.zeros(40, 300)
        mask[3], mask[7, 9:], mask[9, :270] = least, least, least  # the last: padding before 256 keys and more
        result = run(q, k, v, mask)
        check(result, q, k, v, mask, False, None)
        assert result.isfinite().all()

    def test_nan_and_infinity(self) -> None:
        """What is no number stays in its row, as in ATen."""
        q, k, v = heads(1, 2, 40, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
        q[0, 0, 3, 5], q[0, 1, 4, 6] = torch.nan, torch.inf
        result, reference = run(q, k, v), torch.ops.qfuse.attention(q, k, v, None, False, None)
        assert torch.equal(result.isnan(), reference.isnan())

    def test_nan_and_infinity_in_every_operand(self, kernel: str) -> None:
        """And in its head, or its column."""
        dtype = widest_dtype(kernel)
        q, k, v = heads(1, 4, 40, 32, dtype), heads(1, 4, 300, 32, dtype), heads(1, 4, 300, 32, dtype)
        mask = torch.zeros(40, 300)
        q[0, 0, 3, 5], q[0, 1, 4, 6], k[0, 2, 299, 3], v[0, 3, 280, 7] = torch.nan, torch.inf, torch.nan, torch.inf
        mask[9, 290] = torch.nan
        result, reference = run(q, k, v, mask), torch.ops.qfuse.attention(q, k, v, mask, False, None)
        assert torch.equal(result.isnan(), reference.isnan())

    def test_strides(self) -> None:
        """Slices of one buffer, broadcast keys, and elements that are not next to each other."""
        torch.manual_seed(0)
        together = torch.randn(2, 20, 12, 32, dtype=torch.bfloat16)

        @torch.compile
        def of_slices(x: Tensor) -> Tensor:
            q, k, v = (x[:, :, i : i + 4].transpose(1, 2) for i in (0, 4, 8))
            return torch.ops.qfuse.attention(q, k, v, None, False, None)

        q, k, v = (together[:, :, i : i + 4].transpose(1, 2) for i in (0, 4, 8))
        check(of_slices(together), q, k, v, None, False, None)
        k = torch.randn(1, 1, 20, 32, dtype=torch.bfloat16).expand(2, 4, -1, -1)
        v = torch.randn(2, 4, 32, 20, dtype=torch.bfloat16).transpose(2, 3)
        check(run(q, k, v), q, k, v, None, False, None)

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        batch=st.integers(1, 3),
        shared=st.integers(1, 3),
        groups=st.integers(1, 3),
        rows=st.integers(1, 70),
        keys=st.integers(1, 600),
        is_causal=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_any_sizes(
        self, batch: int, shared: int, groups: int, rows: int, keys: int, is_causal: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        q, k, v = (
            heads(batch, shared * groups, rows, 32),
            heads(batch, shared, keys, 32),
            heads(batch, shared, keys, 32),
        )
        keep_head_size(q, k, v)
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            check(compiled(q, k, v, None, is_causal, None), q, k, v, None, is_causal, None)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_threads(self, threads: int) -> None:
        """Each item of work is done once, whoever does it; queries over several windows of keys."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            q, k, v = heads(1, 4, 600, 256), heads(1, 2, 600, 256), heads(1, 2, 600, 256)
            check(run(q, k, v, None, True), q, k, v, None, True, None)
        finally:
            torch.set_num_threads(before)

    def test_nothing_is_read_beyond_operands(self, kernel: str) -> None:
        dtype = widest_dtype(kernel)
        shapes = (1, 2, 41, 20), (1, 2, 35, 20), (1, 2, 35, 20)
        q, k, v = (at_end_of_page(torch.randn(shape).to(dtype)) for shape in shapes)
        for mask in (torch.randn(41, 35), torch.zeros(41, 35)):
            args = q, k, v, at_end_of_page(mask.to(dtype)), False, None
            check(run(*args), *args)

    def test_other_orders_of_queries(self) -> None:
        """The result has the queries' order of dimensions."""
        q, k, v = torch.randn(1, 2, 40, 32).bfloat16(), heads(1, 2, 50, 32), heads(1, 2, 50, 32)
        check(run(q, k, v), q, k, v, None, False, None)

    def test_in_a_model(self, kernel: str) -> None:
        """One kernel, no call of ATen's, keys and values not copied for each head."""
        model, x = int8(Block(interleaved)), tokens(40)
        chosen = lowering.kernel_for(x, x)
        assert chosen
        with torch.no_grad():
            result, (code, *_) = run_and_get_code(torch.compile(model), x)
            with qfuse.config.patch(fuse_attention=False):
                torch._dynamo.reset()
                other = torch.compile(model)(x)
        assert code.count(f"qfuse::attend<qfuse::{chosen.class_name}<T, 32>, true>(attention, threads)") == 1
        assert ("using Floats = __m256;" in code) == (kernel == AVX2)
        assert ("using Floats = __m512;" in code) == (kernel != AVX2)
        assert "_scaled_dot_product_flash_attention_for_cpu.default(" not in code
        assert (result - other).norm() <= 0.05 * other.norm()


#: batch, heads, heads of keys, queries, keys, size of a head
FEW = [
    (1, 16, 4, 1, 256, 64),
    (3, 4, 2, 1, 1000, 64),
    (1, 3, 1, 1, 1, 128),
    (2, 7, 1, 1, 40, 80),
    (1, 5, 1, 1, 40, 64),
    (2, 4, 2, 3, 5, 20),
    (1, 4, 2, 4, 700, 32),
    (1, 2, 1, 1, 530, 256),
]


class TestFewQueries:
    @pytest.fixture(autouse=True, params=[AVX512, AVX2])
    def instructions(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        has_avx512 = request.param == AVX512
        if not (lowering._has_avx512() if has_avx512 else torch.cpu.get_capabilities().get("avx2")):
            pytest.skip("this machine has not the instructions")
        monkeypatch.setattr(lowering, "_has_amx", lambda: False)
        monkeypatch.setattr(lowering, "_has_avx512", lambda: has_avx512)
        monkeypatch.setattr(lowering, "_has_avx2", lambda: not has_avx512)
        monkeypatch.setattr(lowering, "_reference", None)  # which would run if the kernel failed
        return str(request.param)

    def _check(self, *args: Any) -> None:
        torch._dynamo.reset()
        with fresh_cache():
            result, (code,) = run_and_get_code(torch.compile(torch.ops.qfuse.attention, dynamic=False), *args)
        assert "qfuse::attend<qfuse::FewQueriesAttention<" in code
        check(result, *args)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_numbers(self, dtype: torch.dtype, subtests: pytest.Subtests) -> None:
        torch.manual_seed(0)
        cases: list[tuple[Any, ...]] = []
        for batch, count, shared, rows, keys, size in FEW:
            q = heads(batch, count, rows, size, dtype)
            k, v = heads(batch, shared, keys, size, dtype), heads(batch, shared, keys, size, dtype)
            cases.append((q, k, v, None, rows > 1, None))
            if size == 64:
                of_columns = torch.rand(batch, 1, 1, keys).log().to(dtype)
                of_rows = torch.randn(1, count, rows, 1).to(dtype).expand(batch, -1, -1, keys)
                cases += [
                    (q, k, v, torch.randn(rows, keys), False, -0.3),
                    (q, k, v, of_columns, False, 0.2),
                    (q, k, v, of_rows, False, None),
                ]
        _check_together(cases, "qfuse::attend<qfuse::FewQueriesAttention<", subtests, dynamic=False)

    @pytest.mark.parametrize(
        ("dtype", "sizes"),
        [
            (torch.bfloat16, (2, 4, 4, 1, 300, 64)),
            (torch.bfloat16, (1, 4, 4, 1, 40, 20)),
            (torch.float16, (1, 2, 2, 8, 70, 80)),
        ],
        ids=str,
    )
    def test_heads_with_keys_of_their_own(self, instructions: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        if instructions == AVX512:
            pytest.skip("ATen's op is chosen")
        batch, count, shared, rows, keys, size = sizes
        torch.manual_seed(0)
        q = heads(batch, count, rows, size, dtype)
        self._check(
            q, heads(batch, shared, keys, size, dtype), heads(batch, shared, keys, size, dtype), None, rows > 1, None
        )

    def test_nothing_is_read_beyond_operands(self) -> None:
        shapes = (1, 4, 2, 20), (1, 2, 35, 20), (1, 2, 35, 20)
        q, k, v = (at_end_of_page(torch.randn(shape).bfloat16()) for shape in shapes)
        self._check(q, k, v, at_end_of_page(torch.randn(2, 35)), False, None)

    def test_keys_that_are_masked(self) -> None:
        """All of them for one query, and all but the last ones for another: the least number, and none at all."""
        q, k, v = heads(1, 4, 2, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
        for least in (-torch.inf, torch.finfo(torch.float32).min):
            mask = torch.zeros(1, 4, 2, 300)
            mask[0, 1, 0], mask[0, 2, 1, :290] = least, least
            self._check(q, k, v, mask, False, None)

    def test_nan_stays_in_its_row(self) -> None:
        q, k, v = heads(1, 4, 2, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
        q[0, 1, 1, 5] = torch.nan
        torch._dynamo.reset()
        with fresh_cache():
            result = torch.compile(torch.ops.qfuse.attention, dynamic=False)(q, k, v, None, False, None)
        assert torch.equal(result.isnan(), torch.ops.qfuse.attention(q, k, v, None, False, None).isnan())

    def test_one_compile_for_all_lengths(self) -> None:
        torch._dynamo.reset()
        attend = torch.compile(torch.ops.qfuse.attention)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for keys in (7, 300, 19):
                q, k, v = heads(1, 4, 1, 64), heads(1, 2, keys, 64), heads(1, 2, keys, 64)
                torch._dynamo.mark_dynamic(k, 2)
                torch._dynamo.mark_dynamic(v, 2)
                check(attend(q, k, v, None, False, None), q, k, v, None, False, None)

    def test_keys_that_grow(self) -> None:
        """Dynamo has one symbol for the length of keys and another for that of values."""

        class Decoding(Block):
            def forward(self, x: Tensor, *cache: Tensor) -> Tensor:
                q = self.projections[0](x).view(1, 1, 4, 32).transpose(1, 2)
                return self.out(self.attend(q, *cache).transpose(1, 2).reshape(1, 1, -1))

        def cache(length: int) -> tuple[Tensor, Tensor]:
            k, v = heads(1, 2, length, 32), heads(1, 2, length, 32)
            for each in (k, v):
                torch._dynamo.mark_dynamic(each, 2)
            return k, v

        model, x = torch.compile(int8(Decoding(plain))), tokens(1)[:1]
        with torch.no_grad(), fresh_cache():
            _, (code, *_) = run_and_get_code(model, x, *cache(5))
            assert code.count("qfuse::attend<qfuse::FewQueriesAttention<T, 32>") == 1
            with torch._dynamo.config.patch(error_on_recompile=True):
                longer = cache(13)
                result = model(x, *longer)
            with qfuse.config.patch(fuse_attention=False):
                torch._dynamo.reset()
                other = model(x, *longer)
        assert (result - other).norm() <= 0.05 * other.norm()

    def test_in_a_model(self) -> None:
        """One token: keys and values are not copied for each head."""
        model = int8(Block(plain))
        with torch.no_grad():
            torch._dynamo.reset()
            result, (code, *_) = run_and_get_code(torch.compile(model, dynamic=False), x := tokens(3))
            with qfuse.config.patch(fuse_attention=False):
                torch._dynamo.reset()
                other = torch.compile(model, dynamic=False)(x)
        assert code.count("qfuse::attend<qfuse::FewQueriesAttention<T, 32>, false>(attention, threads)") == 1
        assert "_scaled_dot_product_flash_attention_for_cpu.default(" not in code
        assert (result - other).norm() <= 0.05 * other.norm()


@needs_any
@pytest.mark.parametrize("limit", ["", pytest.param("AVX512_CORE_BF16", marks=needs_avx512)])
def test_ahead_of_time(limit: str, tmp_path: Path) -> None:
    run_python(COMPILE, cwd=str(tmp_path), **({"ONEDNN_MAX_CPU_ISA": limit} if limit else {}))
    run_python(RUN, cwd=str(tmp_path))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine is no x86")
@pytest.mark.parametrize(
    "kernels",
    [
        (lowering._AMX, lowering._AVX512_BF16, lowering._FEW_QUERIES, lowering._AVX512),
        (lowering._AVX2, lowering._FEW_QUERIES_AVX2, lowering._AVX2),
    ],
    ids=[AVX512, AVX2],
)
def test_kernels_compile_together(kernels: tuple[lowering.Kernel, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a CPU in one translation unit, on a machine without the instructions as well."""

    class Attentions(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [torch.ops.qfuse.attention(x, x, x, None, i > 0, None) for i in range(len(kernels))]

    remaining = iter(kernels)
    monkeypatch.setattr(lowering, "kernel_for", lambda q, k: next(remaining))
    monkeypatch.setattr(lowering, "_reference", None)  # which would be compiled if a kernel failed
    x = heads(1, 4, 40, 32)
    with fresh_cache():
        torch._inductor.aot_compile(torch.export.export(Attentions(), (x,)).module(), (x,))
    assert not list(remaining)


COMPILE = """
    import zipfile
    import torch, qfuse
    from attentions import Block, int8, interleaved, plain, tokens

    # two attentions, of different kernels, which are compiled together
    model, x = int8(torch.nn.Sequential(Block(interleaved), Block(plain, 2, 1))), tokens(40)
    with torch.no_grad():
        dim = torch.export.Dim("tokens", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({1: dim},))
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
        names = zipfile.ZipFile("model.pt2").namelist()
        code = "".join(zipfile.ZipFile("model.pt2").read(name).decode() for name in names if name.endswith(".cpp"))
        assert code.count("true>(attention, threads)") == code.count("false>(attention, threads)") == 1
        torch.save([(y, model(y)) for y in (x, x[:, :7].contiguous())], "expected.pt")
"""

RUN = """
    import sys, torch

    package = torch._inductor.aoti_load_package("model.pt2")
    for x, expected in torch.load("expected.pt"):
        assert (package(x) - expected).norm() <= 0.05 * expected.norm()
    assert "qfuse" not in sys.modules
"""
