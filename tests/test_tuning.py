"""`max_autotune`: which lowering is chosen is measured, and remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from producers import quantized
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PersistentCache
from torch._inductor.utils import fresh_cache

import qfuse
from qfuse.isa import ACTIVATION_DTYPE, cpu_isa
from qfuse.lowerings import by_name, choose, tuning
from qfuse.problem import Problem
from qfuse.records import recording

NAMES = ["cpp", "onednn", "aten"] if cpu_isa() in ACTIVATION_DTYPE else ["aten", "cpp"]


@pytest.fixture(autouse=True)
def _max_autotune() -> Iterator[None]:
    with fresh_cache(), inductor_config.patch(max_autotune=True):
        yield


def _problem(**facts: Any) -> Problem:
    usual: dict[str, Any] = {
        "m": 5,
        "k": 67,
        "n": 48,
        "x_dtype": torch.int8,
        "out_dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "isa": cpu_isa(),
        "weight_is_constant": True,
        "called_from_python": True,
    }
    return Problem(**usual | facts)


def _times() -> dict[str, dict[str, float]]:
    """Return what Inductor's cache holds: times by lowering, by problem."""
    cached = json.loads(PersistentCache.get_local_cache_path().read_text())["cache"]["qfuse::int8_linear"]
    return {problem: times for problem, by_precision in cached.items() for times in by_precision.values()}


def test_the_fastest_is_chosen() -> None:
    name = choose(_problem()).name  # type: ignore[union-attr]
    ((problem, times),) = _times().items()
    assert problem.startswith("5×67×48 torch.int8 torch.bfloat16, cpu ")
    assert sorted(times) == sorted(NAMES)
    assert name == min(times, key=times.__getitem__)


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose(_problem())
    monkeypatch.setattr(tuning, "_measured", lambda problem, choices: pytest.fail("measured again"))
    assert choose(_problem()) is first


def test_each_problem_by_itself() -> None:
    for facts in ({}, {"m": 6}, {"out_dtype": torch.float32}):
        choose(_problem(**facts))
    assert len(_times()) == 3


def test_what_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(tuning, "_compiled", fail)
    assert choose(_problem()) is by_name(NAMES[0])
    assert set(next(iter(_times().values())).values()) == {float("inf")}


def test_nothing_is_measured_without_a_choice() -> None:
    with qfuse.config.patch(disabled_lowerings=NAMES[1:]):
        assert choose(_problem()) is by_name(NAMES[0])
    with inductor_config.patch(max_autotune=False):
        assert choose(_problem()) is by_name(NAMES[0])
    assert not PersistentCache.get_local_cache_path().exists()


class Linear(nn.Module):
    """T3 of the producers', with what torchao 0.18 puts around it left out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", quantized(48, 64))
        self.register_buffer("w_scale", torch.rand(48))

    def forward(self, x: Tensor, x_scale: Tensor) -> Tensor:
        """x: [M, 64] int8."""
        return torch._int_mm(x, self.weight.t()).float() * x_scale * self.w_scale


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model(dynamic: bool) -> None:
    model, inputs = Linear(), (quantized(7, 64), torch.rand(7, 1))
    with recording() as (matches, _):
        result = torch.compile(model, mode="max-autotune", dynamic=dynamic)(*inputs)
    torch.testing.assert_close(result, model(*inputs), rtol=1e-5, atol=1e-5)
    ((problem, times),) = _times().items()
    assert problem.startswith("7×64×48")
    assert [match.lowering for match in matches] == [min(times, key=times.__getitem__)]
