"""What is known of one model, quantized by one release in one way; written by one process and read by another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

#: How much less exact the fused model may be. Both are rounded, and in several layers roundings are amplified.
TOLERANCE = 1.05


@dataclass(frozen=True)
class Case:
    """A configuration, a model and a dtype, and what came of it.

    quantized: the linears that the release has quantized. integer_matmuls: those in the graph. fused: by qfuse.
    plain_error, fused_error: the deviation from the model before quantization, without and with qfuse.
    sequence: the operators around the first matmul. error: what was raised, in one line, and nothing else is known.
    """

    config: str
    model: str = ""
    dtype: str = ""
    quantized: int = 0
    integer_matmuls: int = 0
    fused: int = 0
    patterns: Sequence[str] = ()
    reasons: Sequence[str] = ()
    plain_error: float = 0.0
    fused_error: float = 0.0
    sequence: str = ""
    error: str = ""

    def to_json(self) -> str:
        """Return this as a line."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Case:
        """Return what `to_json` wrote."""
        return cls(**json.loads(line))

    @property
    def is_fused(self) -> bool:
        """Whether every linear that was quantized is fused."""
        return not self.error and self.quantized > 0 and self.fused == self.quantized and not self.reasons

    @property
    def is_exact(self) -> bool:
        """Whether the fused model is as near to the truth as the unfused one."""
        return self.fused_error <= TOLERANCE * self.plain_error

    @property
    def failure(self) -> str:
        """Say what is wrong that qfuse is there to get right, or ''.

        What a release does not do with this torch is not qfuse's fault, and neither is a graph without integers.
        """
        if self.error:
            return ""
        if self.integer_matmuls and not self.is_fused:
            return f"{self.fused} of {self.quantized} linears fused, though the graph has integer matmuls"
        if not self.is_exact:
            return f"the error is {self.fused_error:.3g} fused, and {self.plain_error:.3g} unfused"
        return ""


def one_line(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
