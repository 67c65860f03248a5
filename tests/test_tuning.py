"""`max_autotune`: which lowering is chosen is measured, and remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from producers import quantized
from support import linear_problem
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PersistentCache
from torch._inductor.utils import fresh_cache

import qfuse
from qfuse.lowerings import INT8_LINEAR, by_name, choose, platform_of, tuning
from qfuse.problem import Problem
from qfuse.provider import Provider
from qfuse.records import recording

NAMES = [p.name for p in INT8_LINEAR[platform_of(linear_problem())] if p.supports(linear_problem()) is None]


@pytest.fixture(autouse=True)
def _max_autotune() -> Iterator[None]:
    with fresh_cache(), inductor_config.patch(max_autotune=True):
        yield


def _times() -> dict[str, dict[str, float]]:
    """Return what Inductor's cache holds: times by lowering, by problem."""
    cached = json.loads(PersistentCache.get_local_cache_path().read_text())["cache"]["qfuse::int8_linear"]
    return {problem: times for problem, by_precision in cached.items() for times in by_precision.values()}


def _best(times: dict[str, float]) -> str:
    """Return the first in order of preference, unless another is faster by more than a twentieth."""
    return NAMES[0] if times[NAMES[0]] <= 1.05 * min(times.values()) else min(times, key=times.__getitem__)


def test_the_fastest_is_chosen() -> None:
    name = choose(linear_problem()).name  # type: ignore[union-attr]
    ((problem, times),) = _times().items()
    assert problem.startswith("5×64×48 torch.int8 torch.bfloat16, cpu ")
    assert sorted(times) == sorted(NAMES)
    assert name == _best(times)


def test_one_that_is_hardly_faster_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower, chosen in ((1.04, NAMES[0]), (1.06, NAMES[1])):
        monkeypatch.setattr(
            tuning,
            "_milliseconds",
            lambda problem, provider, slower=slower: slower if provider.name == NAMES[0] else 1.0,
        )
        with fresh_cache():
            assert choose(linear_problem()) is by_name(chosen)


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose(linear_problem())
    monkeypatch.setattr(tuning, "_measured", lambda problem, choices: pytest.fail("measured again"))
    assert choose(linear_problem()) is first


def test_another_cpu_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may be on a disk that several machines share."""
    choose(linear_problem())
    monkeypatch.setattr(tuning, "cpu_name", lambda: "another")
    choose(linear_problem())
    assert len(_times()) == 2


def test_each_problem_by_itself() -> None:
    for facts in ({}, {"m": 6}, {"out_dtype": torch.float32}):
        choose(linear_problem(**facts))
    assert len(_times()) == 3


def test_what_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is measured again next time."""
    compiled = tuning._compiled

    def fail(problem: Problem, provider: Provider) -> object:
        if provider.name == NAMES[0]:
            raise RuntimeError("broken on purpose")
        return compiled(problem, provider)

    with monkeypatch.context() as broken:
        broken.setattr(tuning, "_compiled", fail)
        assert choose(linear_problem()) is not by_name(NAMES[0])
    assert not PersistentCache.get_local_cache_path().exists()
    choose(linear_problem())
    assert len(_times()) == 1


def test_the_time_of_a_substitute_is_not_taken_for_that_of_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Provider, call: object) -> object:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(type(by_name(NAMES[0])), "lower", fail)
    assert choose(linear_problem()) is not by_name(NAMES[0])
    assert not PersistentCache.get_local_cache_path().exists()


def test_a_damaged_cache_is_no_obstacle() -> None:
    path = PersistentCache.get_local_cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    assert choose(linear_problem()) is by_name(NAMES[0])


def test_nothing_is_measured_without_a_choice() -> None:
    with qfuse.config.patch(disabled_lowerings=NAMES[1:]):
        assert choose(linear_problem()) is by_name(NAMES[0])
    with inductor_config.patch(max_autotune=False):
        assert choose(linear_problem()) is by_name(NAMES[0])
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
    assert [match.lowering for match in matches] == [_best(times)]
