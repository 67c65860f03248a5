"""The second pass: the quantization in front of fused linears becomes one op, which reads its input once.

A dynamic quantization reduces each row to a scale, and a zero point perhaps, and then quantizes the row by them. In how
it computes both, no two producers agree, and torchao's releases do not either. So no recipe is looked for: the graph
between an activation v and the integers of a linear is read, operator by operator, as a program on the rows of v
(`qfuse.row_program`), whatever its arithmetic is, and rewritten into `qfuse::quantize_rows`.

v is where all ways from the integers upwards meet again, the reduction's among them. What else the graph computes from
values of rows (a scale times a zero point, say) goes into the program as well.
"""

from __future__ import annotations

import heapq
import logging
import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target

from qfuse.graph_text import operator as name_of
from qfuse.inductor import arguments_of, copy_origin, fake_value
from qfuse.match import assertions, erase_assertions
from qfuse.normal_form import Dim, columns, equal, is_of_rows, reshaped_input, same_shape, widened_input
from qfuse.quantize_op import quantize_rows_reference  # noqa: F401  registers the op
from qfuse.reasons import Decline
from qfuse.rewrite import Emitter
from qfuse.row_program import COMPARISONS, Instruction, Number, Operand, Ref, RowProgram

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.qfuse
log = logging.getLogger(__name__)

#: Reductions of the graph, by their name in a program; the latter also return an index, which is not known.
_REDUCTIONS: dict[Target, str] = {aten.amin.default: "amin", aten.amax.default: "amax"}
_INDEXED_REDUCTIONS: dict[Target, str] = {aten.min.dim: "amin", aten.max.dim: "amax"}

#: Pointwise operators, by their name in a program. Reshapes, literals and `clamp` are apart.
_NAMES: dict[Target, str] = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.reciprocal.default: "reciprocal",
    aten.round.default: "round",
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
    aten.clamp_min.default: "clamp_min",
    aten.clamp_max.default: "clamp_max",
    aten.clamp_min.Tensor: "maximum",
    aten.clamp_max.Tensor: "minimum",
    aten.where.self: "where",
    prims.convert_element_type.default: "convert",
    aten.view.dtype: "convert",  # of bytes to bytes, see `_is_readable`
    **{getattr(getattr(aten, name), overload): name for name in COMPARISONS for overload in ("Tensor", "Scalar")},
}
_LITERALS = (aten.full.default, aten.scalar_tensor.default)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_QUANTIZED = (torch.int8, torch.uint8)
_ELEMENT_DTYPES = (*_FLOATS, *_QUANTIZED, torch.int32, torch.bool)
_ROW_DTYPES = (*_ELEMENT_DTYPES, torch.float64, torch.int16, torch.int64)


def fuse_quantizations(graph: Graph) -> int:
    """Rewrite the quantizations in front of the fused linears of `graph`, in place; return how many there were.

    What is not understood stays as it is, and the reason is logged.
    """
    linears = graph.find_nodes(op="call_function", target=ops.int8_linear.default)
    order = {node: index for index, node in enumerate(graph.nodes)} if linears else {}
    by_source: dict[Node, list[Node]] = {}
    for quantized in dict.fromkeys(linear.args[0] for linear in linears):
        source = _source(quantized, order)
        if isinstance(source, Decline):
            log.debug("%s stays as it is: %s", quantized, source.reason)
        else:
            by_source.setdefault(source, []).append(quantized)
    fused = sum([_fuse(source, quantized, order) for source, quantized in by_source.items()])
    if fused:
        graph.eliminate_dead_code()
    return fused


def _fuse(source: Node, quantized: list[Node], order: dict[Node, int]) -> bool:
    try:
        declined = _rewrite(source, quantized, order)
    except Exception:
        log.debug("qfuse failed at the quantization of %s", source, exc_info=True)
        return False
    if declined is not None:
        log.debug("the quantization of %s stays as it is: %s", source, declined.reason)
    return declined is None


def _source(quantized: Node, order: dict[Node, int]) -> Node | Decline:
    """Find the activation that `quantized` is computed from: the nearest node that all ways upwards pass.

    Waiting nodes are visited from the last to the first, so a node that waits alone is passed by all of them.
    """
    waiting, seen, reduced = [-order[quantized]], {quantized}, False
    nodes = list(order)
    while waiting:
        node = nodes[-heapq.heappop(waiting)]
        if reduced and not waiting:
            return _narrowest(node)
        if not _is_readable(node):
            return Decline(f"{name_of(node)} is no arithmetic on elements and rows", node)
        reduced = reduced or _reduction(node) is not None
        for operand in _tensors(node):
            if operand not in seen:
                seen.add(operand)
                heapq.heappush(waiting, -order[operand])
    return Decline("nothing is reduced")


