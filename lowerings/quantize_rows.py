"""The Inductor lowerings of `qfuse::quantize_rows`, with and without a norm in front.

On CPU it is one C++ kernel, which reads each row from memory once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.utils import Placeholder, parallel_num_threads
from torch._inductor.virtualized import V

from qfuse.lowerings import quantize_rows_inductor
from qfuse.lowerings.call import in_memory
from qfuse.norm_op import norm_quantize_rows_reference  # noqa: F401  registers the op
from qfuse.quantize_op import quantize_rows_reference  # noqa: F401  registers the op
from qfuse.row_program import COMPARISONS, REDUCTIONS, Instruction, Operand, Ref, RowProgram

log = logging.getLogger("qfuse.lowerings")

_FOLDER = Path(__file__).parent
_TEMPLATE = (_FOLDER / "templates" / "quantize_rows.cpp.jinja").read_text()
_NORM = (_FOLDER / "cpp" / "row_norm.h").read_text()

#: Fewer elements than this are not worth waking other threads.
_PARALLEL_ELEMENTS = 1 << 14

_HALVES = (torch.bfloat16, torch.float16)

#: Operators whose results any dtype holds that holds their operands: there is nothing to round.
_EXACT = ("round", "minimum", "maximum", "where")
#: Of floats, these as well; but −(−128) is no int8.
_EXACT_FLOATS = (*_EXACT, "neg", "abs")


@register_lowering(torch.ops.qfuse.quantize_rows.default, type_promotion_kind=None)
def quantize_rows(v: Any, program: str) -> list[ir.TensorBox]:
    """Lower `qfuse::quantize_rows`; by the reference, if that fails."""
    try:
        if v.get_device().type != "cpu":
            return quantize_rows_inductor.lower(v, RowProgram.parse(program))
        return _kernel(v, RowProgram.parse(program))
    except Exception:
        log.warning("the quantization kernel failed, eager runs instead. Please report this.", exc_info=True)
    outputs: list[ir.TensorBox] = _reference(v, program)
    return outputs


_reference = fallback_handler(torch.ops.qfuse.quantize_rows.default, add_to_fallback_set=False)


@register_lowering(torch.ops.qfuse.norm_quantize_rows.default, type_promotion_kind=None)
def norm_quantize_rows(
    x: Any, weight: Any | None, bias: Any | None, eps: float, is_centered: bool, dtype: torch.dtype, program: str
) -> list[ir.TensorBox]:
    """Lower `qfuse::norm_quantize_rows`; by the reference, if that fails."""
    if x.get_device().type == "cpu" and x.get_size()[1].is_Integer:  # the pass sees to both
        try:
            weight, bias = (None if c is None else _rows_in_memory(c) for c in (weight, bias))
            return _kernel(x, RowProgram.parse(program), _Norm(weight, bias, eps, is_centered, dtype))
        except Exception:
            log.warning("the kernel of a norm failed, eager runs instead. Please report this.", exc_info=True)
    outputs: list[ir.TensorBox] = _norm_reference(x, weight, bias, eps, is_centered, dtype, program)
    return outputs


_norm_reference = fallback_handler(torch.ops.qfuse.norm_quantize_rows.default, add_to_fallback_set=False)


def _kernel(x: Any, program: RowProgram, norm: _Norm | None = None) -> list[ir.TensorBox]:
    return QuantizeRows(_rows_in_memory(x), program, norm).outputs()


def _rows_in_memory(tensor: Any) -> Any:
    """Return `tensor` in memory, the elements of a row next to each other."""
    tensor = in_memory(tensor)
    if not _has_contiguous_rows(tensor):
        tensor = ir.ExternKernel.require_contiguous(tensor)
    return ir.InputsKernel.unwrap_storage_for_input(tensor)


def _has_contiguous_rows(v: Any) -> bool:
    layout = v.maybe_get_layout()
    return isinstance(layout, ir.FixedLayout) and layout.stride[-1] == 1


@dataclass(frozen=True)
class _Norm:
    """The arguments of a norm, see `qfuse.norm_op`, without x. weight, bias: in memory, or None."""

    weight: Any | None
    bias: Any | None
    eps: float
    is_centered: bool
    dtype: torch.dtype


class QuantizeRows(CppTemplate):
    """The kernel of one program on the rows of x, [M, K], or on what a norm makes of them: the first output then.

    x: each row contiguous.
    """

    def __init__(self, x: Any, program: RowProgram, norm: _Norm | None = None) -> None:
        m, k = x.get_size()
        self.program, self.norm = program, norm
        self._row_dtype = norm.dtype if norm else x.get_dtype()
        self.layouts = [ir.FixedLayout(x.get_device(), norm.dtype, [m, k])] if norm else []
        self.layouts += [
            ir.FixedLayout(
                x.get_device(), program.dtype(output, self._row_dtype), [m, k] if output in program.elements else [m]
            )
            for output in program.outputs
        ]
        self.operands = {"x": x, "weight": norm and norm.weight, "bias": norm and norm.bias}
        nodes = [node for node in self.operands.values() if node is not None]
        super().__init__("quantize_rows", nodes, self.layouts[0], parallel_num_threads())
        _Code(program, self._row_dtype, range(len(program.outputs)))  # what fails had better fail now

    def outputs(self) -> list[ir.TensorBox]:
        """Return the results of a call of the kernel. There is no other choice, so nothing is benchmarked."""
        buffer: Any = ir.CppTemplateBuffer(self.layout, self.input_nodes, self._make_kernel_render, self, None)  # type: ignore[arg-type]
        buffer.outputs = [ir.MultiOutput(layout, buffer, [(list, i)]) for i, layout in enumerate(self.layouts)]
        buffer.layout = ir.MultiOutputLayout(device=self.layout.device)
        buffer.allow_epilogue_fusion = False
        return [ir.TensorBox.create(output) for output in buffer.outputs]

    def _make_kernel_render(self, node: Any, **unused: Any) -> tuple[CppTemplateKernel, Callable[[], str]]:
        # What later writes to x is a user too, a weak one, so that it comes later. That is settled by now, and
        # `CppScheduling.codegen_template` asserts that all users of such a template are its outputs (torch 2.13).
        buffer = V.graph.scheduler.name_to_buf[node.get_name()]
        buffer.users = [user for user in buffer.users if not user.is_weak]
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=self.num_threads)
        return kernel, partial(kernel.render, self, outputs=node.outputs)

    def render(self, kernel: Any, outputs: list[Any], **unused: Any) -> str:  # type: ignore[override]
        """Spell out the kernel. outputs: the buffers of the rows, if there is a norm, and of the program's outputs."""
        normalized, *results = outputs if self.norm else [None, *outputs]
        is_stored = normalized is not None and _is_used(normalized)
        used = {i: output for i, output in enumerate(results) if _is_used(output)}
        code = _Code(self.program, self._row_dtype, used)
        return self._template_from_string(_TEMPLATE).render(
            template=self,
            kernel=kernel,
            inputs=self.operands,
            outputs=({"normalized": normalized} if is_stored else {}) | {f"Y{i}": o for i, o in used.items()},
            **self.operands,
            row_type=DTYPE_TO_CPP[self._row_dtype],
            norm=self.norm,
            norm_header=_NORM,
            eps=_number(self.norm.eps) if self.norm else None,
            is_stored=is_stored,
            num_threads=self.num_threads,
            parallel_elements=_PARALLEL_ELEMENTS,
            carried=code.carried,
            rows=code.rows,
            elements=code.elements,
        )


