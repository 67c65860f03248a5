"""A table of what was fused and what was not, that a person can read."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from qfuse.records import Match, Miss


@dataclass(frozen=True)
class Report:
    """What qfuse did with a model: `matches` and `misses`, in the order of the graph; `str()` is a table.

    note: what else the user should know.
    """

    matches: Sequence[Match]
    misses: Sequence[Miss]
    note: str = ""

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=200, color_system=None)
        console.print(self.summary())
        for table in self.tables():
            console.print(table)
        return out.getvalue().rstrip()

    def summary(self) -> str:
        """Return one line: how many of how many."""
        of = len(self.matches) + len(self.misses)
        return f"qfuse fused {len(self.matches)} of {of} quantized matmuls" + f": {self.note}" * bool(self.note)

    def tables(self) -> Iterable[Table]:
        """Return a table of matches and one of misses, for a rich console; without those that are empty."""
        if self.matches:
            yield _table("fused", ["pattern", "lowering", "M×K×N", "dtypes", "module", "source"], self.matches)
        if self.misses:
            names = ["matmul", "nearest pattern", "reason", "node", "what to do", "module", "source"]
            yield _table("not fused", names, self.misses)

    def to_json(self) -> str:
        """Return all records as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def _table(title: str, columns: list[str], records: Sequence[Match] | Sequence[Miss]) -> Table:
    """Make a table, without the columns that are empty throughout."""
    rows = [[_short(str(v)) for v in dataclasses.astuple(r)] for r in records]
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table(title=title, title_justify="left")
    for i in used:
        table.add_column(columns[i], overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in used))
    return table


def _short(cell: str) -> str:
    """Keep the last two parts of a path."""
    return "/".join(cell.rsplit("/", 2)[-2:]) if cell.startswith("/") else cell
