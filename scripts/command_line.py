"""What the command lines of the scripts share. The standard library is enough for it."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """Return a type for argparse: an integer that is not below `lowest`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    return integer


def silence() -> None:
    """Turn off what other libraries say on import that has nothing to do with this run. Call it before them."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # models are installed or random: ask no hub
    # torchao reports that its CUDA libraries do not load; torch, that torchao registers its enums the old way.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
