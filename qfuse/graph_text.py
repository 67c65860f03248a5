"""Parts of a graph as lines that a person can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

#: Arguments beyond this are cut: a graph's output has hundreds.
_LONGEST = 160


def lines(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Return a line for each of `nodes`, which are in order, and indented in front of it what it takes from elsewhere.

    %name = op(arguments) : dtype[shape]
    """
    return tuple(_lines(nodes))


def _lines(nodes: Sequence[Node]) -> Iterator[str]:
    told: set[Node] = set(nodes)
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in told:
                told.add(operand)
                yield f"    {_line(operand)}"
        yield _line(node)


def _line(node: Node) -> str:
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    called = f"({', '.join(arguments)})" if node.op in ("call_function", "output") else ""
    if len(called) > _LONGEST:
        called = called[: _LONGEST - 2] + "…)"
    return f"%{node.name} = {operator(node)}{called}{_type(node.meta.get('val'))}"


def operator(node: Node) -> str:
    """Return what `node` computes, as in a graph's own print."""
    if node.op == "get_attr":
        return f"get_attr {node.target}"
    if node.op != "call_function":
        return node.op  # placeholder, output
    return getattr(node.target, "__name__", "") if "built-in" in str(node.target) else str(node.target)


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_argument, value))}]"
    return str(value).removeprefix("torch.")


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f" : {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return "" if value is None or isinstance(value, list | tuple | dict) else f" : {value}"
