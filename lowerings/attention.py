"""The Inductor lowering of `qfuse::attention`: C++ kernels for CPUs with AVX-512 or AVX2, see `cpp/attention.h`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.cpu_vec_isa import VecAMX, VecAVX2, VecAVX512, pick_vec_isa
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.utils import Placeholder, convert_shape_to_inductor, parallel_num_threads
from torch._inductor.virtualized import V

from qfuse.attention_op import attention_reference  # noqa: F401  registers the op
from qfuse.inductor import are_equal_now, fake_value, statically_known_true
from qfuse.isa import Isa, cpu_isa
from qfuse.lowerings.call import in_memory
from qfuse.normal_form import equal, same_sizes

log = logging.getLogger("qfuse.lowerings")

_FOLDER = Path(__file__).parent
_TEMPLATE = (_FOLDER / "templates" / "attention.cpp.jinja").read_text()


@dataclass(frozen=True)
class Kernel:
    """A C++ class, see `cpp/attention.h`, and the headers that define it."""

    class_name: str
    headers: tuple[str, ...]

    def texts(self) -> list[str]:
        """Return the C++ that defines the class."""
        return [(_FOLDER / "cpp" / name).read_text() for name in self.headers]


_SHARED = ("attention_vectors.h", "attention.h")
_BY_AVX512 = ("attention_registers_avx512.h", *_SHARED)
_BY_AVX2 = ("attention_registers_avx2.h", *_SHARED)
_FEW_QUERIES = Kernel("FewQueriesAttention", (*_BY_AVX512, "attention_few_queries.h"))
_FEW_QUERIES_AVX2 = Kernel("FewQueriesAttention", (*_BY_AVX2, "attention_few_queries.h"))
_AVX512 = Kernel("Float32Attention", (*_BY_AVX512, "attention_float32.h"))
_AVX512_BF16 = Kernel("Avx512Bf16Attention", (*_BY_AVX512, "attention_bf16.h", "attention_avx512_bf16.h"))
_AVX2 = Kernel("Float32Attention", (*_BY_AVX2, "attention_float32.h"))
_AMX = Kernel("AmxAttention", ("block.h", "amx_permission.h", *_BY_AVX512, "attention_bf16.h", "attention_amx.h"))

_LARGEST_HEAD = 256

#: Fewer multiplications than this are not worth waking other threads.
_PARALLEL_PRODUCTS = 1 << 17

#: How many queries share a head of keys and values. Up to so many, they are few: then no key is packed.
_MOST_FEW = 8
_MOST_FEW_BESIDE_AMX = 4
#: With fewer, packing takes longer than ATen's op; by AVX2, than where ATen is not slow, see `kernel_for`.
_LEAST_FOR_AMX = 4
_LEAST_FOR_AVX512 = 16
_LEAST_FOR_AVX2 = 32
#: With fewer, ATen's sums are also more exact: by up to 10 %.
_LEAST_IN_FLOAT32 = 64


def why_unsupported(q: Any, k: Any, v: Any, mask: Any | None) -> str | None:
    """Return why the kernel does not take operands like these fake tensors, or None."""
    if q.device.type != "cpu":
        return "it is not on a CPU"
    if not q.dtype == k.dtype == v.dtype or (mask is not None and mask.dtype not in (q.dtype, torch.float32)):
        return "its operands have several dtypes"
    if not _fit(q.shape, k.shape, v.shape):
        return "the shapes of its operands are not known to fit"
    if mask is not None and not _can_be_read_as_if_expanded(mask.shape, (*q.shape[:-1], k.shape[-2])):
        return "the mask's shape is not known well enough"
    if not isinstance(q.shape[-1], int) or not 0 < q.shape[-1] <= _LARGEST_HEAD:
        return f"heads may be larger than {_LARGEST_HEAD}"
    return None if kernel_for(q, k) else f"there is no kernel for {q.dtype} and as many queries on this CPU"


def kernel_for(q: torch.Tensor, k: torch.Tensor) -> Kernel | None:
    """Return the kernel for fake tensors like these, or None where ATen's is faster or more exact."""
    has_avx512 = _has_avx512()
    if not (has_avx512 or _has_avx2()) or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    queries = q.shape[1] // k.shape[1] * q.shape[2]  # that share a head of keys
    if q.dtype is torch.float32:
        fast = _AVX512 if has_avx512 else _AVX2
        return fast if statically_known_true(queries >= _LEAST_IN_FLOAT32) else None
    is_shared = statically_known_true(k.shape[1] < q.shape[1])
    if not has_avx512:
        # ATen reads keys again for each head that shares them, multiplies float16 slowly, and a single row as well
        is_aten_slow = is_shared or q.dtype is torch.float16 or statically_known_true(queries == 1)
        if is_aten_slow and statically_known_true(queries <= _MOST_FEW):
            return _FEW_QUERIES_AVX2
        if not is_aten_slow and statically_known_true(queries < _LEAST_FOR_AVX2):
            return None
        return _AVX2  # also where nothing is known: most graphs with symbolic lengths are prefills
    may_use_amx = q.dtype is torch.bfloat16 and _has_amx()
    most_few = _MOST_FEW_BESIDE_AMX if may_use_amx else _MOST_FEW
    if is_shared and statically_known_true(queries <= most_few):  # others were not timed by it on AVX-512
        return _FEW_QUERIES
    if statically_known_true(queries < (_LEAST_FOR_AMX if may_use_amx else _LEAST_FOR_AVX512)):
        return None
    if may_use_amx:
        return _AMX
    return _AVX512_BF16 if q.dtype is torch.bfloat16 and _multiplies_bfloat16_fast() else _AVX512


