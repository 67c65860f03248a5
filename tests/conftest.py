from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo import guards
from torch._inductor import config as inductor_config

import qfuse
from qfuse.lowerings import quantize_rows

#: Dynamo times the guards of each compile, for a log, and flushes the caches for it: a twentieth of what tests take.
guards.profile_guard_manager = lambda *_: 0.0


def pytest_configure(config: pytest.Config) -> None:
    """Say what marks mean."""
    config.addinivalue_line("markers", "gpu: runs on a GPU; skipped where there is none")


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Each test starts with nothing compiled, no statistics, the same random numbers, and no gradients.

    Inductor's `config.patch` leaves the old value behind as if the user had set it, so what was unset is unset again.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    qfuse.reset_stats()
    settings = [inductor_config._config[name].user_override for name in ("freezing", "joint_custom_post_pass")]
    before = [setting.get() for setting in settings]
    with torch.no_grad():
        yield
    for setting, value in zip(settings, before, strict=True):
        setting.set(value)


@pytest.fixture
def exact_casts() -> Iterator[None]:
    """Round where the graph rounds, and generate code anew."""
    with inductor_config.patch(emulate_precision_casts=True, fx_graph_cache=False):
        yield


@pytest.fixture
def no_norm_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of a norm and its quantization does not run where the kernel fails."""
    monkeypatch.setattr(quantize_rows, "_norm_reference", None)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at what is imported again and again: a twentieth of what tests take."""
    gc.collect()
    gc.freeze()
