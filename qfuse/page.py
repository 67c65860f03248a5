"""A report as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch

from qfuse.report import Report, group, short_path

if TYPE_CHECKING:
    from qfuse.records import Miss


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write `report` to `path`."""
    Path(path).write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short_path"] = short_path
    environment.filters["marked"] = _marked
    source = resources.files("qfuse").joinpath("templates/report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        groups=group(report.misses),
        versions=f"qfuse {importlib.metadata.version('qfuse')}, torch {torch.__version__}",
    )


def _marked(lines: Sequence[str], miss: Miss | None = None) -> list[tuple[str, str]]:
    """Pair each line with its CSS class: an operand, where the walk ended, or neither."""
    ended = f"%{miss.node} =" if miss is not None and miss.node else None
    return [
        (line.strip(), "operand" if line.startswith(" ") else "end" if ended and line.startswith(ended) else "step")
        for line in lines
    ]
