"""Linears that only look like what can be fused, and those whose forward a test writes down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from producers import Written
from torch import Tensor


class Hostile(Written):
    """A float32 linear whose forward a test writes."""

    def __init__(self, forward: Callable[..., Any], n: int = 48, k: int = 64) -> None:
        super().__init__(n, k, torch.float32, True)
        self.written = forward

    def forward(self, *args: Tensor) -> Any:
        return self.written(self, *args)


def accumulator(s: Written, q: Tensor) -> Tensor:
    return torch._int_mm(q, s.w.t())
