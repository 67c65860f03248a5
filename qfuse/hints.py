"""What the user can change where a walk ends; "" where nothing is wrong on his side, or nothing is known to help."""

from __future__ import annotations

import torch
from torch.fx import Node

from qfuse import config
from qfuse.constants import Constants
from qfuse.inductor import fake_value, why_not_frozen
from qfuse.normal_form import QLinear, same_shape
from qfuse.problem import Problem

aten = torch.ops.aten

SEVERAL_USERS = "take what else needs this value from the finished result, after the scales and the bias"
DISABLED_PATTERN = "remove the name from qfuse.config.disabled_patterns"
INTERNAL_ERROR = "add the output of `python -m qfuse doctor` to the report"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SCALES = (aten.mul.Tensor, aten.div.Tensor, aten.addcmul.default)


def for_unknown_operator(user: Node) -> str:
    """Advise where no step knows the operator of `user`."""
    if user.op == "output":
        return (
            "apply the scales in the compiled model; if a graph break ends it here (TORCH_LOGS=graph_breaks), mend it"
        )
    return "apply it after the scales and the bias; if a quantizer has put it there, please report that"


def for_step(form: QLinear, user: Node, constants: Constants) -> str:
    """Advise where a step knows the operator of `user`, and yet does not go on."""
    before, after = fake_value(form.value).dtype, fake_value(user).dtype
    others = [n for n in user.all_input_nodes if n is not form.value]
    if after is torch.float64:
        return "compute in float32, bfloat16 or float16"
    if not form.has_columns_last or not same_shape(user, form.value):
        return "keep the shape of the matmul's result, N last, until the scales and the bias are applied"
    if user.kwargs.keys() & {"alpha", "value"}:
        return "multiply in an operation of its own, instead of by `alpha` or `value`"
    if not before.is_floating_point and not after.is_floating_point:
        return _for_integers(form, user, constants)
    if others and after in _FLOATS:
        if user.target is aten.div.Tensor and user.args[0] is not form.value:
            return ""
        if user.target in _SCALES:
            return "use scales of rows (tokens), of columns (channels) or of whole tensors: no groups along K"
        return "apply the scales first"
    return ""


def _for_integers(form: QLinear, user: Node, constants: Constants) -> str:
    if user.target not in (aten.add.Tensor, aten.sub.Tensor):
        return "convert the accumulator to float first"
    if len(user.all_input_nodes) > 1 and form.weight not in constants:
        return why_not_frozen()  # then column sums that the quantizer has computed before can be compared
    return "subtract nothing but zero point · column sums of this weight; convert to float before anything else"


def for_lowering(problem: Problem) -> str:
    """Advise where no lowering computes `problem`."""
    if not problem.weight_is_constant:
        return why_not_frozen()
    if config.disabled_lowerings:
        return f"take {', '.join(config.disabled_lowerings)} out of qfuse.config.disabled_lowerings"
    if problem.device.type == "cuda" and isinstance(problem.m, torch.SymInt):
        return "say that there are more than 16 rows: torch._dynamo.mark_dynamic(x, 0, min=17)"
    return ""
