"""Random epilogues of integer matmuls: each legal one has to fuse, and each near miss to stay right.

Prints the seed; the same seed tries the same graphs. A failure is shrunk, which takes minutes, and printed.
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, seed, settings

BATCH = 25  # graphs that are traced as one model


def main() -> int:
    """Run the fuzzer and return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=2000, help="graphs of either kind (default: 2000)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run (default: another one each time)")
    parser.add_argument("--no-shrink", action="store_true", help="print a failing batch as it is")
    options = parser.parse_args()
    chosen = random.randrange(2**32) if options.seed is None else options.seed
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from epilogues import check, legal, near_miss

    print(f"seed {chosen}", flush=True)
    phases = [Phase.explicit, Phase.generate] if options.no_shrink else list(Phase)
    for kind, recipe, all_fuse in (("legal", legal(), True), ("near miss", near_miss(), False)):
        start = time.monotonic()
        tried = _try(recipe, functools.partial(check, all_fuse=all_fuse), options.graphs, chosen, phases)
        what = f"{tried} {kind} graphs: no wrong result{' and none unfused' * all_fuse}"
        print(f"{what}, {time.monotonic() - start:.0f} s", flush=True)
    return 0


def _try(
    recipe: st.SearchStrategy[Any], check: Callable[[list[Any]], None], graphs: int, chosen: int, phases: list[Phase]
) -> int:
    """Check that many random graphs, in batches, reproducibly; return how many."""
    tried = 0

    def batch(recipes: list[Any]) -> None:
        nonlocal tried
        check(recipes)
        tried += len(recipes)

    limits = settings(
        max_examples=-(-graphs // BATCH),
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    batches = st.lists(recipe, min_size=BATCH, max_size=BATCH, unique=True)
    seed(chosen)(limits(given(batches)(batch)))()
    return tried


if __name__ == "__main__":
    sys.exit(main())
