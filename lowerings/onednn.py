"""oneDNN's int8 matmul, `onednn.qlinear_pointwise`, with a prepacked weight.

oneDNN applies the weight's scale and the zero point. It cannot apply one scale a row, so the rest is an epilogue that
Inductor generates.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch._inductor import ir
from torch._inductor.select_algorithm import ExternKernelChoice
from torch.utils.weak import WeakTensorKeyDictionary

from qfuse.isa import ACTIVATION_DTYPE
from qfuse.lowerings.call import Int8LinearCall
from qfuse.problem import Problem

#: column sums → oneDNN's blocked copy of the weight, and zero points of the weight (there are none). A blocked tensor
#: cannot be pickled, so it can be no constant of a graph that Inductor caches; it is made at the first call instead.
#: The key is not the weight, which is the user's own tensor and may have changed when the model is compiled again, but
#: the column sums, which freezing has computed for this compiled graph and which live as long as it.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def onednn_int8_matmul(
    x: torch.Tensor, weight: torch.Tensor, column_sums: torch.Tensor, w_scale: torch.Tensor, x_zero_point: int
) -> torch.Tensor:
    """Compute (x − x_zero_point) @ weight.T · w_scale.

    x: [M, K] uint8 or int8. weight: [N, K] int8 and column_sums: [1, N] int32, constants of one compiled graph.
    w_scale: [N] or [1] float32. Returns [M, N] float32.
    """
    if (packed := _packed.get(column_sums)) is None:
        packed = _packed[column_sums] = (
            # contiguous: of any other layout qlinear_prepack makes garbage (torch 2.13)
            torch.ops.onednn.qlinear_prepack(weight.contiguous(), None),
            torch.zeros(w_scale.shape, dtype=torch.int32),
        )
    blocked, zero_points = packed
    return torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, x_zero_point, blocked, w_scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


_kernel = ExternKernelChoice(onednn_int8_matmul, name="qfuse_onednn_int8_matmul", has_out_variant=False)


class OneDNN:
    """See the module's docstring."""

    name: ClassVar[str] = "onednn"
    packs_weight: ClassVar[bool] = False

    def supports(self, problem: Problem) -> str | None:
        """See `Provider.supports`."""
        if problem.isa not in ACTIVATION_DTYPE:
            # AVX2, K = 67: sums of two products saturate at 16 bits, and 61 % of results are wrong.
            return "the CPU has neither VNNI nor AMX: oneDNN would saturate, or run a reference loop"
        if not torch.backends.mkldnn.is_available():
            return "torch is built without oneDNN"
        if not problem.weight_is_constant:
            return "the weight is not a constant that can be packed"
        if not problem.called_from_python:
            return "its packed weights cannot be called from C++ (cpp_wrapper, AOTInductor)"
        return None

    def activation_dtype(self, problem: Problem) -> torch.dtype:
        """See `Provider.activation_dtype`."""
        return ACTIVATION_DTYPE[problem.isa]

    def lower(self, call: Int8LinearCall) -> Any:
        """See `Provider.lower`."""
        constants = [ir.InputsKernel.unwrap_storage_for_input(t) for t in (call.weight, call.column_sums)]
        if not all(isinstance(c, ir.ConstantBuffer) for c in constants):
            # Packed once, it would go stale if it changed. Freezing has left alone what it was expected to freeze.
            raise RuntimeError("the weight is no constant of the compiled graph")
        x, weight, column_sums, w_scale = map(
            ir.ExternKernel.realize_input, (call.x, call.weight, call.column_sums, call.w_scale)
        )
        x, w_scale = map(ir.ExternKernel.require_contiguous, (x, w_scale))
        size = [x.get_size()[0], weight.get_size()[0]]
        layout = ir.FixedLayout(x.get_device_or_error(), torch.float32, size)
        inputs = [x, weight, column_sums, w_scale]
        y = _kernel.bind(inputs, layout, x_zero_point=call.x_zero_point).output_node()
        return call.finished(call.scaled_by_rows(y))
