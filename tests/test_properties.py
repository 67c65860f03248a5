"""Property test of the matcher: any legal order of scales, casts, views and biases fuses, and is right."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from producers import quantized
from support import assert_no_worse, trace
from torch import Tensor, nn

M, K, N = 6, 32, 6  # M == N: sizes tell nothing about axes

Op = Callable[["Epilogue", Tensor], Tensor]

#: Scales and casts, in any number and order.
SCALES: dict[str, Op] = {
    "row": lambda s, v: v * s.row.reshape(*v.shape[:-1], 1),
    "row, expanded": lambda s, v: v * s.row.reshape(*v.shape[:-1], 1).expand(v.shape),
    "row, on the left": lambda s, v: s.row.reshape(*v.shape[:-1], 1) * v,
    "column": lambda s, v: v * s.column,
    "column [1, N]": lambda s, v: v * s.column.view(1, N),
    "column, expanded": lambda s, v: v * s.column.expand(v.shape),
    "scalar tensor": lambda s, v: v * s.scalar,
    "scalar [1, 1]": lambda s, v: v * s.scalar.view(1, 1),
    "number": lambda s, v: v * 0.37,
}
CASTS: dict[str, Op] = {
    "float32": lambda s, v: v.to(torch.float32),
    "bfloat16": lambda s, v: v.to(torch.bfloat16),
}
VIEWS: dict[str, Op] = {
    "2d": lambda s, v: v.reshape(M, N),
    "3d": lambda s, v: v.reshape(2, M // 2, N),
    "4d": lambda s, v: v.reshape(1, M // 3, 3, N),
}
BIASES: dict[str, Op] = {
    "bias": lambda s, v: v + s.bias,
    "bias, on the left": lambda s, v: s.bias + v,
    "number": lambda s, v: v + 0.5,
    "addcmul": lambda s, v: torch.addcmul(s.bias, v, s.column),
}
NEUTRAL = CASTS | VIEWS


class Epilogue(nn.Module):
    """An integer matmul and a sequence of operations on its result."""

    def __init__(self, ops: list[Op], shift: int) -> None:
        super().__init__()
        self.ops, self.shift = ops, shift
        self.register_buffer("w", quantized(N, K))
        self.register_buffer("column", torch.rand(N) + 0.1)
        self.register_buffer("bias", torch.randn(N))

    def forward(self, q: Tensor, row: Tensor, scalar: Tensor) -> Tensor:
        self.row, self.scalar = row, scalar
        if self.shift:
            u = (q.to(torch.int32) + self.shift).to(torch.uint8)
            value = torch._int_mm(u, self.w.t()) - self.shift * self.w.sum(1, dtype=torch.int32)
        else:
            value = torch._int_mm(q, self.w.t())
        for op in self.ops:
            value = op(self, value)
        return value


def _ops(*tables: dict[str, Op], **kwargs: int) -> st.SearchStrategy[list[str]]:
    names = [name for table in tables for name in table]
    return st.lists(st.sampled_from(names), **kwargs)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shift=st.sampled_from([0, 128]),
    views=_ops(VIEWS, max_size=1),
    first=st.sampled_from(sorted(CASTS)),
    scaling=_ops(SCALES, NEUTRAL, max_size=5),
    last=st.sampled_from(sorted(SCALES)),
    adding=_ops(BIASES, NEUTRAL, max_size=3),
)
def test_every_legal_epilogue_fuses(
    shift: int, views: list[str], first: str, scaling: list[str], last: str, adding: list[str]
) -> None:
    # `addcmul` scales as well, so it comes first among what is added
    adding = sorted(adding, key=lambda name: name != "addcmul")
    if "addcmul" in adding[1:]:
        adding = [name for i, name in enumerate(adding) if i == 0 or name != "addcmul"]
    tables = SCALES | NEUTRAL
    ops = [*(VIEWS[v] for v in views), CASTS[first], *(tables[o] for o in [*scaling, last])]
    ops += [(BIASES | NEUTRAL)[a] for a in adding]
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        model = Epilogue(ops, shift)
        inputs = quantized(M, K), torch.rand(M) + 0.1, torch.rand(()) + 0.1
        traced = trace(model, *inputs)
        assert len(traced.report.matches) == 1, traced.report.misses
        # fused to the very end: nothing of the epilogue is left behind
        behind = traced.after[traced.after.index("qfuse.int8_linear.default") + 1 :]
        assert set(behind) <= {"aten.view.default", "aten.reshape.default", "aten.expand.default"}, behind
        assert_no_worse(traced.result, model, *inputs)
