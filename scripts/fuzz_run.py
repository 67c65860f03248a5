"""Random epilogues of integer matmuls: each legal one has to fuse, and each near miss to stay right.

Prints the seed; the same seed tries the same graphs. A failure is shrunk, which takes minutes, and printed.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
    from epilogues import Recipe, check, legal, near_miss

    print(f"seed {chosen}", flush=True)
    phases = [Phase.explicit, Phase.generate] if options.no_shrink else list(Phase)
    for kind, recipe, all_fuse in (("legal", legal(), True), ("near miss", near_miss(), False)):
        tried = 0
        start = time.monotonic()

        def batch(recipes: list[Recipe], all_fuse: bool = all_fuse) -> None:
            nonlocal tried
            check(recipes, all_fuse=all_fuse)
            tried += len(recipes)

        _repeat(batch, recipe, -(-options.graphs // BATCH), chosen, phases)
        print(
            f"{tried} {kind} graphs: no wrong result{' and none unfused' * all_fuse}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return 0


def _repeat(
    body: Callable[..., None], recipe: st.SearchStrategy[object], times: int, chosen: int, phases: list[Phase]
) -> None:
    """Call `body` with as many random batches, reproducibly."""
    limits = settings(
        max_examples=times, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    batches = st.lists(recipe, min_size=BATCH, max_size=BATCH, unique=True)
    seed(chosen)(limits(given(batches)(body)))()


if __name__ == "__main__":
    sys.exit(main())
