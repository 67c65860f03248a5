"""Recognising the term that removes an activation's zero point from an integer matmul.

    Σk (x − z)·w  =  Σk x·w  −  z · Σk w

so what is subtracted must be z times the column sums of the *same* weight. Producers write the sum in many ways, or
leave it folded into a constant. It is proven here, symbolically where it is computed in the graph, numerically where
it is a constant; nothing is assumed.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from qfuse.constants import Constants
from qfuse.inductor import fake_value, real_tensors
from qfuse.normal_form import QLinear, equal, reshaped_input, transposed_input

aten, prims = torch.ops.aten, torch.ops.prims

# Column sums are exact in these for any K that we accept, and so are their multiples by |z| < 256.
_WIDE = {torch.int32, torch.int64}


def zero_point_of(correction: Node, form: QLinear, constants: Constants) -> int | None:
    """Return z if `correction` is z · Σk w[n, k] for every n (in the order of n), else None."""
    z = _multiple_of_column_sums(correction, form)
    if z is None and correction in constants and form.weight in constants:
        with real_tensors():
            z = _constant_multiple(constants.value(correction), constants.value(form.weight).sum(form.k_axis))
    return z


def _multiple_of_column_sums(node: Node, form: QLinear) -> int | None:
    """Return z if the graph computes `node` as z · (sums of the weight over K), by the rules below, else None."""
    match node.target, node.args:
        # z·s, s·z
        case (aten.mul.Tensor, (Node() as s, int() as z)) | (aten.mul.Tensor, (int() as z, Node() as s)):
            inner = _multiple_of_column_sums(s, form)
            return None if inner is None else inner * z
        # −s
        case aten.neg.default, (Node() as s,):
            inner = _multiple_of_column_sums(s, form)
            return None if inner is None else -inner
        # the same numbers, in another integer type or another shape
        case prims.convert_element_type.default, (Node() as s, dtype) if dtype in _WIDE:
            return _multiple_of_column_sums(s, form)
        case _ if (reshaped := reshaped_input(node)) is not None:
            return _multiple_of_column_sums(reshaped, form)
        # Σk w
        case aten.sum.dim_IntList, (Node() as w, [int() as dim], *_) if fake_value(node).dtype in _WIDE:
            return 1 if _is_weight_axis(w, dim, form) else None
    return None


def _is_weight_axis(w: Node, dim: int, form: QLinear) -> bool:
    """Tell whether `w` is the form's weight, possibly transposed or widened, with K at `dim`."""
    stored, stored_k = _strip(form.weight, form.k_axis)
    summed, summed_k = _strip(w, k_axis=dim % 2)
    return summed is stored and summed_k == stored_k


def _strip(weight: Node, k_axis: int) -> tuple[Node, int]:
    """Look through transposes and widening; return the tensor below and where K is in it."""
    while True:
        if (below := transposed_input(weight)) is not None:
            weight, k_axis = below, 1 - k_axis
        elif weight.target is prims.convert_element_type.default and weight.args[1] in _WIDE:
            weight = weight.args[0]  # type: ignore[assignment]
        else:
            return weight, k_axis


def _constant_multiple(correction: torch.Tensor, sums: torch.Tensor) -> int | None:
    if correction.dtype.is_floating_point or correction.numel() != sums.numel():
        return None
    correction = correction.reshape(-1).to(torch.int64)
    nonzero = sums.nonzero()
    if not len(nonzero):
        return 0 if not correction.any() else None
    z = int(correction[nonzero[0]]) // int(sums[nonzero[0]])
    return z if torch.equal(correction, z * sums) else None


def is_column_shaped(correction: Node, form: QLinear) -> bool:
    """Tell whether `correction` broadcasts over the rows of the accumulator [M, N], one value a column."""
    shape = fake_value(correction).shape
    return bool(shape) and equal(shape[-1], form.n) and all(equal(d, 1) for d in shape[:-1])
