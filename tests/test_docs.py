"""The documentation that is generated from the code is current, and the code knows what it needs to."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from qfuse.family import Family, Pattern
from qfuse.patterns import FAMILIES

ROOT = Path(__file__).parent.parent
DOCS = runpy.run_path(str(ROOT / "scripts" / "docs_run.py"))


def test_patterns_are_current() -> None:
    written = DOCS["PATTERNS"].read_text()
    assert written == DOCS["render"](), "docs/patterns.md is not what the code says now: run scripts/docs"


@pytest.mark.parametrize("pattern", [p for family in FAMILIES for p in family.patterns], ids=lambda p: p.name)
def test_pattern_is_documented_and_tested(pattern: Pattern) -> None:
    assert pattern.graph
    assert pattern.producers
    assert all(pattern.producers)
    assert (ROOT / pattern.test).is_file()
    assert DOCS["rows_by_pattern"]().get(pattern.name), f"no row of tests/producers.py has to match {pattern.name}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rules_have_docstrings(family: Family) -> None:
    for rule in (*family.anchors, *family.steps):
        assert type(rule).__doc__, rule
