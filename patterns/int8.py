"""int8 activation times int8 weight: torchao, SDNQ, compressed-tensors and their relatives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from qfuse.constants import Constants, is_zero
from qfuse.dequantized import Dequantized, dequantized
from qfuse.family import Anchor, Family, Pattern
from qfuse.inductor import fake_value, real_tensors
from qfuse.normal_form import (
    COLUMN_SUMS,
    FLOATS,
    MINUS_ONE,
    Axis,
    Dim,
    Factor,
    Product,
    QLinear,
    equal,
    permutation,
    product_of,
    reshaped_input,
    transposed_input,
)
from qfuse.reasons import Decline
from qfuse.steps import ALGEBRA

aten = torch.ops.aten

#: The largest K for which no sum of K products of a uint8 and an int8 leaves int32: 2^31 // (255 · 128).
MAX_K = 65793

_TEST = "tests/test_int8.py"


class IntMM(Anchor):
    """`aten._int_mm`: int8 or uint8 [M, K] times int8 [K, N]."""

    targets = (aten._int_mm.default,)

    def start(self, node: Node, constants: Constants) -> QLinear | Decline | None:
        """See `Anchor.start`."""
        x, weight = node.args
        if not isinstance(x, Node) or not isinstance(weight, Node):
            return Decline("an operand is no tensor of the graph", node)
        return _integer_matmul(node, x, weight)


class IntScaledMM(Anchor):
    """`torchao::int_scaled_matmul`: `_int_mm` and a scale that is already expanded to [M, N]."""

    targets = ("torchao.int_scaled_matmul.default",)

    def start(self, node: Node, constants: Constants) -> QLinear | Decline | None:
        """See `Anchor.start`."""
        x, weight, scale = node.args
        if not isinstance(x, Node) or not isinstance(weight, Node) or not isinstance(scale, Node):
            return Decline("an operand is no tensor of the graph", node)
        form = _integer_matmul(node, x, weight)
        factors = product_of(scale, node)
        if factors is None:
            return Decline("its scale varies over neither rows nor columns", node)
        return form if isinstance(form, Decline) else form.scaled(factors, node)


class EmulatedMM(Anchor):
    """`mm`, `addmm` or `bmm` of dequantized, or of widened, 8-bit integers."""

    targets = (aten.mm.default, aten.addmm.default, aten.bmm.default)

    def start(self, node: Node, constants: Constants) -> QLinear | Decline | None:
        """See `Anchor.start`."""
        *bias, x, weight = node.args
        if not isinstance(x, Node) or not isinstance(weight, Node):
            return None
        w, k_axis = _weight(weight, constants)
        if w is None or len(fake_value(w.q).shape) != 2:
            return None
        activation = dequantized(x, Axis.ROW, constants)
        if activation is None:
            return Decline("the weight is quantized to int8, but the activation is not, or not provably", node)
        if fake_value(w.q).dtype is not torch.int8:
            return Decline("the weight is not int8", node)
        if w.zero_point is not None and not is_zero(w.zero_point.operand, constants):
            return Decline("the weight has zero points", node)
        if node.kwargs:
            return Decline("addmm with factors (alpha, beta)", node)
        if fake_value(node).dtype not in (*FLOATS, torch.int32, torch.int64):
            return Decline(f"computed in {fake_value(node).dtype}, which the fused op does not do", node)
        form = _checked(QLinear(node, node, activation.q, activation.dtype, w.q, k_axis))
        if isinstance(form, Decline):
            return form
        if not form.dtype.is_floating_point:
            if bias:
                return Decline("addmm of integers, whose sums may wrap around", node)
            if not form.sums_fit(form.dtype, activation.largest):
                return Decline(f"the zero point may be so large that sums of {form.k} products wrap around", node)
        scales = (*activation.scales, *(_of_columns(f) for f in w.scales))
        form = _with_zero_point(form.scaled(scales, node), activation, scales, constants)
        for summand in bias:
            offset = product_of(summand, node) if isinstance(summand, Node) else None
            if offset is None:
                return Decline("what addmm adds varies over neither rows nor columns", node)
            form = form.plus(offset, node)
        return form


def _integer_matmul(node: Node, x: Node, weight: Node) -> QLinear | Decline:
    matrix = transposed_input(weight)
    stored, k_axis = (weight, 0) if matrix is None else (matrix, 1)
    x_dtype, w_dtype = fake_value(x).dtype, fake_value(weight).dtype
    if x_dtype not in (torch.int8, torch.uint8) or w_dtype is not torch.int8:
        return Decline(f"multiplies {x_dtype} by {w_dtype}, not (u)int8 by int8", node)
    return _checked(QLinear(node, node, x, x_dtype, stored, k_axis))


def _checked(form: QLinear) -> QLinear | Decline:
    """Decline what no kernel should be asked for."""
    node, k, n = form.anchor, form.k, form.n
    if not isinstance(k, int) or not isinstance(n, int):
        return Decline(f"the weight's shape is not static: {(k, n)}", node, "mark only the batch as dynamic")
    if k == 0 or n == 0 or equal(form.m, 0):
        return Decline("the matmul is empty: there is nothing to compute", node)
    if k > MAX_K:
        return Decline(f"K = {k}: the int32 accumulator could overflow, and then no order of sums is right", node)
    return form


def _weight(weight: Node, constants: Constants) -> tuple[Dequantized | None, int]:
    """Read the second operand of a matmul as a dequantized weight, a matrix, and say where K is in it."""
    if any(not equal(d, 1) for d in fake_value(weight).shape[:-2]):
        return None, 0  # a batch of weights
    node, k_axis = weight, 0
    while (inner := _matrix_below(node)) is not None:
        node, swapped = inner
        k_axis = 1 - k_axis if swapped else k_axis
    if len(fake_value(node).shape) != 2:
        return None, 0
    return dequantized(node, Axis.ROW if k_axis == 1 else Axis.COLUMN, constants), k_axis


def _matrix_below(node: Node) -> tuple[Node, bool] | None:
    """Look through one operator that adds or moves dimensions of size one, or transposes; say whether it transposes."""
    inner = node.args[0] if node.args else None
    if not isinstance(inner, Node):
        return None
    if transposed_input(node) is not None:
        return inner, True  # whatever the sizes are
    before, after = (_extents(n) for n in (inner, node))
    if len(before) != 2 or len(after) != 2:
        return None  # a dimension of size one, or a third one: which is which is not known
    if reshaped_input(node) is not None:
        return (inner, False) if all(map(equal, before, after)) else None
    return (inner, True) if permutation(node) is not None else None


def _extents(node: Node) -> list[Dim]:
    """Return the sizes of a tensor without those that are one."""
    value = fake_value(node)
    return [d for d in value.shape if not equal(d, 1)] if isinstance(value, torch.Tensor) else []


def _of_columns(factor: Factor) -> Factor:
    """Return a factor of the weight's rows or columns of output as one of the result's columns."""
    return Factor(factor.operand, Axis.SCALAR if factor.axis is Axis.SCALAR else Axis.COLUMN, factor.inverse)


def _with_zero_point(form: QLinear, x: Dequantized, scales: Product, constants: Constants) -> QLinear:
    """Account for the activation's zero point: as an integer where it is one and known, else as an offset."""
    if x.zero_point is None or is_zero(x.zero_point.operand, constants):
        return form
    known = _known_integer(x.zero_point, constants)
    if known is not None and (shifted := replace(form, x_zero_point=known)).stays_in_int32:
        return shifted
    return form.plus((MINUS_ONE, x.zero_point, *scales, Factor(COLUMN_SUMS, Axis.COLUMN)), form.value)


