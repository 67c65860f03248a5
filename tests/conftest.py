from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qfuse


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Each test starts with nothing compiled, no statistics, the same random numbers, and no gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qfuse.reset_stats()
    with torch.no_grad():
        yield
