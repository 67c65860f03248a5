"""What `scripts/producers` counts as a failure; the script itself needs the network, and minutes."""

from __future__ import annotations

from typing import Any

import pytest

FUSED = {"quantized": 2, "integer_matmuls": 2, "fused": 2, "plain_error": 0.01, "fused_error": 0.0101}


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({}, ""),
        ({"fused": 1, "reasons": ["used by 2 nodes"]}, "1 of 2 linears fused"),
        ({"fused": 0, "integer_matmuls": 0}, ""),  # emulated in floats
        ({"fused": 1, "integer_matmuls": 1}, "1 of 2 linears fused"),
        ({"fused_error": 0.02}, "0.02 fused"),
        ({"fused_error": float("nan")}, "nan fused"),
        ({"quantized": 0, "fused": 0, "error": "ImportError: no"}, ""),
    ],
    ids=str,
)
def test_failure(change: dict[str, Any], failure: str, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    from producers_case import Case

    case = Case("symmetric", "mlp", "float32", **{**FUSED, **change})
    assert Case.from_json(case.to_json()).failure == case.failure
    assert failure in case.failure
    assert bool(failure) == bool(case.failure)
