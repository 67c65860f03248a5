"""A fused Triton kernel: int8 matmul, dequantization, bias, cast and what Inductor fuses behind it, in one pass.

`linear.py.jinja` is the kernel, `template.py` hands it to Inductor, and `configurations.py` says which tiles are tried.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.utils._triton import has_triton_package

from qfuse.lowerings.call import Int8LinearCall
from qfuse.problem import Problem


class Triton:
    """See the module's docstring."""

    name: ClassVar[str] = "triton"
    packs_weight: ClassVar[bool] = False

    def supports(self, problem: Problem) -> str | None:
        """See `Provider.supports`."""
        if not has_triton_package():
            return "triton is not installed"
        return None

    def activation_dtype(self, problem: Problem) -> torch.dtype:
        """See `Provider.activation_dtype`. Tensor cores multiply signed by signed."""
        return torch.int8

    def lower(self, call: Int8LinearCall) -> object:
        """See `Provider.lower`."""
        from qfuse.lowerings.triton.template import int8_linear

        return int8_linear(call)