def _narrowest(node: Node) -> Node:
    """Look through reshapes, and conversions from a narrower float: that is cheaper to read."""
    while (inner := reshaped_input(node) or widened_input(node)) is not None:
        if fake_value(inner).dim() < 2 or not equal(columns(inner), columns(node)):
            break
        node = inner
    return node


def _is_readable(node: Node) -> bool:
    if node.target is aten.view.dtype:  # converting between these two keeps the bits
        return all(fake_value(n).dtype in _QUANTIZED for n in (node, *node.all_input_nodes))
    return node.op == "call_function" and (
        node.target in _NAMES
        or node.target is aten.clamp.default
        or reshaped_input(node) is not None
        or _reduction(node) is not None
    )


def _reduction(node: Node) -> tuple[str, Node, Sequence[object]] | None:
    """Return what `node` reduces: the name, the matrix and the dimensions; or None."""
    match node.target, node.args:
        case operator.getitem, (Node(target=target, args=(Node() as inner, dim, *_)), 0):
            return (_INDEXED_REDUCTIONS[target], inner, [dim]) if target in _INDEXED_REDUCTIONS else None
        case target, (Node() as inner, [*dims], *_) if target in _REDUCTIONS:
            return _REDUCTIONS[target], inner, dims
        case target, (Node() as inner,) if target in _REDUCTIONS:
            return _REDUCTIONS[target], inner, []
    return None


def _tensors(node: Node) -> list[Node]:
    """Return the tensors that `node` is computed from, without constants that are numbers."""
    if (reduction := _reduction(node)) is not None:
        return [reduction[1]]
    inner = reshaped_input(node)
    operands = node.all_input_nodes if inner is None else [inner]
    return [o for o in operands if o.target not in _LITERALS]


def _slice(quantized: Sequence[Node], source: Node, order: dict[Node, int]) -> list[Node]:
    """Return what lies between `source` and `quantized`, in order."""
    found: set[Node] = set()
    waiting = list(quantized)
    while waiting:
        node = waiting.pop()
        if node is not source and node not in found:
            found.add(node)
            waiting += _tensors(node)
    return sorted(found, key=order.__getitem__)


def _rewrite(source: Node, quantized: list[Node], order: dict[Node, int]) -> Decline | None:
    value = fake_value(source)
    if value.device.type not in ("cpu", "cuda") or value.dtype not in _FLOATS or value.dim() < 2:
        return Decline(f"no kernel for {value.dtype} of {value.dim()} dimensions on {value.device.type}", source)
    if not isinstance(value.shape[-1], int):
        return Decline("the length of a row is symbolic", source)
    reader = _Reader(source)
    between = _slice(quantized, source, order)
    for node in between:
        if isinstance(declined := reader.read(node), Decline):
            return declined
    for node in list(order)[order[between[0]] :]:
        if reader.is_of_rows(node):
            reader.read(node)  # whatever of it is not understood is computed from the program's outputs
    return _replace(reader, _outputs(reader, quantized), before=between[0])


def _outputs(reader: _Reader, quantized: list[Node]) -> list[Node]:
    """Return the nodes that the program has to compute, because something else uses them.

    Where elements that are not quantized are used elsewhere, they are left to the graph as it is, and so is what they
    are computed from: Inductor fuses it with its users.
    """
    outputs, left = dict.fromkeys(quantized), set[Node]()
    for node in reversed(reader.values):  # users first
        if node is reader.source or node in outputs:
            continue
        if any(user in left or not (user in reader.values or user in assertions(node)) for user in node.users):
            if reader.is_element(node) and fake_value(node).dtype not in _QUANTIZED:
                left.add(node)
            else:
                outputs[node] = None
    return [*outputs]


