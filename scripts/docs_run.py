"""Write docs/patterns.md: the families with their patterns, anchors and steps, and the lowerings, as the code has them.

What it says stands in `patterns/`, in docstrings, and in `tests/producers.py`; how it says it, in the template.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from pathlib import Path

import jinja2

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "scripts" / "docs_patterns.md.jinja"
PATTERNS = ROOT / "docs" / "patterns.md"


def render() -> str:
    """Return the text of docs/patterns.md."""
    from qfuse.lowerings import INT8_LINEAR, every_provider
    from qfuse.patterns import FAMILIES

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"doc": first_line, "module_doc": module_first_line, "cell": cell}
    return environment.from_string(TEMPLATE.read_text()).render(
        families=FAMILIES,
        modules={family.name: importlib.import_module(f"qfuse.patterns.{family.name}") for family in FAMILIES},
        rows=rows_by_pattern(),
        lowerings=INT8_LINEAR,
        providers=every_provider(),
    )


def first_line(thing: object) -> str:
    """Return the first line of the docstring of a module, a class, or an object's class."""
    documented = thing if inspect.ismodule(thing) or inspect.isclass(thing) else type(thing)
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def module_first_line(thing: object) -> str:
    """Return the first line of the docstring of the module that an object's class stands in."""
    return first_line(sys.modules[type(thing).__module__])


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|")


def rows_by_pattern() -> dict[str, list[str]]:
    """Return, for each pattern, the names of the producers' graphs in the tests that have to match it."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from producers import ROWS
    finally:
        sys.path.remove(str(ROOT / "tests"))
    rows: dict[str, list[str]] = {}
    for row in ROWS:
        rows.setdefault(row.pattern, []).append(row.name)
    return rows


if __name__ == "__main__":
    # torchao, which the tests' graphs come from, reports on import that its CUDA libraries do not load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    PATTERNS.parent.mkdir(exist_ok=True)
    PATTERNS.write_text(render())
    print(f"wrote {PATTERNS.relative_to(ROOT)}")
