"""Options of qfuse, as a torch config module.

Set them like torch's own: `qfuse.config.disabled_patterns = ["int8.static_per_tensor"]`, or for a while with
`with qfuse.config.patch(enabled=False): ...`. Values are per thread. All of them are part of the compile cache's key.
A misspelt name raises `AttributeError`.
"""

import logging
import os
import sys
from typing import TYPE_CHECKING

from torch.utils._config_module import Config, install_config_module

import _qfuse_autoload


def _names(variable: str) -> list[str]:
    """Read names that are separated by commas from the environment."""
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


def _number(variable: str, default: int) -> int:
    """Read a number from the environment; what is none is told, and has no effect."""
    value = os.environ.get(variable, "")
    try:
        return int(value) if value else default
    except ValueError:
        logging.getLogger("qfuse").warning("%s=%r is no number: it is ignored", variable, value)
        return default


# Fuse at all. The environment variable QFUSE=0 (or 1) has the last word. Unlike `qfuse.disable()` this leaves freezing
# on, and Inductor's own, unsound patterns for int8 matmuls off.
enabled: bool = Config(default=True, env_name_force="QFUSE")

# Names of patterns that are not fused, e.g. ["int8.dynamic_per_token"]; `qfuse.stats()` shows the names. In the
# environment: QFUSE_DISABLED_PATTERNS=int8.dynamic_per_token,int8.static_per_tensor
disabled_patterns: list[str] = _names("QFUSE_DISABLED_PATTERNS")

# Names of lowerings that are not chosen, e.g. ["onednn"]. In the environment: QFUSE_DISABLED_LOWERINGS.
disabled_lowerings: list[str] = _names("QFUSE_DISABLED_LOWERINGS")

# Make one kernel of the dynamic quantization in front of fused linears (see `qfuse.quantization`). Otherwise it is left
# to Inductor. On CPU that reads the activation twice, for the scale and for the integers, and computes twice what it
# fuses into that; on GPUs it makes three kernels of few long rows. Environment variable: QFUSE_FUSE_QUANTIZATION=0.
fuse_quantization: bool = Config(default=True, env_name_default="QFUSE_FUSE_QUANTIZATION")

# Make one kernel of a LayerNorm or RMSNorm and the quantization behind it, if that is fused, on CPU (see `qfuse.norm`).
# Environment variable: QFUSE_FUSE_NORMS=0.
fuse_norms: bool = Config(default=True, env_name_default="QFUSE_FUSE_NORMS")

# Make one kernel of linears that share an activation, like query, key and value, on CPU (see `qfuse.grouping`).
# Environment variable: QFUSE_GROUP_LINEARS=0.
group_linears: bool = Config(default=True, env_name_default="QFUSE_GROUP_LINEARS")

# In models with fused linears, compute attention by qfuse's own kernel where it is faster than ATen's, on CPU (see
# `qfuse.attention`). Environment variable: QFUSE_FUSE_ATTENTION=0.
fuse_attention: bool = Config(default=True, env_name_default="QFUSE_FUSE_ATTENTION")

# Run each fusion of a linear beside the graph that it replaces, on example values, and reject it if it is worse: see
# `qfuse.verification`. Slow: every fused op is compiled once more by itself. Environment variable: QFUSE_VERIFY=1.
verify: bool = Config(default=False, env_name_default="QFUSE_VERIFY")

# Make only the first so many fusions of the process, and decline the others, to find by bisection the one that is to
# blame for a difference; -1 is no limit. torch's own compiler bisector finds it by itself.
fusion_limit: int = _number("QFUSE_FUSION_LIMIT", -1)


def is_enabled() -> bool:
    """Tell whether to fuse; in the environment, words are understood as well."""
    value: object = sys.modules[__name__].enabled  # read through the installed module
    return str(value).lower() not in _qfuse_autoload.OFF


if TYPE_CHECKING:
    from torch.utils._config_typing import *  # noqa: F403

install_config_module(sys.modules[__name__])
