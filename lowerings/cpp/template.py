"""Rendering the C++ kernel as a template of Inductor's, so that pointwise nodes behind it are fused into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import wrap_with_tensorbox
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

from qfuse.isa import cpu_isa
from qfuse.lowerings.call import Int8LinearCall, in_memory
from qfuse.lowerings.cpp.fast_math import VECTOR_MATH, fast_math, stores_fast
from qfuse.lowerings.cpp.microkernels import MICROKERNELS

_USUAL_L2_BYTES = 1 << 20

#: Threads that share fewer k wait for each other as long as they save (docs/cpu.md).
LEAST_K_OF_SPLIT = 2048
_TEXT = (Path(__file__).parent / "linear.cpp.jinja").read_text()


def int8_linear(call: Int8LinearCall) -> ir.TensorBox:
    """Lower a linear whose weight is packed."""
    call = call.with_activation(MICROKERNELS[cpu_isa()].activation_dtype(call.x.get_dtype()))
    x, weight, column_sums = map(
        ir.ExternKernel.require_contiguous, map(in_memory, (call.x, call.weight, call.column_sums))
    )
    # What the epilogue reads has to be an input of the template: else the scheduler does not see the dependency.
    x_scale, w_scale = map(_realized, (call.x_scale, call.w_scale))
    rows, columns = ([_realized(t) for t in tensors] for tensors in (call.offset_rows, call.offset_columns))
    bias = None if call.bias is None else _realized(call.bias)
    call = replace(call, x_scale=x_scale, w_scale=w_scale, bias=bias, offset_rows=rows, offset_columns=columns)
    read_behind = [t for t in (x_scale, w_scale, bias, *rows, *columns) if t is not None]
    size = [x.get_size()[0], column_sums.get_size()[1]]
    template = Int8LinearTemplate(
        [ir.InputsKernel.unwrap_storage_for_input(t) for t in (x, weight, column_sums, *read_behind)],
        ir.FixedLayout(x.get_device_or_error(), call.out_dtype, size),
        call,
    )
    return template.generate().output_node()


def _realized(tensor: Any) -> Any:
    """Return `tensor` as a buffer or an affine view of one: exactly what will be read."""
    return wrap_with_tensorbox(ir.InputsKernel.unwrap_storage_for_input(in_memory(tensor)))


class Int8LinearTemplate(CppTemplate):
    """One fused linear. Inputs: x, packed weight, column sums, then the epilogue's."""

    def __init__(self, input_nodes: Sequence[ir.IRNode], layout: ir.Layout, call: Int8LinearCall) -> None:
        super().__init__("qfuse_int8_linear", input_nodes, layout, parallel_num_threads())
        self.call = call

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[ir.IRNode] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the C++ of the kernel, with `epilogue_nodes` fused into it."""
        output: Any = self.output_node if template_buffer_node is None else template_buffer_node
        # The result of the matmul exists as a block in L1 only; `store_output` redirects its loads there.
        layout = output.get_layout()
        sums_layout = ir.FixedLayout(layout.device, torch.int32, layout.size, layout.stride)
        sums = ir.Buffer(name=f"{output.get_name()}_sums", layout=sums_layout)
        epilogues: list[Any] = [
            ir.ComputedBuffer(name=output.get_name(), layout=layout, data=_epilogue(self.call, sums))
        ]
        aliases: set[str] = {sums.get_name()}
        reindexers: list[Any] = [None]
        y = y_2d = output
        if epilogue_nodes:
            if not flag_template_buffer_has_other_users:
                aliases.add(output.get_name())  # it is never written to memory
            epilogues += epilogue_nodes
            y = epilogues[-1]
            y_2d, reindexers = gen_2d_view_of_epilogue_buf(
                y, output, epilogue_nodes, reindexers, default_reindexers=[None] * len(epilogue_nodes)
            )
        x, weight, column_sums, *others = self.input_nodes
        names = ["x", "weight", "column_sums", *(f"other{i}" for i in range(len(others)))]
        inputs: dict[str, tuple[str, ir.IRNode]] = {}  # by buffer: one that is read twice is one argument
        for name, node in zip(names, self.input_nodes, strict=True):
            inputs.setdefault(node.get_name(), (name, node))
        microkernel = MICROKERNELS[cpu_isa()]
        n, k = int(output.get_size()[1]), int(x.get_size()[1])
        stored = {node.get_dtype() for node in epilogues if node.get_name() not in aliases}
        used = {op for node in epilogues for op in node.data.inner_fn_opcount().used_ops}
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype([sums, output])), fast_math(stored, used):
            return self._template_from_string(_TEXT).render(
                template=self,
                kernel=kernel,
                microkernel=microkernel,
                int32=torch.int32,
                stores_fast="true" if stores_fast(used) else "false",
                class_name=microkernel.class_names[x.get_dtype()],
                vector_math=VECTOR_MATH,
                inputs=dict(inputs.values()),
                x=x,
                weight=weight,
                column_sums=column_sums,
                y=y,
                y_2d=y_2d,
                sums=sums,
                n=n,
                k=k,
                split_k=split_k(n, k, self.num_threads),
                x_zero_point=self.call.x_zero_point,
                l2_bytes=torch.cpu.get_capabilities().get("l2_cache_size", _USUAL_L2_BYTES),
                num_threads=self.num_threads,
                epilogues=epilogues,
                reindexers=reindexers,
                aliases={alias: y.get_name() for alias in aliases},
            )


def split_k(n: int, k: int, threads: int) -> int:
    """Return how many threads share a panel of 64 columns, each a part of K, where there are few rows."""
    panels = max(1, -(-n // 64))
    return max(1, min(threads // panels, k // LEAST_K_OF_SPLIT))


def _epilogue(call: Int8LinearCall, sums: ir.Buffer) -> ir.Pointwise:
    """Return scales, offsets, bias and cast, applied to the int32 result of the matmul."""
    y = call.scaled_by_rows(to_dtype(ir.TensorBox.create(sums), torch.float32))
    y = call.finished(lowerings[torch.ops.aten.mul.Tensor](y, call.w_scale))
    assert isinstance(y.data.data, ir.Pointwise)
    return y.data.data
