"""What a lowering needs to know to say whether it can compute a quantized linear, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qfuse.constants import Constants
from qfuse.inductor import concrete, emits_python, fake_value
from qfuse.isa import Isa, cpu_isa
from qfuse.normal_form import Dim, QLinear


@dataclass(frozen=True)
class Problem:
    """The facts of one quantized linear.

    m may be symbolic; k and n are static.
    weight_is_constant: freezing will fold everything that is computed from the weight alone.
    called_from_python: the compiled graph is Python, not C++ (`cpp_wrapper`, AOTInductor).
    """

    m: Dim
    k: int
    n: int
    x_dtype: torch.dtype
    out_dtype: torch.dtype
    device: torch.device
    isa: Isa
    weight_is_constant: bool
    called_from_python: bool

    @classmethod
    def of(cls, form: QLinear, constants: Constants) -> Problem:
        """Collect the facts of `form`."""
        x = fake_value(form.x)
        return cls(
            m=form.m,
            k=int(form.k),
            n=int(form.n),
            x_dtype=form.x_dtype,
            out_dtype=form.dtype,
            device=x.device,
            isa=cpu_isa() if x.device.type == "cpu" else Isa.NONE,
            weight_is_constant=form.weight in constants,
            called_from_python=emits_python(),
        )

    def cache_key(self) -> str:
        """Return what tells problems of different speed apart, the same in every process."""
        place = f"{self.device.type} {self.isa.value}, {'Python' if self.called_from_python else 'C++'}"
        return f"{concrete(self.m)}×{self.k}×{self.n} {self.x_dtype} {self.out_dtype}, {place}"
