"""What is known about a graph's constants when it is matched, which is before Inductor freezes it."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qfuse.inductor import freezes, frozen_inputs, real_tensors


class Constants:
    """The nodes of a graph that freezing will fold, and their values."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._freezes = freezes()
        self._values: dict[Node, Any] = dict(frozen_inputs(graph))
        self._known = set(self._values)
        for node in graph.nodes:
            if self._is_constant(node):
                self._known.add(node)

    def __contains__(self, node: object) -> bool:
        """Tell whether `node` is computed from constants and frozen parameters alone."""
        return isinstance(node, Node) and (node in self._known or self._is_constant(node))

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            return self._freezes
        if node.op != "call_function" or node.is_impure():
            return False
        # what has no input, like a `full`, is a constant; what is random is impure
        return all(i in self._known for i in node.all_input_nodes)

    def value(self, node: Node) -> torch.Tensor:
        """Compute the value of a constant node, inside `real_tensors`. `node in self` must hold."""
        for needed in ancestors(node, self._values):
            self._values[needed] = self._evaluate(needed)
        value: torch.Tensor = self._values[node]
        return value

    def _evaluate(self, node: Node) -> Any:
        if node.op == "get_attr":
            value: Any = self._graph.owning_module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        target = node.target
        assert callable(target)
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        return target(*args, **kwargs)


def ancestors(node: Node, known: Container[Node], is_leaf: Callable[[Node], bool] | None = None) -> list[Node]:
    """Return what `node` is computed from, itself included, inputs first; without what is known, and down to leaves."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one in found or one in known:
            continue
        found.add(one)
        if is_leaf is None or not is_leaf(one):
            waiting += one.all_input_nodes
    return [n for n in node.graph.nodes if n in found]


def is_zero(operand: object, constants: Constants) -> bool:
    """Tell whether an operand is the number zero, a constant of zeros, or a product with such a factor."""
    if isinstance(operand, int | float):
        return operand == 0
    if not isinstance(operand, Node):
        return False
    if operand in constants:
        with real_tensors():
            return not constants.value(operand).any()
    if operand.target is torch.ops.aten.mul.Tensor:
        return any(is_zero(factor, constants) for factor in operand.args)
    return False
