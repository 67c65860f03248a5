"""`scripts/bench` at sizes that take no time: that it measures, not what it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qfuse.isa import ACTIVATION_DTYPE, cpu_isa
from qfuse.lowerings import INT8_LINEAR


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")


def test_probes() -> None:
    from benchmarks.probes import Peak, Reads

    has = torch.cpu.get_capabilities()
    for name, flags in (("vnni", ("avx512_vnni", "avx_vnni")), ("avx2", ("avx2",)), ("amx", ("amx_int8",))):
        peak = Peak(name, 1)
        assert not peak.available or any(has.get(flag) for flag in flags)
        if peak.available:
            assert 1e9 < peak.measure() < 1e14
    ways = Reads(1 << 22, 1).ways()
    assert sorted(ways) == ["read 1 1", "read 1 2", "read 4 1", "read 4 2"]
    assert all(1e7 < measure() < 1e13 for measure in ways.values())


def test_bandwidth_is_that_of_one_way_of_reading() -> None:
    from benchmarks.probes import best_read

    rates = {"vnni": [9.0, 8.0, 7.0], "read 1 1": [1.0, 5.0, 9.0], "read 4 1": [6.0, 6.0, 6.0]}
    assert best_read(rates) == {"vnni": [9.0, 8.0, 7.0], "read": [6.0, 6.0, 6.0]}
    assert best_read({"vnni": [9.0]}) == {"vnni": [9.0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.linear import Settings, measure, notes
    from benchmarks.linear_modules import Shape
    from benchmarks.plot import plot
    from benchmarks.report import linear_tables
    from benchmarks.results import BF16, STOCK, Run, load, save

    shapes = (Shape(8, 64, 48), Shape(1, 64, 64))
    settings = Settings(shapes, layers=2, dtype=dtype, rounds=2, threads=1, memory_bytes=1 << 20)
    run = Run({}, "a machine", {}, list(measure(settings)), notes(settings))
    assert [(case.title, case.mode) for case in run.cases] == [
        ("8×64×48", "quantized"),
        ("8×64×48", "dynamic"),
        ("2 × (1×64×64)", "decode, quantized"),
        ("2 × (1×64×64)", "decode, dynamic"),
    ]
    for case in run.cases:
        names = [f"int8, qfuse {provider.name}" for provider in INT8_LINEAR["cpu"]]
        assert [engine.engine for engine in case.engines] == [*names, STOCK, BF16]
        for engine in case.engines:
            assert engine.absent or (len(engine.seconds) == 2 and engine.error is not None)
            # Stock Inductor matches some of these with oneDNN's matmul, which saturates on a CPU with AVX2 only.
            is_exact = cpu_isa() in ACTIVATION_DTYPE or engine.engine != STOCK
            assert engine.absent or not is_exact or engine.error < 0.05
        assert case.ran(STOCK)
    save([run], tmp_path / "linear.json")
    assert load(tmp_path / "linear.json") == [run]
    monkeypatch.setattr("benchmarks.results.UNDISTURBED", 0)
    assert [table.row_count for table in linear_tables(run.cases)] == [len(names) + 3] * 4
    assert plot(run.cases, run.summary, tmp_path / "linear.svg")
    assert (tmp_path / "linear.svg").stat().st_size


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be measured")
def test_no_gpu(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """One sentence says what is missing and what to do, and nothing is measured."""
    command = [sys.executable, "scripts/bench.py", "linear", "--device", "cuda", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("qfuse: --device cuda needs a ")
    assert line.endswith("and run this again.")
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_linear_on_gpus() -> None:
    """All but the device: what is measured on a GPU runs on the CPU, where qfuse has no lowering that is for GPUs."""
    from benchmarks.linear import Settings
    from benchmarks.linear_gpu import INT_MM, measure
    from benchmarks.linear_modules import Shape
    from benchmarks.report import linear_tables
    from benchmarks.results import BF16, STOCK

    settings = Settings((Shape(24, 64, 48),), modes=("quantized",), decode=False, gelu=False, rounds=2)
    (case,) = measure(settings, device="cpu")
    by_name = {engine.engine: engine for engine in case.engines}
    assert "no lowering" in by_name.pop("int8, qfuse triton").absent
    assert {STOCK, f"{STOCK}, max-autotune", "int8, not compiled", INT_MM, BF16} <= by_name.keys()
    for name, engine in by_name.items():
        assert len(engine.seconds) == 2, engine
        assert name == INT_MM or (engine.error is not None and engine.error < 0.05)
    (table,) = linear_tables([case])
    assert table.row_count == len(case.engines) + 1


def test_engines_are_chosen_by_a_part_of_their_names() -> None:
    from benchmarks.results import BF16, STOCK, chosen

    names = ["int8, qfuse cpp", STOCK, BF16]
    assert chosen(names, []) == names
    assert chosen(names, ["qfuse", "bf16"]) == ["int8, qfuse cpp", BF16]
    with pytest.raises(
        SystemExit, match=r"no engine has any of \['int4'\] in its name; there are: int8, qfuse cpp; int8, "
    ):
        chosen(names, ["int4"])


def test_only_the_engines_that_were_asked_for_are_measured(tmp_path: Path) -> None:
    from benchmarks.linear import Settings, measure
    from benchmarks.linear_modules import Shape
    from benchmarks.plot import plot

    settings = Settings(
        (Shape(8, 64, 48),), ("quantized",), decode=False, rounds=2, memory_bytes=1 << 20, engines=["cpp"]
    )
    (case,) = measure(settings)
    assert [engine.engine for engine in case.engines] == ["int8, qfuse cpp"]
    assert not plot([case], "a machine", tmp_path / "linear.svg")  # there is no bf16 to compare with
    assert not list(tmp_path.iterdir())


def test_decode_continues_prefill() -> None:
    """The step at the last position computes what prefill computes there."""
    from benchmarks.decoder import Decoder, Prefill, Size, Step

    size = Size(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=64, positions=16)
    decoder = Decoder(size)
    ids = torch.randint(size.vocabulary, (1, size.positions))
    _, *past = decoder.run(ids[:, :-1], 0, ())
    torch.testing.assert_close(Step(decoder)(ids[:, -1:], *past)[0], Prefill(decoder)(ids)[0][:, -1:])


def test_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from benchmarks.model import Settings, measure
    from benchmarks.model_engines import ENGINES
    from benchmarks.report import model_tables

    monkeypatch.setitem(ENGINES, "absent", dataclasses.replace(ENGINES["int8, eager"], packages=("no-such-package",)))
    # "failing" is not known to the process that should run it.
    monkeypatch.setitem(ENGINES, "failing", ENGINES["int8, eager"])
    engines = ("absent", "failing", "int8, eager", "int8, qfuse")
    (case,) = measure(Settings(["tiny-bert"], engines, rounds=2))
    absent, failing, eager, fused = case.engines
    assert absent.absent == "not installed: no-such-package"
    assert "failing" in failing.absent
    for engine in (eager, fused):
        assert engine.error is not None
        assert engine.error < 0.1
    assert eager.absent == "not timed"
    assert len(fused.seconds) == 2
    assert fused.note.startswith("6 of 6 fused: ")
    assert len(fused.compile_seconds) == 1
    assert all(len(rates) == 2 for rates in case.rates.values())
    monkeypatch.setattr("benchmarks.results.UNDISTURBED", 0)
    (table,) = model_tables([case])
    assert table.row_count == 4


def test_disturbed_rounds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.report import linear_tables, model_tables
    from benchmarks.results import BF16, Case, Measured, best_rates

    engines = [
        Measured("int8, qfuse", [1.0, 2.0, 1.2, 3.0]),
        Measured(BF16, [2.0, 2.0, 2.2, 3.0]),
        Measured("x", absent="y"),
    ]
    rates = {"vnni": [9.5, 10.0, 9.1, 9.6], "amx": [99.0, 50.0, 98.0, 60.0], "read": [1.0, 9.0, 9.0, 9.0]}
    case = Case("model", "models", 1, engines, rates, 10)
    slow = Case("slow", "models", 1, engines, {**rates, "amx": [60.0, 55.0, 58.0, 57.0]}, 10)
    fast = Case("fast", "models", 1, engines, {"amx": [100.0]})
    best = best_rates([case, slow, fast])
    assert best == {"vnni": 10.0, "amx": 100.0}
    assert case.undisturbed(best) is None  # two rounds say nothing
    monkeypatch.setattr("benchmarks.results.FEWEST_UNDISTURBED", 2)
    undisturbed = case.undisturbed(best)
    assert undisturbed is not None
    assert undisturbed.title == "in 2 undisturbed of 4 rounds"
    assert [engine.seconds for engine in undisturbed.engines] == [[1.0, 1.2], [2.0, 2.2], []]
    assert undisturbed.rates == {"vnni": [9.5, 9.1], "amx": [99.0, 98.0], "read": [1.0, 9.0]}
    assert undisturbed.undisturbed(best) is None  # all of them are
    assert slow.undisturbed(best) is None  # none is, though its own best is no better
    assert Case("model", "models", 1, engines).undisturbed({}) is None
    assert [table.row_count for tables in (model_tables, linear_tables) for table in tables([case])] == [6, 8]


def test_times_are_summed() -> None:
    from benchmarks.profiling import SHOWN, summed

    assert summed([("matmul", 2.0), ("add", 1.0), ("matmul", 4.0)]) == [["matmul", 6.0, 2], ["add", 1.0, 1]]
    many = [(str(i), float(i)) for i in range(SHOWN + 2)]
    assert summed(many)[-2:] == [["2", 2.0, 1], ["2 others", 1.0, 2]]


def test_profile_of_openvino() -> None:
    """By its own counters: torch's profiler sees nothing of it."""
    from benchmarks.model import Settings, measure
    from benchmarks.model_engines import ENGINES

    name = "fp32, OpenVINO"
    if missing := ENGINES[name].missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    (case,) = measure(Settings(["tiny-bert"], [name], rounds=2, profile=True))
    (measured,) = case.engines
    assert len(measured.seconds) == 2, measured
    linears = sum(calls for kind, _, calls in measured.kernels if kind.startswith("FullyConnected, "))
    assert linears == 6, measured.kernels
