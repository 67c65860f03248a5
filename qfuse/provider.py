"""What a lowering has to offer."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from qfuse.problem import Problem


class Provider(Protocol):
    """One way to compute `qfuse::int8_linear`."""

    #: As in reports and `qfuse.config.disabled_lowerings`.
    name: ClassVar[str]

    def supports(self, problem: Problem) -> str | None:
        """Return None if this provider computes `problem`, else the reason why it does not."""

    def activation_dtype(self, problem: Problem) -> torch.dtype:
        """Return the dtype, int8 or uint8, in which the activation should arrive."""

    def matmul(self, x: Any, weight: Any, column_sums: Any, w_scale: Any, x_zero_point: int) -> Any:
        """Lower to Inductor IR: (x − x_zero_point) @ weight.T · w_scale, [M, N] float32."""
