"""The canonical ops. Their eager implementations are the reference semantics: slow, and beyond doubt.

`qfuse::pack_column_sums(weight) -> sums`
    Σk weight[n, k]: int8 [N, K] → int32 [1, N]. An op on the weight alone: freezing runs it once, at compile time.
    Two-dimensional, because Inductor writes small vectors into the code; this one stays a tensor of the compiled graph.

`qfuse::pack_int8_weight(weight) -> packed`
    int8 [N, K] → int8 [P, G, 64, 4], P = ⌈N / 64⌉ panels of 64 columns and G = 16 · ⌈K / 64⌉ groups of 4 k, filled up
    with zeros: what `vpdpbusd` and `tdpbusd` take, as one stream. Freezing runs it once, at compile time.

`qfuse::int8_linear(x, weight, column_sums, x_scale, w_scale, bias, offset_rows, offset_columns, x_zero_point,
out_dtype, lowering) -> y`
    y[m, n] = (Σk (x[m, k] − x_zero_point) · weight[n, k]) · x_scale[m] · w_scale[n]
              + Σi offset_rows[i][m] · offset_columns[i][n] + bias[n],
    in float32 after the exact integer sum, rounded once to `out_dtype`.

    x: [M, K] int8 or uint8. weight: [N, K] int8, or packed as above. column_sums: [1, N] int32, as above.
    x_scale: [M] or [1] float32. w_scale: [N] or [1] float32. bias: [N] or [1], any float dtype, or None.
    offset_rows, offset_columns: equally many, each [M], and [N] or [1], float32: they remove zero points of rows.
    lowering: the name of the lowering that was chosen when the graph was matched.

`qfuse::int_mm(x, weight_t) -> y`, `qfuse::mm(x, weight_t) -> y`, `qfuse::addmm(summand, x, weight_t) -> y`
    `aten._int_mm`, `mm` and `addmm` under names that Inductor's own patterns do not know (see `qfuse.fusion.shield`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfuse.memory import empty_in_huge_pages

_library = torch.library.Library("qfuse", "DEF")
_library.define("pack_column_sums(Tensor weight) -> Tensor")
_library.define("pack_int8_weight(Tensor weight) -> Tensor")
_library.define(
    "int8_linear(Tensor x, Tensor weight, Tensor column_sums, Tensor x_scale, Tensor w_scale, Tensor? bias, "
    "Tensor[] offset_rows, Tensor[] offset_columns, int x_zero_point, ScalarType out_dtype, str lowering) -> Tensor"
)


_library.define("int_mm(Tensor x, Tensor weight_t) -> Tensor")
_library.define("mm(Tensor x, Tensor weight_t) -> Tensor")
_library.define("addmm(Tensor summand, Tensor x, Tensor weight_t, *, Scalar beta=1, Scalar alpha=1) -> Tensor")


@torch.library.impl(_library, "int_mm", "CompositeExplicitAutograd")
def _int_mm(x: Tensor, weight_t: Tensor) -> Tensor:
    return torch._int_mm(x, weight_t)


@torch.library.impl(_library, "mm", "CompositeExplicitAutograd")
def _mm(x: Tensor, weight_t: Tensor) -> Tensor:
    return torch.mm(x, weight_t)


@torch.library.impl(_library, "addmm", "CompositeExplicitAutograd")
def _addmm(summand: Tensor, x: Tensor, weight_t: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.addmm(summand, x, weight_t, beta=beta, alpha=alpha)


@torch.library.register_fake("qfuse::addmm", lib=_library)
def _addmm_fake(summand: Tensor, x: Tensor, weight_t: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]))


@torch.library.register_fake("qfuse::mm", lib=_library)
def _mm_fake(x: Tensor, weight_t: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]))


@torch.library.register_fake("qfuse::int_mm", lib=_library)
def _int_mm_fake(x: Tensor, weight_t: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]), dtype=torch.int32)


@torch.library.impl(_library, "pack_column_sums", "CompositeExplicitAutograd")
def _pack_column_sums(weight: Tensor) -> Tensor:
    return weight.sum(1, dtype=torch.int32)[None]


@torch.library.register_fake("qfuse::pack_column_sums", lib=_library)
def _pack_column_sums_fake(weight: Tensor) -> Tensor:
    return weight.new_empty((1, weight.shape[0]), dtype=torch.int32)


@torch.library.impl(_library, "pack_int8_weight", "CompositeExplicitAutograd")
def _pack_int8_weight(weight: Tensor) -> Tensor:
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % 64, 0, -n % 64))
    panels = padded.view(-1, 64, padded.shape[1] // 4, 4).transpose(1, 2)
    if weight.device.type != "cpu":
        return panels.contiguous()
    return empty_in_huge_pages(panels.shape, weight.dtype).copy_(panels)


@torch.library.register_fake("qfuse::pack_int8_weight", lib=_library)
def _pack_int8_weight_fake(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty((-(-n // 64), -(-k // 64) * 16, 64, 4))


def unpacked(weight: Tensor, n: int, k: int) -> Tensor:
    """Return [N, K] from what `qfuse::pack_int8_weight` made of it."""
    return weight.transpose(1, 2).reshape(weight.shape[0] * 64, -1)[:n, :k]


@torch.library.impl(_library, "int8_linear", "CompositeExplicitAutograd")
def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    column_sums: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    offset_rows: list[Tensor],
    offset_columns: list[Tensor],
    x_zero_point: int,
    out_dtype: torch.dtype,
    lowering: str,
) -> Tensor:
    """Compute `qfuse::int8_linear`. The sum is taken in float64, where it is exact for every K that fits int32."""
    if weight.dim() == 4:
        weight = unpacked(weight, column_sums.shape[1], x.shape[1])
    accumulator = (x.double() - x_zero_point) @ weight.double().t()
    y = accumulator.float() * x_scale.reshape(-1, 1) * w_scale
    for rows, columns in zip(offset_rows, offset_columns, strict=True):
        y = y + rows.reshape(-1, 1) * columns
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


@torch.library.register_fake("qfuse::int8_linear", lib=_library)
def _int8_linear_fake(
    x: Tensor,
    weight: Tensor,
    column_sums: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    offset_rows: list[Tensor],
    offset_columns: list[Tensor],
    x_zero_point: int,
    out_dtype: torch.dtype,
    lowering: str,
) -> Tensor:
    return x.new_empty((x.shape[0], column_sums.shape[1]), dtype=out_dtype)
