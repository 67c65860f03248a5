"""Inductor's vector code, made faster while a template is rendered: `vector_math.h`'s functions, longer vectors."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.codegen.cpp import CppVecKernel, CppVecOverrides, TilingSelect
from torch._inductor.codegen.cpp_utils import CppCSEVariable, cexpr_index
from torch._inductor.cpu_vec_isa import pick_vec_isa

VECTOR_MATH = (Path(__file__).parent / "vector_math.h").read_text()


#: These turn a small error into a large one by cancellation alone. The rough functions are exact where that is usual:
#: exp near 0, sigmoid at 0, and erf where it rounds to ±1, for GELU's 1 + erf.
_SUMS_AND_PRODUCTS = {"load", "constant", "to_dtype", "add", "mul", "neg", "truediv"}
_ROUGH = {"exp", "erf", "sigmoid"}
_FUNCTIONS = _ROUGH | {"tanh"}


def stores_fast(used: Set[str]) -> bool:
    """Tell whether operators take little time."""
    return not used & _FUNCTIONS


@contextlib.contextmanager
def fast_math(stored: Set[torch.dtype], used: Set[str]) -> Iterator[None]:
    """Let Inductor's C++ code generation call the functions of `VECTOR_MATH`, which the source has to include.

    It computes two vectors of floats at a time.

    stored: the dtypes that the kernel stores. used: the operators that are fused into it. Functions may be rougher
    where only bfloat16 is stored, and nothing but sums and products of them.
    """
    functions = {"exp": "exp", "erf": "erf", "tanh": "tanh", "sigmoid": "sigmoid", "truediv": "div"}
    is_rough = stored == {torch.bfloat16} and used <= _SUMS_AND_PRODUCTS | _FUNCTIONS
    if is_rough:
        functions |= {name: f"rough_{name}" for name in _ROUGH}
    original, select = CppVecKernel.get_to_dtype_expr, TilingSelect.select_tiling
    load_line = CppVecKernel._get_vec_load_line

    def converted(self: Any, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"^at::vec::convert<", "qfuse::convert<", original(self, *args, **kwargs))

    def loaded(self: Any, var: str, index: Any, dtype: torch.dtype, load_mask: Any = None) -> str:
        line = str(load_line(self, var, index, dtype, load_mask))
        # AVX2's `Vectorized<int32_t>`, told how many to load, copies them in memory, even a whole vector (torch 2.13).
        bits = self._get_num_vectors(dtype) * self.vec_isa.bit_width()
        is_whole, count = 8 * dtype.itemsize * self.num_elems == bits, f", {cexpr_index(self.num_elems)})"
        is_plain = "::loadu(" in line and line.endswith(count)
        return line.removesuffix(count) + ")" if is_whole and is_plain else line

    def tiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        factors, indices, stats = select(self, *args, **kwargs)
        # Both vectors are one of bfloat16: a store instead of two of half a vector.
        lanes = pick_vec_isa().nelements(torch.float32)
        return [2 * lanes] if factors == [lanes] else factors, indices, stats

    with contextlib.ExitStack() as stack:
        if is_rough:
            stack.enter_context(_gelu_as_one())
        for name, function in functions.items():
            stack.enter_context(patch.object(CppVecOverrides, name, _calls(name, function)))
        stack.enter_context(patch.object(CppVecKernel, "get_to_dtype_expr", converted))
        stack.enter_context(patch.object(CppVecKernel, "_get_vec_load_line", loaded))
        stack.enter_context(patch.object(TilingSelect, "select_tiling", tiled))
        yield


@contextlib.contextmanager
def _gelu_as_one() -> Iterator[None]:
    """Let x/2 · (1 + erf(x · √½)), as Inductor decomposes GELU, be one function; what it was made of is dead code."""
    product, update = CppVecOverrides.mul, CppCSEVariable.update_on_args

    def updated(self: Any, name: str, args: Any, kwargs: Any) -> None:
        update(self, name, args, kwargs)
        self.qfuse_origin = name, args

    def multiplied(a: Any, b: Any) -> str:
        for half, other in ((a, b), (b, a)):
            x, erf = _operand("mul", half, 0.5), _operand("add", other, 1.0)
            name, args = _origin(erf)
            if x is not None and name == "erf" and _operand("mul", args[0], math.sqrt(0.5)) is x:
                return f"qfuse::rough_gelu({x})"
        return str(product(a, b))

    with (
        patch.object(CppVecOverrides, "mul", _named("mul", multiplied)),
        patch.object(CppCSEVariable, "update_on_args", updated),
    ):
        yield


def _origin(variable: Any) -> tuple[str, Any]:
    """Return the operator that a variable is the result of, and its operands."""
    return getattr(variable, "qfuse_origin", ("", ()))


def _operand(operator: str, variable: Any, constant: float) -> Any:
    """Return the other operand, if the variable is the result of this operator on a constant; else None."""
    name, args = _origin(variable)
    for operand, other in (args, reversed(args)) if name == operator else ():
        kind, value = _origin(other)
        if kind == "constant" and value[0] == constant:
            return operand
    return None


def _calls(operator: str, name: str) -> Any:
    return _named(operator, lambda *operands: f"qfuse::{name}({', '.join(map(str, operands))})")


def _named(operator: str, function: Any) -> Any:
    """Return what may replace an operator: of scalars, Inductor asks the class above for the function's name."""
    function.__name__ = operator
    return staticmethod(function)
