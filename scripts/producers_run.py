"""Quantize two small models with older torchao releases, and check that qfuse fuses them.

Each release is installed in an environment of its own, .venv-producers/VERSION, which takes torch and everything else
from .venv. Every way of the release to quantize activations dynamically and weights to int8 is tried, in float32 and
bfloat16. The exit status is 1 if a graph with integer matmuls is not fused altogether, or fused less exactly than it
was. That a release does not work with this torch is a result, and so is a graph that computes in floats.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from producers_case import Case

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-producers"
#: Those in which the graph changed, or the API did.
RELEASES = ("0.7.0", "0.9.0", "0.12.0", "0.15.0", "0.16.0", "0.17.0", "0.18.0")


class ProducersError(Exception):
    """A release could not be checked; the message is a sentence for the user."""


def main() -> int:
    """Check the releases and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/producers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="VERSION", help=f"one release of torchao (default: {', '.join(RELEASES)})")
    only = parser.parse_args().only
    from producers_table import failures, show, step  # not before: --help needs nothing installed

    found: dict[str, list[Case]] = {}
    broken = []
    for release in [only] if only else RELEASES:
        try:
            with step(f"torchao {release}"):
                found[release] = check(release, environment(release))
        except ProducersError as error:
            broken.append(f"torchao {release}: {error}")
    if found:
        show(found)
    broken += failures(found)
    for failure in broken:
        print(f"qfuse: {failure}", file=sys.stderr)
    return 1 if broken else 0


def environment(release: str) -> Path:
    """Make the environment of a release, once, and return its Python.

    Raises:
        ProducersError: pip could not install the release.
    """
    path = ENVIRONMENTS / release
    python = path / "bin" / "python"
    packages = sysconfig.get_path("purelib")
    # A line of code, not of a directory, so that .pth files there are read too: qfuse is installed by one. These
    # packages come behind the environment's own on the path. Written last: it says that the environment is complete.
    link = f"import site; site.addsitedir({packages!r})\n"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
    stamp = own / "qfuse-producers.pth"
    if stamp.exists() and stamp.read_text() == link:
        return python
    venv.create(path, clear=True, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "install", "--no-deps", f"torchao=={release}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ProducersError(f"pip could not install it: {last_line(done.stderr)}")
    stamp.write_text(link)
    return python


def check(release: str, python: Path) -> list[Case]:
    """Check a release in the environment of `python`.

    Raises:
        ProducersError: the check did not come to its end; an exception of qfuse does that.
    """
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory, "cases")
        done = subprocess.run(
            [python, ROOT / "scripts" / "producers_check.py", release, results],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},  # and nothing that may hold another torchao
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise ProducersError(f"the check ended with {done.returncode}: {last_line(done.stderr)}")
        return [Case.from_json(line) for line in results.read_text().splitlines()]


def last_line(text: str) -> str:
    """Return the last line that is not empty, or ''."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
