"""`aten._int_mm` and an Inductor epilogue: the reference, for every device and instruction set."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch._inductor.lowering import lowerings, to_dtype

from qfuse.inductor import statically_known_true
from qfuse.isa import ACTIVATION_DTYPE
from qfuse.lowerings.call import Int8LinearCall
from qfuse.problem import Problem

aten = torch.ops.aten


class Aten:
    """See the module's docstring."""

    name: ClassVar[str] = "aten"
    packs_weight: ClassVar[bool] = False

    def supports(self, problem: Problem) -> str | None:
        """See `Provider.supports`."""
        if problem.device.type == "cuda":
            if not statically_known_true(problem.m > 16):
                return f"aten._int_mm needs M > 16 on CUDA, and M = {problem.m}"
            if problem.k % 8 or problem.n % 8:
                return f"aten._int_mm needs K and N divisible by 8 on CUDA, and they are {problem.k} and {problem.n}"
            if problem.x_dtype is not torch.int8:
                return "aten._int_mm needs an int8 activation on CUDA"
        elif problem.k == 1:
            return "aten._int_mm reads out of bounds for K = 1 (torch 2.13)"
        elif not problem.weight_is_constant:
            return "the weight is not a constant: nothing would be gained over the graph as it is"
        return None

    def activation_dtype(self, problem: Problem) -> torch.dtype:
        """See `Provider.activation_dtype`."""
        return ACTIVATION_DTYPE.get(problem.isa, problem.x_dtype)

    def lower(self, call: Int8LinearCall) -> Any:
        """See `Provider.lower`."""
        weight_t = lowerings[aten.permute.default](call.weight, [1, 0])
        accumulator = lowerings[aten._int_mm.default](call.x, weight_t)
        if call.x_zero_point:
            correction = lowerings[aten.mul.Tensor](call.column_sums, call.x_zero_point)
            accumulator = lowerings[aten.sub.Tensor](accumulator, correction)
        y = lowerings[aten.mul.Tensor](to_dtype(accumulator, torch.float32), call.w_scale)
        return call.finished(call.scaled_by_rows(y))
