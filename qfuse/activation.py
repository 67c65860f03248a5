"""Switching qfuse on and off for all of `torch.compile`."""

from __future__ import annotations

from qfuse.config import is_enabled
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import freezing_by_default, install_pass, remove_pass
from qfuse.memory import keep_freed_memory


def enable() -> None:
    """Fuse in everything that is compiled from now on, in all threads; `import qfuse` does this.

    Appends qfuse's pass to Inductor's, and makes freezing Inductor's default, unless the user has decided on freezing
    by `TORCHINDUCTOR_FREEZING` or `torch._inductor.config.freezing = ...`. Has glibc keep up to 64 MiB of freed memory
    (`keep_freed_memory`). Harmless when repeated. Does nothing with QFUSE=0.
    """
    if is_enabled():
        install_pass(FUSION_PASS)
        freezing_by_default(True)
        keep_freed_memory()


def disable() -> None:
    """Undo `enable`: what is compiled from now on is not fused, and Inductor's own default of freezing holds again."""
    remove_pass(FUSION_PASS)
    freezing_by_default(False)
