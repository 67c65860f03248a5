"""Measure how fast qfuse's int8 is, beside other ways to run the same linears and models.

`linear` measures single linears and, for decoding, chains of them, and says how much of the machine's peak they reach;
the peak is measured in the same rounds. `model` measures whole models. Whatever is compared alternates, in one process
for each number of threads. Results go to the screen, and as JSON, text and a plot into a folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.worker import ISA_LIMITS
from command_line import at_least, silence

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("minilm", "bert", "llama")


def main() -> int:
    """Run the benchmark and return the exit status."""
    options = parse_options()
    silence()
    if options.command == "engine":
        return serve_engine(options)
    if options.worker is None:
        from benchmarks.parent import run  # not before: --help needs nothing installed

        return run(options, sys.argv[1:])
    from benchmarks.worker import work

    work(options)
    return 0


def serve_engine(options: argparse.Namespace) -> int:
    """Be the process of one engine; `model` starts these."""
    from benchmarks.worker import prepare_process

    prepare_process(options)
    from benchmarks.engine_process import serve

    serve(options)
    return 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{linear,model}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--threads", type=at_least(1), nargs="+", default=[1, 2], metavar="N", help="numbers of threads (default: 1 2)"
    )
    common.add_argument("--rounds", type=at_least(2), default=30, metavar="N", help="alternating rounds (default: 30)")
    common.add_argument(
        "--isa",
        choices=list(ISA_LIMITS),
        default="native",
        help="avx512_vnni: as on a CPU without AMX, for torch and torchao too",
    )
    common.add_argument("--profile", action="store_true", help="show the time by kernel too; slows calls a little")
    common.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs" / "benchmarks",
        metavar="DIR",
        help="where results go (default: docs/benchmarks)",
    )
    common.add_argument(
        "--engines", nargs="+", default=[], metavar="TEXT", help="only those with one of these in the name, as int8"
    )
    common.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is the process that measures, into there

    linear = commands.add_parser("linear", parents=[common], help="int8 linears, and chains of them for one token")
    linear.add_argument(
        "--shapes", nargs="+", default=[], metavar="MxKxN", help="other shapes; those with M = 1 make decode chains"
    )
    linear.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    linear.add_argument("--quantized", action="store_true", help="only with the activation quantized before")
    linear.add_argument("--dynamic", action="store_true", help="only with torchao's dynamic quantization inside")
    linear.add_argument(
        "--decode", action=argparse.BooleanOptionalAction, default=True, help="chains of linears for one token"
    )
    linear.add_argument("--layers", type=at_least(0), default=0, metavar="N", help="of a chain (default: over 256 MiB)")
    linear.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the model around (default: bf16)")
    linear.add_argument("--gelu", action=argparse.BooleanOptionalAction, default=True, help="after the linear")
    linear.add_argument(
        "--memory", type=at_least(1), default=1024, metavar="MIB", help="what the read probe reads (default: 1024)"
    )

    model = commands.add_parser("model", parents=[common], help="whole models, and other engines")
    model.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="(default: all)")
    model.add_argument(
        "--compiles", type=at_least(1), default=1, metavar="N", help="compiles of each engine, in turn (default: 1)"
    )

    engine = commands.add_parser("engine", parents=[common])  # one of those that `model` starts
    engine.add_argument("model")
    engine.add_argument("engine")
    engine.add_argument("--first", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
