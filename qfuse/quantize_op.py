"""The canonical op of a quantization.

`qfuse::quantize_rows(v, program) -> values`
    Runs a program (`qfuse.row_program`) on each row of v, [M, K] of any float dtype, and returns its outputs: [M, K]
    for element values (the quantized rows) and [M] for row values (scales, zero points). Contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfuse.row_program import RowProgram

_library = torch.library.Library("qfuse", "FRAGMENT")
_library.define("quantize_rows(Tensor v, str program) -> Tensor[]")


@torch.library.impl(_library, "quantize_rows", "CompositeExplicitAutograd")
def quantize_rows_reference(v: Tensor, program: str) -> list[Tensor]:
    """Compute `qfuse::quantize_rows`, operator by operator."""
    outputs: list[Tensor] = []
    for value in RowProgram.parse(program)(v):
        value = value.contiguous()
        # an op must not return its input, or one tensor twice
        outputs.append(value.clone() if value is v or any(value is o for o in outputs) else value)
    return outputs


@torch.library.register_fake("qfuse::quantize_rows", lib=_library)
def quantize_rows_fake(v: Tensor, program: str) -> list[Tensor]:
    """Return empty tensors like the results of `qfuse::quantize_rows`."""
    parsed = RowProgram.parse(program)
    m, k = v.shape
    return [
        v.new_empty((m, k) if output in parsed.elements else (m,), dtype=parsed.dtype(output, v.dtype))
        for output in parsed.outputs
    ]
