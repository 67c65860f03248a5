"""`python -m qfuse`. Most of it runs in this process: starting Python and torch takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qfuse.doctor
from qfuse.__main__ import main
from qfuse.isa import Isa

FACTORIES = """
import torch
from producers import T2

def good():
    assert not torch.is_grad_enabled()
    model = T2(48, 64, torch.float32, True)
    return model, model.inputs(7)

class Nested:
    @staticmethod
    def named():
        return (lambda x, *, factor: x * factor), [torch.ones(3)], {"factor": 2}

def bare():
    return torch.nn.Linear(3, 4)

def tensor():
    return torch.nn.Linear(3, 4), torch.ones(3)

def needy(x):
    pass

number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that a user would stand in, with a module."""
    (tmp_path / "qfuse_test_factories.py").write_text(FACTORIES)
    (tmp_path / "qfuse_test_broken.py").write_text("import does_not_exist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "qfuse_test_factories", raising=False)
    return tmp_path


def test_explain(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "qfuse_test_factories:good", "--html", "page.html"]) == 0
    assert capsys.readouterr().out.startswith("qfuse fused 1 of 1 quantized matmuls\nfused\n")
    assert "<!doctype html>" in (factories / "page.html").read_text(encoding="utf-8")


def test_explain_json(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "qfuse_test_factories:Nested.named", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"matches": [], "misses": [], "note": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qfuse_test_factories"], "not of the form package.module:factory"),
        (["qfuse_test_factories.py:good()"], "not of the form package.module:factory"),
        (["qfuse_test_absent:good"], "there is no module 'qfuse_test_absent'"),
        (["qfuse_test_factories.sub:good"], "there is no module 'qfuse_test_factories.sub'"),
        (["qfuse_test_factories:absent"], "'qfuse_test_factories' has no 'absent'"),
        (["qfuse_test_factories:number"], "is no function, but of type int"),
        (["qfuse_test_factories:needy"], "cannot be called without arguments: missing a required argument: 'x'"),
        (["qfuse_test_factories:bare"], "has to return (model, args) or (model, args, kwargs)"),
        (["qfuse_test_factories:tensor"], "it returned (Linear, Tensor)"),
        (["qfuse_test_factories:good", "--html", "absent/page.html"], "cannot write absent/page.html"),
    ],
)
def test_one_line_for_an_error(
    arguments: list[str], message: str, factories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qfuse: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_error_of_the_users_module_keeps_its_traceback(factories: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="does_not_exist"):
        main(["explain", "qfuse_test_broken:factory"])


def test_process(factories: Path) -> None:
    """Started as a user does, from a directory with a module, and where Python itself leaves that directory out."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    path = [os.path.dirname(__file__), env.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "qfuse", "explain", "qfuse_test_factories:good"],
        env={**env, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("qfuse fused 1 of 1")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    facts, _, problems = capsys.readouterr().out.partition("\n\n")
    told = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert f"torch {torch.__version__}" in told["versions"]
    assert told["pass"] == "installed"
    assert told["freezing"] == "on, the default with qfuse"
    assert told["autoload"] == "entry points present"
    assert "on cpu      " in facts
    assert "freezing" not in problems


def _another_pass(graph: object) -> None:
    """What another plugin installs."""


def test_doctor_finds_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = qfuse.doctor
    monkeypatch.setattr(doctor, "compiler", lambda: None)
    monkeypatch.setattr(doctor, "cpu_isa", lambda: Isa.NONE)
    monkeypatch.setattr(doctor, "installed_passes", lambda: (_another_pass,))
    monkeypatch.setattr(doctor, "_requirement", lambda: "torch<2.2,>=2.1")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setitem(sys.modules, doctor._X86_QUANTIZER, SimpleNamespace())
    text = qfuse.doctor.diagnosis()
    for problem in (
        "torch<2.2,>=2.1",
        "pass is not installed",
        "no C++ compiler",
        "neither AVX2, VNNI nor AMX",
        "TORCH_DEVICE_BACKEND_AUTOLOAD is off",
        "torchao's x86 quantizer",
        "other passes run on the same graphs: test_command_line._another_pass",
    ):
        assert problem in text
    problems = text.partition("known problems\n")[2].splitlines()
    assert [line[:4] for line in problems[1::2]] == ["  → "] * (len(problems) // 2)


def test_doctor_says_who_decided_about_freezing() -> None:
    with torch._inductor.config.patch(freezing=False):
        text = qfuse.doctor.diagnosis()
    assert "freezing    off, set in torch._inductor.config.freezing" in text
    assert "- freezing is off" in text


def test_doctor_says_that_qfuse_is_off() -> None:
    with qfuse.config.patch(enabled=False, disabled_patterns=["int8.static_per_tensor"]):
        text = qfuse.doctor.diagnosis()
    assert "- qfuse is switched off" in text
    assert "config      enabled=False, disabled_patterns=['int8.static_per_tensor']" in text
