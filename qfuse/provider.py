"""What a lowering has to offer."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from qfuse.problem import Problem


class Provider(Protocol):
    """One way to compute `qfuse::int8_linear`."""

    #: As in reports and `qfuse.config.disabled_lowerings`.
    name: ClassVar[str]
    #: Whether the weight arrives as `qfuse::pack_int8_weight` makes it, not as [N, K].
    packs_weight: ClassVar[bool]

    def supports(self, problem: Problem) -> str | None:
        """Return None if this provider computes `problem`, else the reason why it does not."""

    def activation_dtype(self, problem: Problem) -> torch.dtype:
        """Return the dtype, int8 or uint8, in which the activation should arrive."""

    def lower(self, call: Any) -> Any:
        """Lower a `qfuse.lowerings.call.Int8LinearCall` to Inductor IR: [M, N] of the op's dtype."""
