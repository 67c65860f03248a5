"""Compile all-MiniLM-L6-v2 in int8 with and without qfuse, and compare speed and results.

Three engines are compared, all compiled by Inductor with frozen weights: the model in bf16; that model with its
linears quantized to int8 by torchao; and the same int8 model with qfuse. The reference is the model in fp32, not
compiled. Everything is installed with the project: no network is needed.
"""

from __future__ import annotations

import argparse
import sys

from command_line import at_least, silence


def main() -> int:
    """Run the demo and return the exit status."""
    options = parse_options()
    silence()
    from demo_run import DemoError, run  # not before: --help needs nothing installed, and importing is noisy

    try:
        run(options.threads, options.rounds)
    except DemoError as error:
        print(f"qfuse: {error}", file=sys.stderr)
        return 1
    return 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="threads to compute with (default: all cores)")
    parser.add_argument(
        "--rounds",
        type=at_least(2),
        metavar="N",
        help="timed calls of each engine (default: 60, fewer where that takes long)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
