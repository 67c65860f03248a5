"""Inductor's cache of compiled graphs: used across processes, and never for another qfuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from producers import T2
from support import run_python
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import qfuse
from qfuse.fusion_pass import FUSION_PASS
from qfuse.isa import Isa, cpu_isa

_CODE = """
import torch, qfuse
from producers import TorchAO
from torch._dynamo.utils import counters

def run(seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    counters.clear()
    qfuse.reset_stats()
    model, x = TorchAO(48, 64, torch.float32, True), torch.randn(7, 64)
    with torch.no_grad():
        eager, result = model(x), torch.compile(model)(x)
    torch.testing.assert_close(result, eager, atol=1e-4, rtol=1e-4)
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_bypass"], qfuse.stats())

{runs}
"""


def _run(cache: Path, runs: str, **env: str) -> list[str]:
    """Return what each run says in a process of its own: cache hits, graphs that are not cached, and what was fused."""
    return run_python(_CODE.format(runs=runs), TORCHINDUCTOR_CACHE_DIR=str(cache), **env).stdout.splitlines()


FUSED = "{'int8.dynamic_per_token': 1}"


def test_across_processes(tmp_path: Path) -> None:
    assert _run(tmp_path, "run(seed=0)") == [f"0 0 {FUSED}"]
    # the same graph with other weights: the compiled code is shared, what is packed in it is not; then another option
    runs = 'run(seed=0); run(seed=1); qfuse.config.disabled_lowerings = ["cpp"]; run(seed=0)'
    assert _run(tmp_path, runs) == [f"1 0 {FUSED}", f"1 0 {FUSED}", f"0 0 {FUSED}"]
    assert _run(tmp_path, "run(seed=0)", QFUSE="0") == ["0 0 {}"]


def test_changed_source_is_another_key(tmp_path: Path) -> None:
    """Any file of the package counts: a changed lowering must not be answered by the kernel of the old one."""
    source = Path(__file__).parent.parent
    package = tmp_path / "qfuse"
    shutil.copytree(source / "qfuse", package)
    for name in ("patterns", "lowerings"):
        shutil.copytree(source / name, package / name)
    shutil.copytree(source / "qfuse" / "_autoload", tmp_path / "_qfuse_autoload")
    changed = ("lowerings/onednn.py", "lowerings/cpp/linear.cpp.jinja", "patterns/int8.py", "steps.py")
    (key,) = _keys(package, ())
    keys = _keys(package, changed)
    assert keys[0] == key
    assert len(set(keys)) == 1 + len(changed)


def _keys(package: Path, changed: tuple[str, ...]) -> list[str]:
    """Return the keys, in one new process, of `package` as it is, and after each of its files that are changed."""
    path, *keys = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(package.parent)!r})
        import qfuse
        from qfuse.fusion_pass import FUSION_PASS, source_hash

        print(qfuse.__file__, FUSION_PASS.uuid())
        for file in {[str(package / name) for name in changed]}:
            with open(file, "a") as source:
                print(file=source)
            source_hash.cache_clear()  # as in another process
            print(FUSION_PASS.uuid())
        """
    ).stdout.split()
    assert path == str(package / "__init__.py")
    return keys


def test_options_are_part_of_the_key() -> None:
    key = FUSION_PASS.uuid()
    with qfuse.config.patch(disabled_patterns=["int8.static_per_tensor"]):
        assert FUSION_PASS.uuid() != key
    assert FUSION_PASS.uuid() == key


def test_cpu_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of it is: the best instructions for integers, those for bfloat16, the maker, and a cache's size."""
    key = FUSION_PASS.uuid()
    keys = {key}
    for isa in set(Isa) - {cpu_isa()}:
        with monkeypatch.context() as patch:
            patch.setattr("qfuse.isa.cpu_isa", lambda isa=isa: isa)
            keys.add(FUSION_PASS.uuid())
    has = torch.cpu.get_capabilities()
    others = {"avx512_bf16": not has.get("avx512_bf16"), "cpu_name": "another", "l2_cache_size": 12345}
    for name, value in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, "get_capabilities", lambda name=name, value=value: has | {name: value})
            keys.add(FUSION_PASS.uuid())
    assert len(keys) == len(Isa) + len(others)
    assert FUSION_PASS.uuid() == key


def test_same_shape_other_weights_in_one_process() -> None:
    """Frozen weights are known to the cache by their shapes alone, so nothing computed from them may be in the code."""
    with fresh_cache():
        for seed in range(2):
            _check(seed)


def _check(seed: int) -> None:
    """Compile with weights of this seed; the second seed finds the first one's code."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model = T2(48, 64, torch.float32, True)
    q, xs = model.inputs(7)
    counters.clear()
    result = torch.compile(model)(q, xs)
    assert counters["inductor"]["fxgraph_cache_hit"] == seed
    expected = (q.double() @ model.w.double().t()) * xs * model.ws + model.b
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)
