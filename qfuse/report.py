"""What was fused and what was not, for a person to read."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qfuse.records import Match, Miss

#: Modules that are named where equal misses are told as one.
_NAMED = 4


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
        width = min(max(shutil.get_terminal_size((120, 0)).columns, 80), 200)
        console = Console(file=out, width=width, color_system=None)
        console.print(self.summary())
        for table in self.tables(width):
            console.print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def summary(self) -> str:
        """Return one line: how many of how many."""
        of = len(self.matches) + len(self.misses)
        return f"qfuse fused {len(self.matches)} of {of} quantized matmuls" + f": {self.note}" * bool(self.note)

    def tables(self, width: int | None = None) -> Iterable[Table]:
        """Return a table of matches and one of misses, for a rich console of `width`; without those that are empty."""
        if self.matches:
            table = _matches(self.matches, with_source=True)
            if width is not None and Console(width=10_000).measure(table).maximum > width:
                table = _matches(self.matches, with_source=False)
            yield table
        if self.misses:
            yield _misses(group(self.misses))

    def to_json(self) -> str:
        """Return all records as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page, with the graph before and after each match, and of each miss."""
        from qfuse.page import write  # needs jinja2, which nothing else does

        write(self, path)


@dataclass(frozen=True)
class Misses:
    """Misses that differ in nothing but the module: layers of a model."""

    first: Miss
    all: Sequence[Miss]

    @property
    def where(self) -> str:
        """The matmuls, by their modules where they have any, and by the line."""
        names = [m.module or m.anchor.partition(" (")[2].rstrip(")") for m in self.all]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        operator = self.first.anchor.partition(" (")[0]
        count = f"{len(names)} × " if len(names) > 1 else ""
        return f"{count}{operator} in {', '.join(names[:_NAMED])}{more}"

    @property
    def source(self) -> str:
        """The line of the matmuls, or "" where they are on several."""
        return short_path(self.first.source) if len({m.source for m in self.all}) == 1 else ""

    @property
    def ended_at(self) -> str:
        """The node, the rule that declined and the place where that is another; "" where no node is to blame."""
        miss = self.first
        place = miss.node_source if miss.node_source != miss.source else ""
        node = f"{miss.node} in {miss.step}" if miss.step else miss.node
        return ", ".join(part for part in (node, short_path(place)) if part)


def group(misses: Iterable[Miss]) -> list[Misses]:
    """Bring together what a user would read as the same, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[Miss]] = {}
    for m in misses:
        operator = m.anchor.partition(" (")[0]
        line = m.source if m.node else ""  # where no node is to blame, no line is
        key = (operator, m.pattern, m.reason, m.hint, m.step, line, m.node_source)
        groups.setdefault(key, []).append(m)
    return [Misses(members[0], members) for members in groups.values()]


def short_path(place: str) -> str:
    """Keep the last two parts of a path."""
    return "/".join(place.rsplit("/", 2)[-2:]) if place.startswith("/") else place


def _matches(matches: Sequence[Match], with_source: bool) -> Table:
    """Make a table, without the columns that are empty throughout."""
    columns = {
        "pattern": [m.pattern for m in matches],
        "lowering": [m.lowering for m in matches],
        "M×K×N": [m.shape for m in matches],
        "dtypes": [m.dtypes for m in matches],
        "module": [m.module for m in matches],
        "source": [short_path(m.source) if with_source or not m.module else "" for m in matches],
    }
    used = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(title="fused", title_justify="left")
    for name in used:
        table.add_column(name, overflow="fold")
    for row in zip(*used.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _misses(groups: Sequence[Misses]) -> Table:
    """Make a paragraph for each: reasons are too long for columns."""
    table = Table(title="not fused", title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for g in groups:
        rows = {
            "matmul": g.where,
            "source": g.source,
            "reason": g.first.reason,
            "ended at": g.ended_at,
            "code": g.first.code,
            "nearest": g.first.pattern,
            "change": g.first.hint,
        }
        for label, text in rows.items():
            if text:
                table.add_row(Text(label), Text(text))
        if g is not groups[-1]:
            table.add_row("", "")
    return table