def _replace(reader: _Reader, outputs: list[Node], before: Node) -> Decline | None:
    """Compute `outputs` by `qfuse::quantize_rows`; all or nothing."""
    if unknown := [node for node in outputs if len(_symbolic(node)) > 1]:
        return Decline("more than one size is symbolic", unknown[0])
    program = reader.program(outputs)
    emit = Emitter(before.graph, before)
    try:
        v = emit.reshape(reader.source, [-1, columns(reader.source)])
        results = emit.call(ops.quantize_rows.default, v, str(program))
        items = [emit.call(operator.getitem, results, i) for i in range(len(program.outputs))]
        replacements = {}
        for node in outputs:
            item = items[program.outputs.index(reader.index(node))]
            replacements[node] = emit.reshape(item, _shape(node))
            if not same_shape(replacements[node], node) or fake_value(item).dtype != fake_value(node).dtype:
                raise RuntimeError(f"{fake_value(replacements[node])} cannot replace {fake_value(node)}")
    except Exception:
        emit.take_back()
        raise
    copy_origin(outputs[0], emit.nodes)
    erase_assertions(node for node in reader.values if node is not reader.source)
    for node, replacement in replacements.items():
        node.replace_all_uses_with(replacement)
    log.debug("quantize %s by %s", reader.source, program)
    return None


def _symbolic(node: Node) -> list[Dim]:
    return [dim for dim in fake_value(node).shape if not isinstance(dim, int)]


def _shape(node: Node) -> list[Dim]:
    return [dim if isinstance(dim, int) else -1 for dim in fake_value(node).shape]


