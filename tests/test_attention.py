"""Attention between quantized linears: which is replaced, and by which kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attentions import Block, int8, interleaved, masked, plain, repeat_kv, tokens
from support import trace
from torch import Tensor, nn

import qfuse
from qfuse.attention import _FLASH, _replace
from qfuse.lowerings import attention as lowering

ATTENTION, FLASH = "qfuse.attention.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"


@pytest.fixture
def as_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass needs no kernel: canonical ops run by their references."""
    monkeypatch.setattr(lowering, "_has_amx", lambda: True)
    monkeypatch.setattr(lowering, "_has_avx512", lambda: True)


@pytest.mark.usefixtures("as_with_amx")
class TestPass:
    @pytest.mark.parametrize("attend", [plain, interleaved, masked])
    def test_replaced(self, attend: Callable[..., Tensor]) -> None:
        args = (tokens(), torch.randn(2, 1, 9, 9).bfloat16()) if attend is masked else (tokens(),)
        model = int8(Block(attend))
        with torch.no_grad():
            traced = trace(model, *args)
            with qfuse.config.patch(fuse_attention=False):
                assert torch.equal(traced.result, trace(model, *args).result)
        assert (traced.before.count(FLASH), traced.after.count(FLASH), traced.after.count(ATTENTION)) == (1, 0, 1)
        assert traced.before.count("aten.expand.default") - traced.after.count("aten.expand.default") == 2

    def test_values_that_are_repeated_alone(self) -> None:
        """Keys and values of different numbers of heads are both taken as they are."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, torch.cat([k, k], 1), repeat_kv(v))

        with torch.no_grad():
            traced = trace(int8(Block(attend)), tokens())
        assert ATTENTION in traced.after
        assert "aten.expand.default" in traced.after

    def test_heads_in_another_order(self) -> None:
        """Heads that are repeated one after the other, not each, are no shared heads."""

        def tiled(x: Tensor) -> Tensor:
            batch, heads, count, size = x.shape
            return x[:, None].expand(batch, 2, heads, count, size).reshape(batch, 2 * heads, count, size)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, tiled(k), tiled(v))

        model = int8(Block(attend))
        with torch.no_grad():
            traced = trace(model, x := tokens())
            with qfuse.config.patch(fuse_attention=False):
                assert torch.equal(traced.result, trace(model, x).result)
        assert "aten.expand.default" in traced.after

    def _stays(self, model: nn.Module, *args: Tensor, kept: str = FLASH) -> None:
        with torch.no_grad():
            traced = trace(model, *args)
        assert kept in traced.after
        assert ATTENTION not in traced.after

    def test_not_quantized(self) -> None:
        self._stays(Block(plain).bfloat16().eval(), tokens())

    def test_switched_off(self) -> None:
        with qfuse.config.patch(fuse_attention=False):
            self._stays(int8(Block(plain)), tokens())

    def test_dropout(self) -> None:
        graph = _flash_graph()
        (flash,) = graph.find_nodes(op="call_function", target=_FLASH)
        assert _replace(flash) is None
        (flash,) = _flash_graph().find_nodes(op="call_function", target=_FLASH)
        flash.args = (*flash.args, 0.25)
        assert _replace(flash) == "it has dropout"

    def test_logarithms_of_sums_used(self) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
            out, sums = flash(q, repeat_kv(k), repeat_kv(v))
            return out * sums[..., None].to(out.dtype)

        self._stays(int8(Block(attend)), tokens())

    @pytest.mark.parametrize("has_avx512", [True, False])
    def test_one_query_for_each_head_of_keys(self, has_avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """By AVX2 ATen's op is slower, and does not stay."""
        monkeypatch.setattr(lowering, "_has_avx512", lambda: has_avx512)
        monkeypatch.setattr(lowering, "_has_avx2", lambda: not has_avx512)
        model = int8(Block(F.scaled_dot_product_attention, kv_heads=4))
        if has_avx512:
            self._stays(model, tokens(1))
        else:
            with torch.no_grad():
                assert ATTENTION in trace(model, tokens(1)).after

    def test_float64(self) -> None:
        (flash,) = _flash_graph(torch.float64).find_nodes(op="call_function", target=_FLASH)
        assert _replace(flash) == "there is no kernel for torch.float64 and as many queries on this CPU"

    @pytest.mark.parametrize("scale", [float("inf"), float("nan"), -1e39])
    def test_scale_that_is_no_float32(self, scale: float) -> None:
        (flash,) = _flash_graph().find_nodes(op="call_function", target=_FLASH)
        flash.kwargs = {"scale": scale}
        assert _replace(flash) == "its scale is out of float32's range"

    def test_heads_too_large(self) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                *(torch.cat([repeat_kv(t, 4 // t.shape[1])] * 9, -1) for t in (q, k, v))
            )[..., :32]

        self._stays(int8(Block(attend)), tokens())


def _flash_graph(dtype: torch.dtype = torch.bfloat16) -> torch.fx.Graph:
    """A graph of ATen's op alone, with the values that the pass reads."""
    graph = torch.fx.Graph()
    operands = [graph.placeholder(name) for name in "qkv"]
    for node in operands:
        node.meta["val"] = torch.empty(1, 4, 8, 32, dtype=dtype)
    flash = graph.call_function(_FLASH, tuple(operands))
    flash.meta["val"] = (torch.empty(1, 4, 8, 32, dtype=dtype), torch.empty(1, 4, 8))
    graph.output((graph.call_function(operator.getitem, (flash, 0)),))
    return graph


KERNELS = {
    "Amx": lowering._AMX,
    "Avx512": lowering._AVX512,
    "Avx512Bf16": lowering._AVX512_BF16,
    "FewQueries": lowering._FEW_QUERIES,
    "Avx2": lowering._AVX2,
    "FewQueriesAvx2": lowering._FEW_QUERIES_AVX2,
}


@pytest.mark.parametrize(
    ("has_amx", "is_fast", "dtype", "chosen"),
    [
        (True, False, torch.bfloat16, {3: None, 4: "Amx", 70: "Amx", "shared 4": "FewQueries", "shared 6": "Amx"}),
        (True, False, torch.float16, {15: None, 16: "Avx512", "shared 8": "FewQueries", "shared 10": None}),
        (False, False, torch.bfloat16, {15: None, 16: "Avx512", "shared 8": "FewQueries", "shared 10": None}),
        (False, True, torch.bfloat16, {15: None, 16: "Avx512Bf16", "shared 8": "FewQueries", "shared 10": None}),
        (False, True, torch.float16, {15: None, 16: "Avx512"}),
        (False, True, torch.float32, {63: None, 64: "Avx512", "shared 8": None}),
    ],
    ids=str,
)
def test_kernels(
    has_amx: bool,
    is_fast: bool,
    dtype: torch.dtype,
    chosen: dict[int | str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By how many queries share a head of keys: of one head, or "shared" by two. is_fast: at multiplying bfloat16."""
    monkeypatch.setattr(lowering, "_has_amx", lambda: has_amx)
    monkeypatch.setattr(lowering, "_has_avx512", lambda: True)
    monkeypatch.setattr(lowering, "_multiplies_bfloat16_fast", lambda: is_fast)
    _check_kernels(dtype, chosen)


def _check_kernels(dtype: torch.dtype, chosen: dict[int | str, str | None]) -> None:
    for queries, name in chosen.items():
        groups, rows = (1, queries) if isinstance(queries, int) else (2, int(queries.split()[1]) // 2)
        kernel = lowering.kernel_for(torch.empty(1, 4 * groups, rows, 32, dtype=dtype), torch.empty(1, 4, 9, 32))
        assert kernel is (KERNELS[name] if name else None), queries


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        (torch.float32, {63: None, 64: "Avx2", "shared 8": None}),
        (
            torch.bfloat16,
            {1: "FewQueriesAvx2", 2: None, 31: None, 32: "Avx2", "shared 8": "FewQueriesAvx2", "shared 10": "Avx2"},
        ),
        (torch.float16, {1: "FewQueriesAvx2", 8: "FewQueriesAvx2", 9: "Avx2", "shared 10": "Avx2"}),
        (torch.float64, {1: None, 64: None}),
    ],
    ids=str,
)
def test_kernels_for_avx2(
    dtype: torch.dtype, chosen: dict[int | str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "_has_avx512", lambda: False)
    for has_avx2 in (True, False):
        monkeypatch.setattr(lowering, "_has_avx2", lambda has=has_avx2: has)
        _check_kernels(dtype, chosen if has_avx2 else dict.fromkeys(chosen))
