"""The operands of one `qfuse::int8_linear`, as Inductor IR, and what follows the matmul in every lowering."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, to_dtype

aten = torch.ops.aten


@dataclass(frozen=True)
class Int8LinearCall:
    """The arguments of the op, see `qfuse.ops`; tensors are Inductor's `TensorBox`."""

    x: Any
    weight: Any
    column_sums: Any
    x_scale: Any
    w_scale: Any
    bias: Any | None
    offset_rows: list[Any]
    offset_columns: list[Any]
    x_zero_point: int
    out_dtype: torch.dtype

    def with_activation(self, dtype: torch.dtype) -> Int8LinearCall:
        """Shift the activation to int8 or uint8, and its zero point with it. The rewrite has done so, others may not.

        Modulo 256, in arithmetic on bytes that are reinterpreted: Inductor vectorizes that.
        """
        if self.x.get_dtype() is dtype:
            return self
        shift = 128 if dtype is torch.uint8 else -128
        shifted = lowerings[aten.add.Tensor](lowerings[aten.view.dtype](self.x, dtype), shift)
        return replace(self, x=shifted, x_zero_point=self.x_zero_point + shift)

    def scaled_by_rows(self, y: Any) -> Any:
        """Apply the scale of rows to y, [M, N] float32."""
        return lowerings[aten.mul.Tensor](y, _column(self.x_scale))

    def finished(self, y: Any) -> Any:
        """Apply offsets, bias and cast to y, [M, N] float32, which is scaled."""
        for rows, columns in zip(self.offset_rows, self.offset_columns, strict=True):
            y = lowerings[aten.add.Tensor](y, lowerings[aten.mul.Tensor](_column(rows), columns))
        if self.bias is not None:
            y = lowerings[aten.add.Tensor](y, to_dtype(self.bias, torch.float32))
        return to_dtype(y, self.out_dtype)


def _column(rows: Any) -> Any:
    return lowerings[aten.view.default](rows, [-1, 1])


def in_memory(tensor: Any) -> Any:
    """Return `tensor` as a buffer, or a view of one, in its own dtype.

    A kernel gets pointers to buffers, in the dtypes that these have: bits viewed in another dtype would be misread.
    """
    stored = ir.ExternKernel.realize_input(tensor)
    is_bitcast = isinstance(stored, ir.ReinterpretView) and stored.get_dtype() != stored.data.get_dtype()
    return ir.ExternKernel.copy_input(stored) if is_bitcast else stored
