"""`qfuse.config.verify`: run each fusion beside the graph it replaces, on example values, before it is accepted.

Slow, and for those who want to know: the fused op is compiled by itself, as it will be lowered, and has to be as near
to the result in float64 as the unfused graph is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qfuse.constants import Constants, ancestors
from qfuse.inductor import compile_frozen_graph, concrete, fake_value, real_tensors
from qfuse.normal_form import QLinear

aten, prims = torch.ops.aten, torch.ops.prims

#: How much larger than the unfused graph's the error may be, and what is granted for the order of float32 operations.
TOLERANCE, FLOAT32_ULPS = 1.05, 4


def difference(form: QLinear, result: Node, constants: Constants) -> str | None:
    """Return why `result`, the fused op, is not as good as `form.value`, or None if it is."""
    with real_tensors():
        operands = _operands(form)
        leaves = {node: _example(node, form) for node in operands if node not in constants}
        known: dict[Node, Any] = leaves | {node: constants.value(node) for node in operands if node in constants}
        for other in ancestors(form.value, known, _is_input):  # a branch that is not taken, say
            if other.op == "placeholder" and other not in constants and isinstance(fake_value(other), torch.Tensor):
                known[other] = _example(other, form)
        unfused = _evaluate(form.value, known, constants, _run)
        exact = _evaluate(form.value, {n: _double(v) for n, v in known.items()}, constants, _run_in_float64)
        fused = _run_fused(result, leaves, constants)
        if fused.shape != unfused.shape or fused.dtype != unfused.dtype:
            return f"the fused op returns {fused.dtype} {tuple(fused.shape)}"
        before, after = _error(unfused, exact), _error(fused, exact)
        if after <= TOLERANCE * before + FLOAT32_ULPS * torch.finfo(torch.float32).eps:
            return None
        return f"verification failed: the relative error against float64 is {after:.2g}, and {before:.2g} unfused"


def _operands(form: QLinear) -> list[Node]:
    """Return the tensors that the form is made of."""
    products = (form.scales, *form.offsets)
    operands = [form.x, form.weight, *(f.operand for product in products for f in product)]
    return [operand for operand in dict.fromkeys(operands) if isinstance(operand, Node)]


def _example(leaf: Node, form: QLinear) -> torch.Tensor:
    """Return random values for a leaf: integers over their range, and scales of a usual size."""
    fake = fake_value(leaf)
    shape = [concrete(d) for d in fake.shape]
    if leaf is form.x or leaf is form.weight:
        info = torch.iinfo(form.x_dtype if leaf is form.x else torch.int8)
        values = torch.randint(info.min, info.max + 1, shape)
    elif fake.dtype.is_floating_point:
        values = torch.rand(shape) / 10 + 0.01
    else:
        values = torch.randint(-10, 11, shape)
    return values.to(fake.dtype)


def _evaluate(node: Node, known: dict[Node, Any], constants: Constants, run: Callable[..., Any]) -> torch.Tensor:
    """Compute `node` from `known` values and parameters; what is folded in the end is rounded like the rest."""
    values = dict(known)
    for needed in ancestors(node, values, _is_input):
        if not isinstance(fake_value(needed), torch.Tensor):
            values[needed] = concrete(fake_value(needed))
        elif needed.op != "call_function":
            values[needed] = constants.value(needed)
        else:
            args, kwargs = map_arg((needed.args, needed.kwargs), values.__getitem__)
            values[needed] = run(needed.target, args, kwargs)
    result: torch.Tensor = values[node]
    return result


def _is_input(node: Node) -> bool:
    """Tell whether `node` is given: an input or an attribute of the graph, or a size, of which an example will do."""
    return node.op != "call_function" or not isinstance(fake_value(node), torch.Tensor)


def _run(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _run_in_float64(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Compute without rounding: every float is float64, and stays so."""
    args = tuple(_double(a) for a in args)
    if target is prims.convert_element_type.default and args[1].is_floating_point:
        return args[0].double()
    return _double(target(*args, **kwargs))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _run_fused(result: Node, leaves: dict[Node, torch.Tensor], constants: Constants) -> torch.Tensor:
    """Compile what has been emitted for `result`, as Inductor will, and run it on the leaves."""
    graph, attributes = Graph(), {}
    copies: dict[Node, Any] = {leaf: graph.placeholder(f"leaf{i}") for i, leaf in enumerate(leaves)}
    for node in ancestors(result, copies, lambda n: n in constants or _is_input(n)):
        if not isinstance(fake_value(node), torch.Tensor):
            copies[node] = concrete(fake_value(node))
        elif node in constants:
            attributes[node.name] = constants.value(node)
            copies[node] = graph.get_attr(node.name)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    graph.output((copies[result],))
    module = GraphModule(attributes, graph)
    inputs = list(leaves.values())
    (fused,) = compile_frozen_graph(module, inputs)(list(inputs))
    return fused


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest deviation in any column, relative to the largest value of that column."""
    columns = exact.shape[-1]
    deviation = (result.double() - exact).abs().reshape(-1, columns).amax(0)
    largest = exact.abs().reshape(-1, columns).amax(0).clamp_min(1e-30)
    return float((deviation / largest).max())
