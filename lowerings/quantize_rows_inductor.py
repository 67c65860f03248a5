"""The Inductor lowering of `qfuse::quantize_rows` on GPUs: a program in Inductor's own operators, as one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.virtualized import V

from qfuse.inductor import overridden
from qfuse.row_program import COMPARISONS, REDUCTIONS, Instruction, Ref, RowProgram

aten = torch.ops.aten

_TENSOR = ("add", "sub", "mul", "div", *COMPARISONS)  # names of overloads: `.Tensor`, and of the others `.default`


def lower(v: Any, program: RowProgram) -> list[Any]:
    """Lower a program on v, [M, K].

    Where v is computed from the result of a template, a linear's, it is stored, so that the computation is fused into
    the template's kernel. Else the kernel of the quantization computes v, twice where rows are long.
    """
    if any(isinstance(V.graph.try_get_buffer(name), ir.TemplateBuffer) for name in v.get_read_names()):
        v.realize()
    # Each instruction is an operator of the graph, which rounds its result where the user wants that.
    V.graph.current_node.meta["low_precision_pointwise_barrier"] = inductor_config.emulate_precision_casts
    values = [v]
    for one in program.instructions:
        operands = [values[o.index] if isinstance(o, Ref) else o for o in one.operands]
        values.append(to_dtype(_lowered(one, operands), one.dtype))
    return [
        values[output] if output in program.elements else lowerings[aten.reshape.default](values[output], [-1])
        for output in program.outputs
    ]


def _lowered(one: Instruction, operands: list[Any]) -> Any:
    if one.op == "convert":
        return operands[0]
    if one.op in REDUCTIONS:
        # Inductor splits long rows where there are few, into one kernel for their parts and more for the rest.
        with overridden({"split_reductions": False}):
            return lowerings[getattr(aten, one.op).default](operands[0], [-1], True)
    packet = getattr(aten, one.op)
    overload = packet.self if one.op == "where" else packet.Tensor if one.op in _TENSOR else packet.default
    return lowerings[overload](*operands)
