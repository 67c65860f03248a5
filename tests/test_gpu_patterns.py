"""Every producer's graph as it is on CUDA, traced with tensors on a device that is not there: it matches."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from producers import ROWS, Row

import qfuse
from qfuse.records import recording

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import fake_cuda

#: Those that are emitted on CUDA; of the others too, the algebra has to match there.
ON_CUDA = [row for row in ROWS if row.name in ("T3", "T9", "T18", "P1/P2", "T7-torchao", "T10-torchao", "T14-torchao")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fuses(row: Row) -> None:
    _assert_fuses(row, torch.bfloat16, (2, 20), True)


@pytest.mark.parametrize("row", ON_CUDA, ids=str)
def test_few_rows_fuse(row: Row) -> None:
    """`_int_mm` refuses so few rows on CUDA when it runs, and a producer's float16 goes other ways than bfloat16."""
    _assert_fuses(row, torch.float16, (7,), False)


def _assert_fuses(row: Row, dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    model = row.make(48, 64, dtype, bias)
    with recording() as (matches, misses):
        operators = fake_cuda.trace(model, *model.inputs(*rows))
    assert not misses
    assert [(m.pattern, m.lowering) for m in matches] == [(row.pattern, "triton")]
    assert operators.count("qfuse.int8_linear.default") == 1
    assert not [name for name in operators if "mm.default" in name]


def test_graph_of_torchao() -> None:
    """What is traced above is what torchao does on CUDA: scales that are expanded, and no shift to uint8 (T9)."""
    row = next(row for row in ROWS if row.name == "T7-torchao")
    model = row.make(48, 64, torch.bfloat16, True)
    with qfuse.config.patch(enabled=False):
        operators = fake_cuda.trace(model, *model.inputs(7))
    matmul = operators.index("qfuse.int_mm.default")  # so called to hide it from Inductor's patterns
    assert operators[matmul - 1 : matmul + 2] == ["aten.expand.default", "qfuse.int_mm.default", "aten.mul.Tensor"]
    assert "aten.sum.dim_IntList" not in operators
