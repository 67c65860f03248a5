"""Switching on and off: at import, by environment, by thread, beside other plugins, and as a backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from producers import T2, T18
from support import assert_no_worse, run_python
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import qfuse
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import installed_passes


class OtherPlugin(CustomGraphPass):
    """A pass of somebody else's; hashable by identity, like ours."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Graph) -> None:
        self.runs += 1

    def uuid(self) -> str:
        return "other"

    def __deepcopy__(self, memo: object) -> OtherPlugin:
        return self


@pytest.fixture(autouse=True)
def _enabled_afterwards() -> Iterator[None]:
    yield
    qfuse.enable()


def _compile_one(w_first: bool = False) -> int:
    """Compile one quantized linear and return how many were fused.

    With the weight's scale first, Inductor's own patterns swap the scales.
    """
    torch._dynamo.reset()
    before = sum(qfuse.stats().values())
    model = (T18 if w_first else T2)(48, 64, torch.float32, True)
    inputs = model.inputs(7)
    result = torch.compile(model)(*inputs)
    assert_no_worse(result, model, *inputs)
    return sum(qfuse.stats().values()) - before


def test_import_enables() -> None:
    assert FUSION_PASS in installed_passes()
    assert inductor_config.freezing
    assert _compile_one() == 1


def test_disable_and_enable() -> None:
    qfuse.disable()
    qfuse.disable()
    assert FUSION_PASS not in installed_passes()
    assert not inductor_config.freezing
    assert _compile_one() == 0
    qfuse.enable()
    qfuse.enable()
    assert installed_passes().count(FUSION_PASS) == 1
    assert _compile_one() == 1


def test_config_disables() -> None:
    with qfuse.config.patch(enabled=False):
        assert _compile_one(w_first=True) == 0
    with qfuse.config.patch(disabled_patterns=["int8.dynamic_per_token"]):
        assert _compile_one() == 0
    assert _compile_one() == 1
    with pytest.raises(AttributeError):
        qfuse.config.enabeld = False


def test_worker_thread() -> None:
    """Inductor's configuration is per thread; qfuse has to act in all of them."""
    fused: list[int] = []

    def work() -> None:
        with torch.no_grad():
            fused.append(_compile_one())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert fused == [1]


@pytest.mark.parametrize("slot", [tuple, list, lambda passes: passes[0]], ids=["tuple", "list", "bare"])
def test_other_plugins_pass_is_kept(slot: type) -> None:
    other = OtherPlugin()
    qfuse.disable()
    with inductor_config.patch(joint_custom_post_pass=slot([other])):
        qfuse.enable()
        assert _compile_one() == 1
        assert other.runs > 0
        qfuse.disable()
        assert installed_passes() == (other,)


@pytest.mark.parametrize("options", [None, {"epilogue_fusion": True}], ids=["plain", "options"])
def test_backend(options: dict[str, bool] | None) -> None:
    """`backend="qfuse"` fuses for one model, whatever the global switch says."""
    model = T2(48, 64, torch.float32, True)
    inputs = model.inputs(7)
    qfuse.disable()
    result = torch.compile(model, backend="qfuse", options=options)(*inputs)
    assert sum(qfuse.stats().values()) == 1
    assert_no_worse(result, model, *inputs)
    assert not installed_passes()
    assert not inductor_config.freezing


def test_backend_rejects_unknown_options() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    with pytest.raises(Exception, match="Unexpected optimization option"):
        torch.compile(double, backend="qfuse", options={"no_such_option": 1})(torch.ones(3))
    with pytest.raises(Exception, match="Unrecognized mode"):
        torch.compile(double, backend="qfuse", mode="fastest")(torch.ones(3))


def test_cpp_wrapper() -> None:
    """From C++ the packed weights cannot be called: another lowering is chosen, and the result is right."""
    model = T2(48, 64, torch.float32, True)
    inputs = model.inputs(7)
    result = torch.compile(model, options={"cpp_wrapper": True})(*inputs)
    assert sum(qfuse.stats().values()) == 1
    assert_no_worse(result, model, *inputs)


# --- in processes of their own, where the environment or the order of imports is what matters ------------------------

_LINEAR = """
import torch
from producers import T2, T18
model = T2(48, 64, torch.float32, True)
inputs = model.inputs(7)
def run(**kwargs):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, **kwargs)(*inputs)
"""


def test_environment_disables() -> None:
    code = """
import qfuse
from torch._inductor import config
run(), run(backend="qfuse")
assert not qfuse.stats(), qfuse.stats()
assert not config.freezing and not config.joint_custom_post_pass
qfuse.enable()
assert not config.freezing and not config.joint_custom_post_pass
"""
    run_python(_LINEAR + code, QFUSE="0")


def test_users_freezing_is_respected() -> None:
    """Without freezing nothing is constant, so nothing is fused, and the reason says so."""
    code = """
import qfuse
from torch._inductor import config
config.freezing = False
run()
assert not qfuse.stats() and not config.freezing
with torch.no_grad():
    (miss,) = qfuse.explain(model, *inputs).misses
assert "freezing" in miss.hint, miss
"""
    run_python(_LINEAR + code)
    run_python(_LINEAR + code.replace("config.freezing = False", ""), TORCHINDUCTOR_FREEZING="0")


def test_backend_alone_switches_nothing_on() -> None:
    """Named as a backend, qfuse is imported by torch: that is not the user's `import qfuse`."""
    code = """
import sys
run(backend="qfuse")
assert "qfuse" in sys.modules
from torch._inductor import config
assert not config.freezing and not config.joint_custom_post_pass
import qfuse
assert qfuse.stats() == {"int8.dynamic_per_token": 1}, qfuse.stats()
qfuse.reset_stats()
run()
assert not qfuse.stats()
qfuse.enable()
run()
assert qfuse.stats()
"""
    run_python(_LINEAR + code)
