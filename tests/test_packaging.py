"""The wheel and the editable install: both import from anywhere, with nothing generic in site-packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from support import run_python

ROOT = Path(__file__).parent.parent

_IMPORT = """
import torch, qfuse, qfuse.patterns.int8, qfuse.lowerings.onednn, _qfuse_autoload.backend
from importlib.metadata import entry_points
qfuse.fusion_pass._load_lowerings()
assert "qfuse" in entry_points(group="torch.backends").names
assert "qfuse" in entry_points(group="torch_dynamo_backends").names
print(qfuse.__file__)
"""


def test_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind, which the next would pack
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qfuse", "patterns", "lowerings"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("qfuse-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"qfuse", "_qfuse_autoload"}
    for package in ("qfuse", "patterns", "lowerings"):
        files = [path for path in (source / package).rglob("*") if path.is_file()]
        assert len(files) > 1
        for file in files:
            name = str(file.relative_to(source))
            installed = name.replace("qfuse/_autoload", "_qfuse_autoload") if package == "qfuse" else f"qfuse/{name}"
            assert installed in names
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", target, wheel], check=True)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n" + _IMPORT
    assert run_python(code, cwd=str(empty)).stdout.startswith(str(target))


def test_editable(tmp_path: Path) -> None:
    """The tests run in an editable install."""
    assert run_python(_IMPORT, cwd=str(tmp_path)).stdout.startswith(str(ROOT))