def _is_used(output: Any) -> bool:
    return output.get_name() not in V.graph.removed_buffers


class _Code:
    """A program as C++: statements on numbers, once a row, and on lanes of numbers, along it.

    `x3` holds the value with index 3. Types: float, double, int64_t and bool for rows; F, I and B of the template for
    elements. used: the positions of the outputs that are.
    """

    def __init__(self, program: RowProgram, v_dtype: torch.dtype, used: Container[int]) -> None:
        self._program = program
        self._outputs = [(i, output) for i, output in enumerate(program.outputs) if i in used]
        self._v_dtype = v_dtype
        self._read_bits: set[int] = set()
        self.rows = list(self._rows())
        self.elements = list(self._elements())
        #: What the elements need to know of their row: types and names.
        self.carried = [(_type(self._dtype(index), False), f"x{index}") for index in self._carried()]

    def _rows(self) -> Iterator[str]:
        """Return the statements on the values of a row."""
        for index, one in enumerate(self._program.instructions, 1):
            if one.op in REDUCTIONS:
                yield from self._reduction(index, one)
            elif index not in self._program.elements:
                yield self._statement(index, one)
        for i, output in self._outputs:
            if output not in self._program.elements:
                yield f"Y{i}[m] = static_cast<{DTYPE_TO_CPP[self._dtype(output)]}>(x{output});"

    def _elements(self) -> Iterator[str]:
        """Return the statements on the elements of a row, from `k` on, `lanes` of them."""
        outputs = [(i, o) for i, o in self._outputs if o in self._program.elements]
        yield from self._computed([o for _, o in outputs])
        for i, output in outputs:
            yield f"q::store(row, Y{i} + m * K + k, x{output}, lanes);"

    def _carried(self) -> list[int]:
        used = {
            operand
            for index in self._needed([o for _, o in self._outputs if o in self._program.elements])
            for operand in (self._instruction(index).refs if index else ())
        }
        return sorted(used - self._program.elements)

    def _reduction(self, index: int, one: Instruction) -> Iterator[str]:
        (operand,) = one.refs
        if (bits := self._extremes(operand)) is not None:
            if operand not in self._read_bits:
                self._read_bits.add(operand)
                yield f"const auto e{operand} = {bits};"
            yield f"const float x{index} = e{operand}.{one.op}();"
            return
        limit = "-INFINITY" if one.op == "amax" else "INFINITY"
        function = "maximum" if one.op == "amax" else "minimum"
        yield f"q::F a{index}({limit});"
        yield "q::for_lanes(K, [&](int64_t k, auto lanes) {"
        for statement in self._computed([operand]):
            yield "    " + statement
        value = f"q::F(x{operand})"
        yield f"    a{index} = q::{function}(a{index}, q::first(row, {value}, q::F({limit}), lanes));"
        yield "});"
        yield f"const float x{index} = q::{one.op}(a{index});"

    def _extremes(self, operand: int) -> str | None:
        """Return the extremes of what can be read off the bits of v: v and its absolute value."""
        absolute = operand and self._instruction(operand).op == "abs" and self._instruction(operand).refs == (0,)
        if operand and not absolute:
            return None
        return f"q::extremes<{'true' if absolute else 'false'}>(row, K)"

    def _computed(self, values: Sequence[int]) -> Iterator[str]:
        """Return the statements that compute some element values, from v and what is known of the row."""
        for index in self._needed(values):
            if index:
                yield self._statement(index, self._instruction(index))
            else:
                yield "const q::F x0 = q::load(row + k, lanes);"

    def _needed(self, values: Sequence[int]) -> list[int]:
        """Return the element values that have to be computed for `values`, in order."""
        needed, waiting = set[int](), list(values)
        while waiting:
            index = waiting.pop()
            if index in self._program.elements and index not in needed:
                needed.add(index)
                source = self._rounded_source(index) if index else None
                waiting += ([source] if source is not None else self._instruction(index).refs) if index else []
        return sorted(needed)

    def _instruction(self, index: int) -> Instruction:
        return self._program.instructions[index - 1]

    def _dtype(self, index: int) -> torch.dtype:
        return self._program.dtype(index, self._v_dtype)

    def _statement(self, index: int, one: Instruction) -> str:
        element = index in self._program.elements
        value = self._converted(index, one) if one.op == "convert" else self._computed_by(index, one)
        return f"const {_type(one.dtype, element)} x{index} = {value};"

    def _computed_by(self, index: int, one: Instruction) -> str:
        element = index in self._program.elements
        of = self._dtype(one.refs[0]) if one.op in COMPARISONS else one.dtype
        operands = [
            self._operand(o, torch.bool if one.op == "where" and i == 0 else of, element)
            for i, o in enumerate(one.operands)
        ]
        value = f"q::{one.op}({', '.join(operands)})"
        exact = _EXACT_FLOATS if one.dtype.is_floating_point else _EXACT
        return value if one.op in exact else self._rounded(value, index, one.dtype)

    def _converted(self, index: int, one: Instruction) -> str:
        (operand,) = one.operands
        assert isinstance(operand, Ref)
        source, element = self._dtype(operand.index), index in self._program.elements
        value = f"x{operand.index}"
        if one.dtype is torch.bool and source is not torch.bool:
            return f"q::ne({value}, {self._operand(0, source, element)})"
        if source.is_floating_point and not one.dtype.is_floating_point:
            if not element:
                value = f"static_cast<int64_t>({value})"
            elif (nearest := self._rounded_source(index)) is not None:
                value = f"q::nearest({self._clamped(operand.index, nearest)})"
            else:
                value = f"q::truncated({value})"
        else:
            value = self._operand(operand, one.dtype, element)
        return self._rounded(value, index, one.dtype)

    def _operand(self, operand: Operand, dtype: torch.dtype, element: bool) -> str:
        """Return an operand in the type that is computed in."""
        kind = _type(dtype, element)
        scalar = {"q::F": "float", "q::I": "int64_t", "q::B": "bool"}.get(kind, kind)
        if not isinstance(operand, Ref):
            value = f"static_cast<{scalar}>({_number(operand)})"
        elif operand.index in self._program.elements:
            return (
                f"x{operand.index}" if _type(self._dtype(operand.index), True) == kind else f"{kind}(x{operand.index})"
            )
        elif _type(self._dtype(operand.index), False) == scalar:
            value = f"x{operand.index}"
        else:
            value = f"static_cast<{scalar}>(x{operand.index})"
        return f"{kind}({value})" if element else value

    def _rounded(self, value: str, index: int, dtype: torch.dtype) -> str:
        """Round a value to what its dtype can hold, unless it is known to be such."""
        if dtype in _HALVES:
            return f"q::rounded<{DTYPE_TO_CPP[dtype]}>({value})"
        if dtype.is_floating_point or dtype in (torch.bool, torch.int64):
            return value
        element = index in self._program.elements
        if element and (dtype is torch.int32 or index in self._ranges or self._is_low_byte_enough(index)):
            return value  # NaN is no integer of that range, but only its low byte is stored
        return f"q::wrapped<{DTYPE_TO_CPP[dtype]}>({value})"

    def _is_low_byte_enough(self, index: int) -> bool:
        """Tell whether an element is only stored as a byte, or computed with modulo 256."""
        users = [one for one in self._program.instructions if index in one.refs]
        return self._dtype(index).itemsize == 1 and all(
            one.op in ("add", "sub", "mul") and one.dtype.itemsize == 1 for one in users
        )

    def _rounded_source(self, index: int) -> int | None:
        """Of a conversion to integers, return what is rounded in front of it, with clamps to integers between.

        Clamping and rounding commute there, and a conversion can round by itself.
        """
        one = self._instruction(index)
        if one.op != "convert" or one.dtype.is_floating_point or one.dtype is torch.bool:
            return None
        (at,) = one.refs
        while at and self._instruction(at).op in ("clamp_min", "clamp_max"):
            clamp = self._instruction(at)
            if not _is_integer(clamp.operands[1]):
                return None
            (at,) = clamp.refs
        rounding = at and self._instruction(at).op == "round" and self._dtype(at) is torch.float32
        return self._instruction(at).refs[0] if rounding else None

    def _clamped(self, index: int, source: int) -> str:
        """Return the clamps between `source` and `index`, without the rounding."""
        one = self._instruction(index)
        inner = f"x{source}" if one.op == "round" else self._clamped(one.refs[0], source)
        if one.op == "round":
            return inner
        return f"q::{one.op}({inner}, {self._operand(one.operands[1], one.dtype, True)})"

    @cached_property
    def _ranges(self) -> dict[int, tuple[float, float]]:
        """The integer values that are known to be in the range of their dtype, and what they are between."""
        known: dict[int, tuple[float, float]] = {}
        found: dict[int, tuple[float, float]] = {}
        for index, one in enumerate(self._program.instructions, 1):
            between = _range(one, known)
            known[index] = between
            if not one.dtype.is_floating_point and one.dtype is not torch.bool:
                info = torch.iinfo(one.dtype)
                if info.min <= between[0] and between[1] <= info.max:
                    found[index] = between
                else:
                    known[index] = (info.min, info.max)
        return found


def _range(one: Instruction, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Return bounds of the result of an instruction, given those of its operands."""
    bounds = [
        known.get(o.index, (-math.inf, math.inf)) if isinstance(o, Ref) else (float(o), float(o)) for o in one.operands
    ]
    match one.op, bounds:
        case ("convert", [same]) if not one.dtype.is_floating_point:
            return same
        case "clamp_min", [(low, high), (bound, _)]:
            return max(low, bound), max(high, bound)
        case "clamp_max", [(low, high), (bound, _)]:
            return min(low, bound), min(high, bound)
        case "add", [(a, b), (c, d)] if not one.dtype.is_floating_point:
            return a + c, b + d
    return -math.inf, math.inf


def _is_integer(operand: Operand) -> bool:
    return not isinstance(operand, Ref) and float(operand).is_integer()


def _type(dtype: torch.dtype, element: bool) -> str:
    if dtype is torch.bool:
        return "q::B" if element else "bool"
    if dtype.is_floating_point:
        return "q::F" if element else "double" if dtype is torch.float64 else "float"
    return "q::I" if element else "int64_t"


def _number(value: int | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return repr(value)
