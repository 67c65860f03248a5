"""What the fused kernel is compiled to, beside stock Inductor's of the same tile: a table, and docs/gpu_evidence.md.

No GPU is needed, and nothing is measured. How kernels are compiled and read stands in tests/gpu_evidence.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jinja2
import rich.box
from command_line import at_least, silence
from rich.console import Console
from rich.table import Table

silence()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import gpu_binary  # noqa: E402
import gpu_evidence  # noqa: E402
from gpu_evidence import ARCHITECTURES, WITH_TMA, Evidence  # noqa: E402

from qfuse.lowerings.triton.configurations import configurations, tma_configurations  # noqa: E402

TEMPLATE = ROOT / "scripts" / "gpu_evidence.md.jinja"
WRITTEN = ROOT / "docs" / "gpu_evidence.md"


@dataclass(frozen=True)
class Row:
    """Two kernels that were compiled."""

    architecture: str
    m: int
    found: Evidence

    @property
    def holds(self) -> bool:
        """Whether nothing is spilled, registers are fewer than stock's, and blocks resident at once no fewer."""
        fused, stock = self.found.fused, self.found.stock
        return fused.stack == 0 and fused.registers < stock.registers and fused.resident >= stock.resident

    def cells(self) -> list[str]:
        """Return what the table says, of the fused kernel and of stock's."""
        tile, fused, stock = self.found.tile, self.found.fused, self.found.stock

        def both(value: Callable[[gpu_binary.Binary], object]) -> str:
            return f"{value(fused)} / {value(stock)}"

        def in_loop(names: Sequence[str]) -> str:
            return both(lambda b: b.count(names) if b.loop else f"({b.count(names)})")

        return [
            self.architecture,
            str(self.m),
            f"{tile.m}×{tile.n}×{tile.k}, {tile.stages}",
            both(lambda b: b.warps),
            both(lambda b: b.registers),
            both(lambda b: b.stack),
            both(lambda b: f"{b.shared / 1024:.0f}"),
            both(lambda b: b.resident),
            in_loop(gpu_binary.MATRIX),
            in_loop(gpu_binary.COPIES),
            in_loop(gpu_binary.SHARED),
        ]


COLUMNS = (
    "architecture",
    "M",
    "tile, stages",
    "warps",
    "registers",
    "spilled bytes",
    "shared KiB",
    "blocks",
    "matrix",
    "copies",
    "shared loads",
)


def spilling(architecture: str) -> tuple[int, list[str]]:
    """Compile every configuration for one architecture; return how many there are, and which of them spill."""
    compiled, found = 0, []
    device = gpu_evidence.device(architecture)
    for m in gpu_evidence.ROWS:
        size = (m, gpu_evidence.N, gpu_evidence.K, device)
        with_tma = tma_configurations(*size) if architecture in WITH_TMA else ()
        tiles = [(tile, False) for tile in configurations(*size)] + [(tile, True) for tile in with_tma]
        for tile, by_tma in tiles:
            compiled += 1
            if gpu_evidence.fused(architecture, m, tile, with_tma=by_tma).stack:
                found.append(f"{architecture}, M = {m}: {tile}{' by TMA' if by_tma else ''}")
    return compiled, found


def bytes_moved(m: int) -> tuple[int, int]:
    """Return the bytes that one fused kernel has to read and write, and those of two with int32 between them."""
    n, k = gpu_evidence.N, gpu_evidence.K
    once = m * k + n * k + 4 * (m + n + n) + 2 * m * n + 2 * m * n  # x, w, scales and bias, residual, result
    return once, once + 2 * 4 * m * n


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("architecture", "tile, stages") else "right")
    for row in rows:
        table.add_row(*row.cells(), style=None if row.holds else "red")
    console.print(table)


def main() -> None:
    """Compile what the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_evidence", description=__doc__)
    parser.add_argument(
        "architectures",
        nargs="*",
        metavar="ARCHITECTURE",
        help="only these, and write nothing: " + " ".join(ARCHITECTURES),
    )
    parser.add_argument(
        "--size", nargs=2, type=at_least(32), metavar=("K", "N"), help="of this weight, and write nothing"
    )
    arguments = parser.parse_args()
    wanted = arguments.architectures or list(ARCHITECTURES)
    if arguments.size:
        gpu_evidence.K, gpu_evidence.N = arguments.size
    if unknown := set(wanted) - set(ARCHITECTURES):
        parser.error(f"not among the architectures: {', '.join(sorted(unknown))}")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    pointers, tma, compiled, spills = [], [], 0, []
    for architecture in wanted:
        with console.status(f"compiling for {architecture} …"):
            pointers += [Row(architecture, m, gpu_evidence.by_pointers(architecture, m)) for m in gpu_evidence.ROWS]
            if architecture in WITH_TMA:
                tma.append(Row(architecture, 512, gpu_evidence.by_tma(architecture, 512)))
            count, spilled = spilling(architecture)
            compiled, spills = compiled + count, spills + spilled
    show(console, "by pointers, as by default: qfuse / stock Inductor", pointers)
    show(console, "by TMA", tma)
    console.print(f"{compiled} kernels of all configurations, {len(spills)} of them spill", *spills, sep="\n")
    if wanted == list(ARCHITECTURES) and not arguments.size:
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
        )
        text = environment.from_string(TEMPLATE.read_text()).render(
            columns=COLUMNS,
            pointers=pointers,
            tma=tma,
            compiled=compiled,
            spills=spills,
            moved={m: bytes_moved(m) for m in gpu_evidence.ROWS},
            n=gpu_evidence.N,
            k=gpu_evidence.K,
            torch=version("torch").partition("+")[0],
            triton=version("triton"),
        )
        WRITTEN.write_text(text)
        console.print(f"wrote {WRITTEN.relative_to(ROOT)}")
    if spills or not all(row.holds for row in (*pointers, *tma)):
        sys.exit("a kernel spills, takes no fewer registers than stock's, or fewer blocks are resident")


if __name__ == "__main__":
    main()
