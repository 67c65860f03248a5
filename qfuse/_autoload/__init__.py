"""What torch loads of qfuse by itself, through entry points, before anybody has imported qfuse.

Installed as the package `_qfuse_autoload`. `register_logs` runs inside every `import torch`, so it must be
light, must not import qfuse (that would switch fusion on) and must never raise (that would break torch).
"""

from __future__ import annotations

#: What the variable QFUSE says, in lower case, where it switches qfuse off.
OFF = ("false", "0", "off", "no", "")

#: True while `backend="qfuse"` imports qfuse: that is not the user's `import qfuse`, and enables nothing.
importing_for_backend = False


def register_logs() -> None:
    """Make `qfuse` and `qfuse_matches` known to `TORCH_LOGS`. Safe to call any number of times."""
    try:
        from torch._logging._internal import log_registry, register_artifact, register_log

        if "qfuse" not in log_registry.log_alias_to_log_qnames:
            register_log("qfuse", "qfuse")
        if "qfuse_matches" not in log_registry.artifact_names:
            register_artifact(
                "qfuse_matches",
                "A table of the quantized linears that qfuse fused, and of those it did not, with the reason",
                visible=True,
                off_by_default=True,
            )
    except Exception:
        return  # logging is a convenience: without it torch must still import