def _known_integer(factor: Factor, constants: Constants) -> int | None:
    operand = factor.operand
    if isinstance(operand, Node):
        if factor.axis is not Axis.SCALAR or operand not in constants:
            return None
        with real_tensors():
            operand = constants.value(operand).item()
    is_known = isinstance(operand, int | float) and float(operand).is_integer() and abs(operand) <= 255
    return int(operand) if is_known else None  # type: ignore[arg-type]


def _per_token(form: QLinear, constants: Constants) -> bool:
    return bool(form.factors(Axis.ROW))


def _per_token_asymmetric(form: QLinear, constants: Constants) -> bool:
    return _per_token(form, constants) and form.is_asymmetric


def _static(form: QLinear, constants: Constants) -> bool:
    return all(not isinstance(f.operand, Node) or f.operand in constants for f in form.scales)


def _any(form: QLinear, constants: Constants) -> bool:
    return True


FAMILY = Family(
    name="int8",
    anchors=(IntMM(), IntScaledMM(), EmulatedMM()),
    steps=ALGEBRA,
    patterns=(
        Pattern(
            "int8.dynamic_per_token_asymmetric",
            ("torchao 0.7 to 0.18 with an asymmetric activation",),
            _per_token_asymmetric,
            graph="acc · xs[M] · ws[N] − z[M] · xs[M] · Σk W[N, k] · ws[N] + b[N]",
            conditions=("what removes z is a sum of products, each of factors of rows, of columns, or of neither",),
            test=_TEST,
        ),
        Pattern(
            "int8.dynamic_per_token",
            (
                "torchao up to 0.18, dynamic int8 activation (PerRow), with and without SmoothQuant",
                "torch_xla, per-channel linear with a dynamic activation",
                "compressed-tensors and llm-compressor, W8A8 with a dynamic activation",
                "SDNQ, with and without bias",
                "per-row int8 of image pipelines and trainers, in which the weight's scale may come first",
            ),
            _per_token,
            graph="acc · xs[M] · ws[N] + b[N]",
            conditions=("a scale has one value a row",),
            test=_TEST,
        ),
        Pattern(
            "int8.static_per_tensor",
            (
                "torchao 0.18, static activation, symmetric or not",
                "compressed-tensors and llm-compressor, W8A8 with a static activation",
                "transformers, Gemma with static ranges",
            ),
            _static,
            graph="acc · xs · ws[N] − z · xs · Σk W[N, k] · ws[N] + b[N]",
            conditions=("every scale is a constant or a number",),
            test=_TEST,
        ),
        Pattern(
            "int8.dynamic_per_tensor",
            ("torchao 0.18, dynamic activation (PerTensor)",),
            _any,
            graph="acc · xs · ws[N] + b[N]",
            conditions=("a scale of one value is computed from the activation",),
            test=_TEST,
        ),
    ),
    conditions=(
        "the activation is int8 or uint8 and the weight int8, and the sizes of the weight are static",
        f"K ≤ {MAX_K}: no sum leaves int32",
        "the result is float32, bfloat16 or float16, and something has scaled it",
        "a zero point that integers remove is a number, and proven: what is subtracted is z · Σk W, computed in the "
        "graph or a constant",
        "the weight is a constant: a parameter or a buffer that the model does not change, in a graph that is compiled "
        "under `torch.no_grad()` and frozen",
        "nothing else uses what is computed on the way",
    ),
)
