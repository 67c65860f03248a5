from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo import guards
from torch._inductor import config as inductor_config

import qfuse

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


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at what is imported again and again: a twentieth of what tests take."""
    gc.collect()
    gc.freeze()
