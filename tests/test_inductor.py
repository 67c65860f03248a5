"""The private APIs of torch that qfuse relies on still mean what `qfuse.inductor` says they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from producers import T2
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from qfuse import inductor
from qfuse.constants import Constants
from qfuse.fusion_pass import FUSION_PASS


class Looking(CustomGraphPass):
    """Calls a function with each graph."""

    def __init__(self, look: Callable[[Graph], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append(self.look(graph))

    def uuid(self) -> None:
        return None

    def __deepcopy__(self, memo: object) -> Looking:
        return self


def _seen(look: Callable[[Graph], Any], model: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Any]:
    torch._dynamo.reset()
    looking = Looking(look)
    with inductor_config.patch(joint_custom_post_pass=(looking,), **options):
        torch.compile(model)(*inputs)
    return looking.seen


def test_options_are_per_thread_with_a_default_for_all() -> None:
    """What one thread sets is not seen by another, but a changed default is."""
    entry = inductor_config._config["benchmark_kernel"]
    default = entry.default

    def in_another_thread() -> bool:
        with ThreadPoolExecutor() as pool:
            return pool.submit(lambda: inductor_config.benchmark_kernel).result()

    with inductor.overridden({"benchmark_kernel": not default}):
        assert inductor_config.benchmark_kernel is not default
        assert in_another_thread() is default
    try:
        entry.default = not default
        assert in_another_thread() is not default
    finally:
        entry.default = default


def test_overridden_leaves_no_trace() -> None:
    variable = inductor_config._config["max_autotune"].user_override
    before = variable.get()
    config_hash = inductor_config.get_hash()
    with inductor.overridden({"max_autotune": True}):
        assert inductor_config.max_autotune
        assert inductor_config.get_hash() != config_hash
    assert variable.get() is before
    assert inductor_config.get_hash() == config_hash


def test_a_changed_default_changes_the_hash() -> None:
    """The hash is part of the compile cache's key."""
    hashes = [inductor_config.get_hash()]
    for on in (not inductor_config.freezing, inductor_config.freezing):
        inductor.freezing_by_default(on)
        hashes.append(inductor_config.get_hash())
    inductor.freezing_by_default(True)
    assert len(set(hashes)) == 2


def test_the_pass_survives_copies() -> None:
    assert copy.deepcopy([FUSION_PASS])[0] is FUSION_PASS
    assert FUSION_PASS in inductor_config.get_config_copy()["joint_custom_post_pass"]


class Weights(nn.Module):
    """A parameter, a buffer, a buffer that forward changes, and one that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("buffer", torch.randn(4))
        self.register_buffer("changed", torch.randn(4))
        self.register_buffer("returned", torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.parameter + (self.buffer * 2 + 1) + self.changed + self.returned
        self.changed.add_(1)
        return y, self.returned.view(2, 2)


def test_frozen_inputs() -> None:
    model = Weights()

    def look(graph: Graph) -> dict[str, Tensor]:
        constants = Constants(graph)
        assert all(node in constants for node in inductor.frozen_inputs(graph))
        return {n.name: v for n, v in inductor.frozen_inputs(graph).items()}

    (frozen,) = _seen(look, model, torch.randn(4), freezing=True)
    values = list(frozen.values())
    assert len(values) == 2
    assert any(v is model.parameter for v in values)
    assert any(v is model.buffer for v in values)
    assert _seen(look, model, torch.randn(4), freezing=False) == [{}]
    with torch.enable_grad():
        assert _seen(look, model, torch.randn(4), freezing=True) == [{}]


def test_constant_values() -> None:
    model = Weights()

    def look(graph: Graph) -> list[Tensor]:
        constants = Constants(graph)
        with inductor.real_tensors():
            return [constants.value(n) for n in graph.nodes if n.op == "call_function" and n in constants]

    (values,) = _seen(look, model, torch.randn(4), freezing=True)
    assert torch.equal(values[-1], model.buffer * 2 + 1)
    assert all(type(v) is Tensor for v in values)


@pytest.mark.parametrize("training", [True, False])
def test_training_graphs_are_known(training: bool) -> None:
    weight = torch.randn(4, requires_grad=training)

    def model(x: Tensor) -> Tensor:
        return (x * weight).sum()

    with torch.enable_grad():
        assert _seen(inductor.is_training_graph, model, torch.randn(4)) == [training]


@pytest.mark.parametrize("cpp_wrapper", [True, False])
def test_the_caller_is_known(cpp_wrapper: bool) -> None:
    model = T2(48, 64, torch.float32, True)
    assert _seen(lambda graph: inductor.emits_python(), model, *model.inputs(7), cpp_wrapper=cpp_wrapper) == [
        not cpp_wrapper
    ]