def _fit(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any]) -> bool:
    """Tell whether k and v are alike, and q has as many batches, and each of their heads serves as many of q's."""
    return are_equal_now(k, v) and same_sizes((q[0], q[3], q[1] % k[1]), (k[0], k[3], 0))


def _can_be_read_as_if_expanded(mask: Sequence[Any], scores: Sequence[Any]) -> bool:
    wanted = scores[len(scores) - len(mask) :]
    return len(mask) in (2, 4) and all(
        equal(size, 1) or equal(size, full) for size, full in zip(mask, wanted, strict=True)
    )


def _has_avx512() -> bool:
    return isinstance(pick_vec_isa(), VecAVX512)


def _has_avx2() -> bool:
    return isinstance(pick_vec_isa(), VecAVX2)


def _has_amx() -> bool:
    """Tell whether CPU, compiler and operating system know what the kernel needs of AMX and AVX-512."""
    may_compile = isinstance(pick_vec_isa(), VecAMX)
    return may_compile and cpu_isa() is Isa.AMX and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _multiplies_bfloat16_fast() -> bool:
    """Tell whether `vdpbf16ps` is known to multiply more numbers a cycle than FMAs of float32.

    On AMD's Zen 4 it is twice as many. On a Xeon with AMX it is half as many, also where a hypervisor hides AMX.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and str(capabilities.get("cpu_name", "")).startswith("AMD")


@register_lowering(torch.ops.qfuse.attention.default, type_promotion_kind=None)
def attention(q: Any, k: Any, v: Any, mask: Any | None, is_causal: bool, scale: float | None) -> ir.TensorBox:
    """Lower `qfuse::attention`; by the reference, if that fails."""
    layout = _like(q, V.graph.current_node.meta["val"])
    if layout.stride[-1] != 1:  # the kernel stores the elements of a row next to each other
        return cast(ir.TensorBox, _reference(q, k, v, mask, is_causal, scale))
    try:
        operands: Any = V.graph.current_node.args
        kernel = kernel_for(fake_value(operands[0]), fake_value(operands[1]))
        if kernel is not None:  # unless a size became known since the op was chosen
            q_rows, k_rows, v_rows, mask_rows = map(_rows_in_memory, (q, k, v, mask))
            return AttentionTemplate(kernel, layout, q_rows, k_rows, v_rows, mask_rows, is_causal, scale).output()
    except Exception:
        log.warning("the attention kernel failed, ATen's runs instead. Please report this.", exc_info=True)
    return cast(ir.TensorBox, _reference(q, k, v, mask, is_causal, scale))


_reference = fallback_handler(torch.ops.qfuse.attention.default, add_to_fallback_set=False)


def _like(q: Any, value: torch.Tensor) -> ir.FixedLayout:
    return ir.FixedLayout(q.get_device(), q.get_dtype(), q.get_size(), convert_shape_to_inductor(value.stride()))


def _rows_in_memory(tensor: Any | None) -> Any | None:
    """Return `tensor` in memory, the elements of a row next to each other."""
    if tensor is None:
        return None
    stored = ir.InputsKernel.unwrap_storage_for_input(in_memory(tensor))
    if stored.get_stride()[-1] == 1:
        return stored
    return ir.InputsKernel.unwrap_storage_for_input(ir.ExternKernel.require_contiguous(tensor))


class AttentionTemplate(CppTemplate):
    """The kernel of one attention. q, k, v, mask: buffers or views of such."""

    def __init__(
        self,
        kernel: Kernel,
        layout: ir.Layout,
        q: Any,
        k: Any,
        v: Any,
        mask: Any | None,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        self.kernel = kernel
        self.operands = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
        super().__init__("attention", list(self.operands.values()), layout, parallel_num_threads())
        self.is_causal = is_causal
        self.head = int(layout.size[-1])
        self.scale = self.head**-0.5 if scale is None else scale

    def output(self) -> ir.TensorBox:
        """Return the result of a call of the kernel. There is no other choice, so nothing is benchmarked."""
        buffer: Any = ir.CppTemplateBuffer(self.layout, self.input_nodes, self._make_kernel_render, self, None)  # type: ignore[arg-type]
        buffer.allow_epilogue_fusion = False
        return ir.TensorBox.create(buffer)

    def _make_kernel_render(self, node: Any, **unused: Any) -> tuple[CppTemplateKernel, Callable[[], str]]:
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=self.num_threads)
        return kernel, partial(kernel.render, self, output=node)

    def render(self, kernel: Any, output: Any, **unused: Any) -> str:  # type: ignore[override]
        """Spell out the kernel."""
        inputs: dict[str, tuple[str, Any]] = {}  # by buffer: query, key and value are often slices of one
        for name, node in self.operands.items():
            inputs.setdefault(node.get_name(), (name, node))
        mask = self.operands.get("mask")
        return self._template_from_string(_TEMPLATE).render(
            template=self,
            kernel=kernel,
            texts=self.kernel.texts(),
            class_name=self.kernel.class_name,
            needs_amx=self.kernel is _AMX,
            inputs=dict(inputs.values()),
            **self.operands | {"mask": mask},
            out=output,
            mask_type=DTYPE_TO_CPP[self.layout.dtype if mask is None else mask.get_dtype()],
            mask_strides=partial(_broadcast_strides, kernel, mask),  # later: `def_kernel` names the symbols
            symbols=[size for node in self.input_nodes for size in _symbolic(node)],
            d=self.head,
            type=DTYPE_TO_CPP[self.layout.dtype],
            is_causal=self.is_causal,
            scale=self.scale,
            num_threads=self.num_threads,
            parallel_products=_PARALLEL_PRODUCTS,
        )


def _symbolic(node: Any) -> list[Any]:
    """Return the expressions of a layout. Inductor reads them off one view of each buffer by itself."""
    layout = node.get_layout()
    return [*layout.size, *layout.stride, layout.offset]


def _broadcast_strides(kernel: Any, mask: Any | None) -> list[str]:
    """Return the strides of a mask as one of [B, H, M, N]: 0 where it is broadcast."""
    if mask is None:
        return ["0"] * 4
    sizes = mask.get_size()
    is_one = [V.graph.sizevars.statically_known_equals(size, 1) for size in sizes]
    strides = ["0" if one else kernel.stride(mask, dim) for dim, one in enumerate(is_one)]
    return ["0"] * (4 - len(sizes)) + strides
