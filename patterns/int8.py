"""int8 activation times int8 weight, with an integer matmul in the graph: torchao, SDNQ and their relatives."""

from __future__ import annotations

import torch
from torch.fx import Node

from qfuse.constants import Constants
from qfuse.family import Anchor, Family, Pattern
from qfuse.inductor import fake_value
from qfuse.normal_form import Axis, QLinear, equal, transposed_input
from qfuse.reasons import Decline
from qfuse.steps import ALGEBRA

#: The largest K for which no sum of K products of a uint8 and an int8 leaves int32: 2^31 // (255 · 128).
MAX_K = 65793

_TEST = "tests/test_int8.py"


class IntMM(Anchor):
    """`aten._int_mm`: int8 or uint8 [M, K] times int8 [K, N]."""

    targets = (torch.ops.aten._int_mm.default,)

    def start(self, node: Node, constants: Constants) -> QLinear | Decline | None:
        """See `Anchor.start`."""
        x, weight_t = node.args
        if not isinstance(x, Node) or not isinstance(weight_t, Node):
            return Decline("an operand is no tensor of the graph", node)
        k, n = fake_value(weight_t).shape
        x_dtype, w_dtype = fake_value(x).dtype, fake_value(weight_t).dtype
        if x_dtype not in (torch.int8, torch.uint8) or w_dtype is not torch.int8:
            return Decline(f"multiplies {x_dtype} by {w_dtype}, not (u)int8 by int8", node)
        if not isinstance(k, int) or not isinstance(n, int):
            return Decline(f"the weight's shape is not static: {(k, n)}", node, "mark only the batch as dynamic")
        if k == 0 or n == 0 or equal(fake_value(x).shape[0], 0):
            return Decline("the matmul is empty: there is nothing to compute", node)
        if k > MAX_K:
            return Decline(
                f"K = {k}: the int32 accumulator could overflow, and then no order of sums is the graph's",
                node,
            )
        matrix = transposed_input(weight_t)
        return QLinear(
            anchor=node,
            value=node,
            x=x,
            x_dtype=x_dtype,
            weight=weight_t if matrix is None else matrix,
            k_axis=0 if matrix is None else 1,
        )


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
    anchors=(IntMM(),),
    steps=ALGEBRA,
    patterns=(
        Pattern(
            "int8.dynamic_per_token_asymmetric",
            (
                "torchao 0.18 with an asymmetric activation",
                "torchao 0.17, version 2: a symmetric activation has a zero point as well",
            ),
            _per_token_asymmetric,
            graph="acc · xs[M] · ws[N] − z[M] · xs[M] · Σk W[N, k] · ws[N] + b[N]",
            conditions=("what removes z is a sum of products, each of factors of rows, of columns, or of neither",),
            test=_TEST,
        ),
        Pattern(
            "int8.dynamic_per_token",
            (
                "torchao 0.7 to 0.18, dynamic int8 activation (PerRow), with and without SmoothQuant",
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
            ("torchao 0.18, static activation, symmetric or not",),
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
