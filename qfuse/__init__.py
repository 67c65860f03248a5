"""qfuse: fused quantized linears for `torch.compile`.

`import qfuse`, then compile as always. See `enable`, `disable`, `explain`, `stats`, `reset_stats` and `config`.
"""

import importlib.metadata

import _qfuse_autoload

_qfuse_autoload.register_logs()  # again: torch did not call it where TORCH_DEVICE_BACKEND_AUTOLOAD=0

from qfuse import config, ops  # noqa: E402
from qfuse.activation import disable, enable  # noqa: E402
from qfuse.explanation import explain  # noqa: E402
from qfuse.records import Match, Miss, reset_stats, stats  # noqa: E402
from qfuse.report import Report  # noqa: E402

__all__ = ["Match", "Miss", "Report", "config", "disable", "enable", "explain", "ops", "reset_stats", "stats"]
__version__ = importlib.metadata.version("qfuse")

if not _qfuse_autoload.importing_for_backend:
    enable()
