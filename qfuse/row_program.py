"""Arithmetic on the rows of a matrix, as a value: what a graph does between an activation and its quantization.

A program takes v, [M, K]. Each instruction computes an *element* value, [M, K], or a *row* value, one number a row,
which is [M, 1] where it meets elements. A reduction over the row makes a row value of an element value; everything else
is pointwise. The instructions are the graph's own, in its dtypes: nothing is reordered, and what the graph rounds to
bfloat16 is rounded. So every implementation returns the same bits.

As text, which is how a program travels in a graph: `instruction; …; -> outputs`, with `%0` for v and `%i` for the
result of instruction i, e.g. `abs:float32 %0; amax:float32 %1; div:float32 %0 %2; -> %3 %2`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten

Number = int | float | bool


@dataclass(frozen=True)
class Ref:
    """The value of an instruction, by its index; 0 is the program's input."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


Operand = Ref | Number

#: Reductions over the row. NaN anywhere in the row makes the result NaN.
REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "amin": lambda x: torch.amin(x, -1, keepdim=True),
    "amax": lambda x: torch.amax(x, -1, keepdim=True),
}

COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}

#: Pointwise operators, as their eager implementation. `convert` is apart, because it needs the dtype.
POINTWISE: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "round": torch.round,
    "add": torch.add,
    "sub": lambda a, b: torch.rsub(b, a) if isinstance(a, Number) else torch.sub(a, b),
    "mul": torch.mul,
    "div": torch.div,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "where": torch.where,
    **COMPARISONS,
}


@dataclass(frozen=True)
class Instruction:
    """One operator, the dtype of its result, and its operands."""

    op: str
    dtype: torch.dtype
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        return f"{self.op}:{str(self.dtype).removeprefix('torch.')} {' '.join(map(str, self.operands))}"

    @property
    def refs(self) -> tuple[int, ...]:
        """The indices of the values that it takes."""
        return tuple(o.index for o in self.operands if isinstance(o, Ref))


@dataclass(frozen=True)
class RowProgram:
    """Instructions, of which the first has index 1, and the indices of the values that the program returns."""

    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        return "; ".join([*map(str, self.instructions), "-> " + " ".join(f"%{o}" for o in self.outputs)])

    @classmethod
    @functools.lru_cache
    def parse(cls, text: str) -> RowProgram:
        """Read what `str` writes."""
        *instructions, outputs = text.split("; ")
        return cls(
            tuple(map(_parse_instruction, instructions)), tuple(int(o[1:]) for o in outputs.removeprefix("-> ").split())
        )

    def dtype(self, index: int, of_input: torch.dtype) -> torch.dtype:
        """Return the dtype of a value. of_input: that of v."""
        return of_input if index == 0 else self.instructions[index - 1].dtype

    @functools.cached_property
    def elements(self) -> frozenset[int]:
        """The values that are [M, K]; the others are [M, 1]."""
        found = {0}
        for index, instruction in enumerate(self.instructions, 1):
            if instruction.op not in REDUCTIONS and found.intersection(instruction.refs):
                found.add(index)
        return frozenset(found)

    def __call__(self, v: Tensor) -> list[Tensor]:
        """Run the program eagerly, operator by operator, as the graph would have run: the reference.

        v: [M, K]. Returns [M, K] for element values and [M] for row values.
        """
        values = [v]
        for instruction in self.instructions:
            operands = [values[o.index] if isinstance(o, Ref) else o for o in instruction.operands]
            values.append(_run(instruction, operands))
        return [values[o] if o in self.elements else values[o].reshape(-1) for o in self.outputs]


def _run(instruction: Instruction, operands: list[Tensor | Number]) -> Tensor:
    if instruction.op == "convert":
        (operand,) = operands
        assert isinstance(operand, Tensor)
        return operand.to(instruction.dtype)
    if instruction.op in ("minimum", "maximum"):  # which take no numbers
        like = next(o for o in operands if isinstance(o, Tensor))
        operands = [torch.as_tensor(o, dtype=instruction.dtype, device=like.device) for o in operands]
    function = REDUCTIONS.get(instruction.op) or POINTWISE[instruction.op]
    # only `where` of two numbers has another dtype than the graph had
    return function(*operands).to(instruction.dtype)


def _parse_instruction(text: str) -> Instruction:
    head, *operands = text.split(" ")
    op, dtype = head.split(":")
    return Instruction(op, getattr(torch, dtype), tuple(map(_parse_operand, operands)))


def _parse_operand(text: str) -> Operand:
    if text.startswith("%"):
        return Ref(int(text[1:]))
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.lstrip("-").isdigit() else float(text)