class _Reader:
    """Reads nodes, in order, as instructions of a program on the rows of `source`.

    values: for each node that has been read, its value in the program.
    """

    def __init__(self, source: Node) -> None:
        self.source = source
        self.values: dict[Node, Operand] = {source: Ref(0)}
        self._elements = {0}
        self._instructions: dict[Instruction, int] = {}  # equal ones are one

    def index(self, node: Node) -> int:
        """Return the index of the value of `node`."""
        value = self.values[node]
        assert isinstance(value, Ref)
        return value.index

    def is_of_rows(self, node: Node) -> bool:
        """Tell whether `node` is computed from values of rows, all of which have been read, and not read itself."""
        if node in self.values or not _is_readable(node):
            return False
        operands = _tensors(node)
        return bool(operands) and all(o in self.values and not self.is_element(o) for o in operands)

    def program(self, outputs: Sequence[Node]) -> RowProgram:
        """Return the program, with what `outputs` do not need left out."""
        instructions = list(self._instructions)
        wanted = list(dict.fromkeys(map(self.index, outputs)))
        needed, waiting = set(), list(wanted)
        while waiting:
            index = waiting.pop()
            if index and index not in needed:
                needed.add(index)
                waiting += instructions[index - 1].refs
        renamed = {old: new for new, old in enumerate([0, *sorted(needed)])}
        kept = tuple(
            Instruction(
                one.op, one.dtype, tuple(Ref(renamed[o.index]) if isinstance(o, Ref) else o for o in one.operands)
            )
            for one in (instructions[index - 1] for index in sorted(needed))
        )
        program = RowProgram(kept, tuple(renamed[o] for o in wanted))
        # what is returned has to be told apart again by `index`
        self.values = {
            node: Ref(renamed[v.index]) if isinstance(v, Ref) and v.index in renamed else v
            for node, v in self.values.items()
        }
        return program

    def read(self, node: Node) -> Decline | None:
        """Read one more node, whose operands have been read."""
        inner = reshaped_input(node)
        if inner is not None:
            if self.is_element(inner) and not self._has_elements_last(node):
                return Decline("rows are cut or merged", node)
            self.values[node] = self.values[inner]
            return None
        if (reduction := _reduction(node)) is not None:
            return self._read_reduction(node, *reduction)
        if node.target is aten.clamp.default:
            return self._read_clamp(node)
        name = _NAMES.get(node.target)
        if name is None or not _is_readable(node):
            return Decline(f"{name_of(node)} is no arithmetic on elements and rows", node)
        if node.kwargs:
            return Decline(f"{name_of(node)} has options", node)
        return self._read_pointwise(name, node, node.args[:1] if name == "convert" else node.args)

    def _read_clamp(self, node: Node) -> Decline | None:
        given = arguments_of(node)
        operand: object = given["self"]
        for name, bound in (("clamp_min", given["min"]), ("clamp_max", given["max"])):
            if bound is not None:
                if (declined := self._read_pointwise(name, node, (operand, bound))) is not None:
                    return declined
                operand = self.values[node]
        return None

    def _read_reduction(self, node: Node, name: str, inner: Node, dims: Sequence[object]) -> Decline | None:
        rank = len(fake_value(inner).shape)
        if not self.is_element(inner) or [d % rank for d in dims if isinstance(d, int)] != [rank - 1]:
            return Decline(f"reduces over dimensions {list(dims)}, which are not the row", node)
        if not fake_value(node).dtype.is_floating_point:
            return Decline(f"reduces {fake_value(node).dtype}", node)  # the kernel does it in float32
        self._add(node, Instruction(name, fake_value(node).dtype, (self.values[inner],)), element=False)
        return None

    def _read_pointwise(self, name: str, node: Node, args: Sequence[object]) -> Decline | None:
        operands: list[Operand] = []
        nodes: list[Node] = []
        for arg in args:
            operand = arg if isinstance(arg, Ref) else self._operand(arg)
            if isinstance(operand, Decline):
                return operand
            operands.append(operand)
            nodes += [arg] if isinstance(arg, Node) and isinstance(operand, Ref) else []
        dtype = fake_value(node).dtype
        element = any(map(self.is_element, nodes)) or any(
            isinstance(a, Ref) and a.index in self._elements for a in args
        )
        if dtype not in (_ELEMENT_DTYPES if element else _ROW_DTYPES):
            return Decline(f"computes {'elements' if element else 'rows'} in {dtype}", node)
        if not nodes and not any(isinstance(a, Ref) for a in args):
            return Decline("computed from numbers alone", node)
        if unaligned := [n for n in nodes if not self._is_aligned(n, node, element)]:
            return Decline(f"{unaligned[0]} is broadcast in another way than over its row", node)
        if name != "convert" and not _promotes(name, nodes, dtype):
            return Decline(f"computes in {dtype} what was of another dtype", node)
        of = fake_value(nodes[0]).dtype if name in COMPARISONS else dtype
        if name in COMPARISONS and of.is_floating_point:  # eager rounds a number first, which it does not to compute
            operands = [o if isinstance(o, Ref) else torch.tensor(o, dtype=of).item() for o in operands]
        numbers = [o for o in operands[name == "where" :] if isinstance(o, Number)]
        if unlike := [n for n in numbers if not _holds(of, n)]:
            return Decline(f"computes in {of} with {unlike[0]}", node)
        if name != "convert" and not _has_kernel(name, of, element):
            return Decline(f"{name_of(node)} in {of}", node)
        self._add(node, Instruction(name, dtype, tuple(operands)), element)
        return None

    def _operand(self, arg: object) -> Operand | Decline:
        if isinstance(arg, Number):
            return arg
        if not isinstance(arg, Node):
            return Decline(f"the operand {arg} is not known")
        if arg in self.values:
            return self.values[arg]
        if arg.target in _LITERALS and isinstance(number := arg.args[-1], Number):
            return torch.tensor(number, dtype=fake_value(arg).dtype).item()  # rounded as it would be
        return Decline(f"{name_of(arg)} is no arithmetic on elements and rows", arg)

    def _add(self, node: Node, instruction: Instruction, element: bool) -> None:
        index = self._instructions.setdefault(instruction, len(self._instructions) + 1)
        self.values[node] = Ref(index)
        if element:
            self._elements.add(index)

    def is_element(self, node: Node) -> bool:
        """Tell whether the value of `node` is a matrix, and not one number a row."""
        value = self.values[node]
        return isinstance(value, Ref) and value.index in self._elements

    def _has_elements_last(self, node: Node) -> bool:
        shape = fake_value(node).shape
        return len(shape) > 1 and equal(shape[-1], columns(self.source))

    def _is_aligned(self, operand: Node, node: Node, element: bool) -> bool:
        """Tell whether each value of `operand` meets the values of its own row in `node`."""
        if self.is_element(operand) or not element:
            return same_shape(operand, node)
        return is_of_rows(operand, node)


def _holds(dtype: torch.dtype, number: Number) -> bool:
    """Tell whether `number` is one of `dtype`, or may be rounded to it.

    Eager wraps a number that is too large for integers, or compares in floats.
    """
    if dtype.is_floating_point:
        return True
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return isinstance(number, int) and low <= number <= high


def _has_kernel(name: str, dtype: torch.dtype, element: bool) -> bool:
    """Tell whether the kernel of a program can do this in `dtype`: of booleans, it has no arithmetic on elements."""
    return dtype.is_floating_point or (name != "round" and not (element and dtype is torch.bool))


def _promotes(name: str, nodes: Sequence[Node], dtype: torch.dtype) -> bool:
    """Tell whether operands may be converted to `dtype` before the operator runs, as eager does it."""
    if name in COMPARISONS:
        return len({fake_value(n).dtype for n in nodes}) == 1
    of = [fake_value(n).dtype for n in (nodes[1:] if name == "where" else nodes)]
    return all(torch.promote_types(one, dtype) is dtype for one in of)
