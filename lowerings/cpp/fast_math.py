"""Inductor's vector code for some operators, replaced by that of `vector_math.h` while a template is rendered."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.codegen.cpp import CppVecKernel, CppVecOverrides

VECTOR_MATH = (Path(__file__).parent / "vector_math.h").read_text()


@contextlib.contextmanager
def fast_math(stored: Set[torch.dtype]) -> Iterator[None]:
    """Let Inductor's C++ code generation call the functions of `VECTOR_MATH`, which the source has to include.

    stored: the dtypes that the kernel stores. If that is bfloat16 alone, they may be a little rougher.
    """
    functions = {name: name for name in ("exp", "erf", "tanh", "sigmoid")}
    if stored == {torch.bfloat16}:
        functions |= {name: f"rough_{name}" for name in ("exp", "erf", "sigmoid")} | {"truediv": "rough_div"}
    original = CppVecKernel.get_to_dtype_expr

    def converted(self: Any, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"^at::vec::convert<", "qfuse::convert<", original(self, *args, **kwargs))

    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(CppVecOverrides, name, _calls(function)))
        stack.enter_context(patch.object(CppVecKernel, "get_to_dtype_expr", converted))
        yield


def _calls(name: str) -> Any:
    return staticmethod(lambda *operands: f"qfuse::{name}({', '.join(map(str, operands))})")
