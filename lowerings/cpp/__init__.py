"""A fused C++ kernel: int8 matmul, dequantization, bias, cast and what Inductor fuses behind it, in one pass.

`template.py` renders `linear.cpp.jinja`, the loops and the epilogue; what computes a block of 64 columns stands in one
header for each instruction set, with `block.h` for what they share.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from qfuse.lowerings.call import Int8LinearCall
from qfuse.lowerings.cpp.microkernels import MICROKERNELS
from qfuse.problem import Problem


class Cpp:
    """See the module's docstring."""

    name: ClassVar[str] = "cpp"
    packs_weight: ClassVar[bool] = True

    def supports(self, problem: Problem) -> str | None:
        """See `Provider.supports`."""
        if not problem.weight_is_constant:
            return "the weight is not a constant that can be packed"
        return None

    def activation_dtype(self, problem: Problem) -> torch.dtype:
        """See `Provider.activation_dtype`. AMX and AVX2 take what is there."""
        return MICROKERNELS[problem.isa].activation_dtype(problem.x_dtype)

    def lower(self, call: Int8LinearCall) -> object:
        """See `Provider.lower`."""
        from qfuse.lowerings.cpp.template import int8_linear

        return int8_linear(call)
