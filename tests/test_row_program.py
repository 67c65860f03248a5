"""Every operator that a quantization may be made of, with operands of every kind.

What is read as a program returns what eager returns, and there is a kernel that does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import compile_together
from torch import Tensor
from torch.fx import Graph, Node

from qfuse.quantization import _NAMES, _Reader

aten, prims = torch.ops.aten, torch.ops.prims
pytestmark = pytest.mark.usefixtures("exact_casts")

_ELEMENTS = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.bool)
_ROWS = (torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool)
_NUMBERS = (3, 300, 1 << 33, 0.1, True)


class Eager:
    """A graph of which each node is computed when it is made. v: [M, K]."""

    def __init__(self, v: Tensor) -> None:
        self.graph = Graph()
        self.v = self.graph.placeholder("v")
        self.v.meta["val"] = v

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node, unless eager refuses it, with an error."""
        value = target(*(a.meta["val"] if isinstance(a, Node) else a for a in args), **kwargs)
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    def converted(self, node: Node, dtype: torch.dtype) -> Node:
        """Add a conversion of what is in the range of `dtype`."""
        if not dtype.is_floating_point and node.meta["val"].is_floating_point():
            info = torch.iinfo(torch.int16 if dtype.itemsize > 1 else dtype)
            node = self.call(aten.clamp.default, node, info.min, info.max)
        return self.call(prims.convert_element_type.default, node, dtype)

    def output(self, node: Node, is_element: bool) -> Node:
        """Add what a program may return of a value: what is stored as bytes would hide that it is more than a byte."""
        if node.meta["val"].dtype in (torch.int8, torch.uint8, torch.int16):
            node = self.call(aten.mul.Tensor, self.converted(node, torch.float32), 0.25)
        return self.converted(node, torch.int8) if is_element else node

    def operands(self) -> list[Node]:
        """Add elements and values of rows, of every dtype, the ends of their ranges among them."""
        row = self.call(aten.amax.default, self.v, [-1], True)
        found = []
        for source, dtypes in ((self.v, _ELEMENTS), (row, _ROWS)):
            large = self.call(aten.mul.Tensor, source, 64)
            found += [
                self.converted(source if d.is_floating_point else large, d) for d in dtypes if d is not torch.bool
            ]
            found.append(self.call(aten.gt.Scalar, source, 1.5))
        return found


def _calls(name: str, target: Any, operands: list[Node], numbers: list[Node]) -> Iterator[tuple[Any, ...]]:
    """Return what an operator of the graph may be called with."""
    count = sum(argument.name != "alpha" for argument in target._schema.arguments)
    if name == "convert":
        return itertools.product(operands, {*_ELEMENTS, *_ROWS})
    if name == "where":
        conditions = [o for o in operands if o.meta["val"].dtype is torch.bool]
        return itertools.product(conditions, operands, [*operands, *numbers])
    takes_numbers = target._schema.arguments[-1].type.kind() == "NumberType"
    others = [_NUMBERS if takes_numbers else [*operands, *numbers]] * (count - 1)
    return itertools.product(operands, *others)


def _read(v: Tensor, name: str) -> tuple[_Reader, dict[Node, Node]]:
    """Read all that an operator may be called with: what is read, with what a program returns of it."""
    eager = Eager(v)
    operands = eager.operands()
    reader = _Reader(eager.v)
    for node in [*eager.graph.nodes][1:]:
        assert reader.read(node) is None
    numbers = [eager.call(aten.scalar_tensor.default, n, dtype=torch.tensor(n).dtype) for n in _NUMBERS]
    outputs: dict[Node, Node] = {}
    for target in (target for target, each in _NAMES.items() if each == name):
        for args in _calls(name, target, operands, numbers):
            try:
                node = eager.call(target, *args)
            except (RuntimeError, TypeError):
                continue  # nor does eager
            if reader.read(node) is not None:
                continue
            start = len(eager.graph.nodes)
            outputs[node] = eager.output(node, reader.is_element(node))
            assert all(reader.read(each) is None for each in [*eager.graph.nodes][start:])
    return reader, outputs


def _assert_equal(values: list[Tensor], nodes: list[Node]) -> None:
    for value, node in zip(values, nodes, strict=True):
        expected = node.meta["val"]
        assert value.dtype is expected.dtype
        assert torch.equal(value.reshape(expected.shape), expected), node.all_input_nodes[0].format_node()


def _features(reader: _Reader, name: str, node: Node) -> set[tuple[Any, ...]]:
    """Return what decides which functions a kernel calls: to compute, and to convert what they take."""
    is_element, dtype = reader.is_element(node), node.meta["val"].dtype
    found: set[tuple[Any, ...]] = {(name, is_element, dtype)}
    for operand in node.args:
        known = isinstance(operand, Node) and operand in reader.values
        of = (reader.is_element(operand), _kind(operand.meta["val"].dtype)) if known else ()
        found.add((is_element, _kind(dtype), *of))
    return found


def _kind(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a kernel computes in."""
    return dtype if dtype in (torch.bool, torch.float64) else torch.float32 if dtype.is_floating_point else torch.int32


def test_whatever_is_read(subtests: pytest.Subtests) -> None:
    v = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.1, 1.0, 2.0, 4.0]).repeat(9, 9)[:, :67].bfloat16()
    v += torch.arange(9)[:, None] / 4
    seen: set[tuple[Any, ...]] = set()
    programs, expected = [], []
    for name in dict.fromkeys(_NAMES.values()):
        reader, outputs = _read(v, name)
        assert len(outputs) > 3
        nodes = [*{reader.index(output): output for output in outputs.values()}.values()]
        with subtests.test(name):  # every one is what eager computes
            _assert_equal(copy.copy(reader).program(nodes)(v), nodes)
        new = {}  # of those that call the same functions, there is a kernel of the first
        for node, output in outputs.items():
            if not (features := _features(reader, name, node)) <= seen:
                seen |= features
                new[reader.index(output)] = output
        programs.append(copy.copy(reader).program([*new.values()]))
        expected.append([*new.values()])

    def run(v: Tensor) -> list[list[Tensor]]:
        return [torch.ops.qfuse.quantize_rows(v, str(program)) for program in programs]

    (results,), _ = compile_together([run], [(v,)])
    for name, result, nodes in zip(dict.fromkeys(_NAMES.values()), results, expected, strict=True):
        with subtests.test(f"kernel of {name}"):
            _assert_equal(result, nodes)
