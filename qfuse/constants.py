"""What is known about a graph's constants when it is matched, which is before Inductor freezes it."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qfuse.inductor import frozen_inputs


class Constants:
    """The nodes of a graph that freezing will fold, and their values."""

    def __init__(self, graph: Graph) -> None:
        self._frozen = frozen_inputs(graph)
        self._known: dict[Node, bool] = {}

    def __contains__(self, node: Node) -> bool:
        """Tell whether `node` is computed from frozen parameters alone."""
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = self._is_constant(node)
        return known

    def _is_constant(self, node: Node) -> bool:
        if node.op == "placeholder":
            return node in self._frozen
        if node.op != "call_function" or node.is_impure() or not self._frozen:
            return False
        inputs = node.all_input_nodes
        return bool(inputs) and all(i in self for i in inputs)

    def value(self, node: Node) -> torch.Tensor:
        """Compute the value of a constant node, inside `real_tensors`. `node in self` must hold."""
        if node.op == "placeholder":
            return self._frozen[node]
        target = node.target
        assert callable(target)
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        result: torch.Tensor = target(*args, **kwargs)
        return result
