"""What the tests share: running a model fused, unfused and in float64, and looking into its graphs."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import mmap
import os
import re
import subprocess
import sys
import textwrap
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.freezing import replace_params_with_constants
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, GraphModule, Interpreter, Node

import qfuse
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import compile_like_inductor, installed_passes, with_fresh_code
from qfuse.isa import Isa, cpu_isa
from qfuse.normal_form import reshaped_input
from qfuse.problem import Problem
from qfuse.records import recording

Model = Callable[..., Any]


@dataclass
class Traced:
    """A model traced through Inductor's passes and run without code generation.

    run_unfused: runs the graphs as they were before qfuse, by an interpreter.
    """

    result: Any
    report: qfuse.Report
    before: list[str]
    after: list[str]
    outputs: list[str]
    run_unfused: Callable[[type[Interpreter]], Any]

    def unfused_and_in_float64(self) -> tuple[Any, Any]:
        """Return what the function of this name does, without tracing again, which takes longer than all else."""
        return self.run_unfused(Interpreter), self.run_unfused(_Float64)

    def assert_no_worse(self) -> None:
        """Check the promise, as the function of this name does."""
        _assert_no_worse(self.result, *self.unfused_and_in_float64())


def _boxed(run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    def boxed(args: list[Any]) -> Any:
        return run(*args)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def _compiled(model: Model, load: Callable[[GraphModule], Callable[..., Any]], **kwargs: Any) -> Model:
    """Return `model` compiled by Inductor up to its joint-graph passes; `load` takes the place of code generation."""

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_like_inductor(
                gm,
                example_inputs,
                mode=None,
                inner_compile=lambda gm, inputs, **_: _boxed(load(gm)),
                **kwargs,
            )

    @with_fresh_code
    def call(*args: Any) -> Any:
        return model(*args)

    return torch.compile(call, backend=backend)


def unfused(model: Model, *args: Any) -> Any:
    """Run the graph as its producer made it."""
    return _interpreted(model, args, Interpreter)[0]


def in_float64(model: Model, *args: Any) -> Any:
    """Run the graph as its producer made it, but all that follows an integer matmul in float64: the true result."""
    return _interpreted(model, args, _Float64)[0]


def unfused_and_in_float64(model: Model, *args: Any) -> tuple[Any, Any]:
    """Return both of one trace, which takes longer than running it."""
    plain, exact = _interpreted(model, args, Interpreter, _Float64)
    return plain, exact


def _interpreted(model: Model, args: tuple[Any, ...], *interpreters: type[Interpreter]) -> list[Any]:
    """Run the graph as its producer made it, by each of `interpreters`; it is traced once."""
    interpreter: type[Interpreter]

    def result_of(next_interpreter: type[Interpreter]) -> Any:
        nonlocal interpreter
        interpreter = next_interpreter
        return compiled(*args)

    with qfuse.config.patch(enabled=False):
        compiled = _compiled(
            model, lambda gm: lambda *a: interpreter(gm).run(*a), graph_pass=None, options={"freezing": False}
        )
        return [result_of(each) for each in interpreters]


class _Float64(Interpreter):
    """Evaluates what follows from quantized integers without rounding.

    Integers that become floats, what is rounded to integers, and results of integer matmuls are float64, and so is all
    that is computed from them, and whatever else has the size of a matmul's result. Scales stay as they are.
    """

    sizes: frozenset[int] = frozenset()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        exact = any(t.dtype is torch.float64 for t in tensors)
        if target is prims.convert_element_type.default:
            value, dtype = args
            if not dtype.is_floating_point:
                return super().call_function(target, args, kwargs)
            return value.double() if exact or not value.is_floating_point() else value.to(dtype)
        result = super().call_function(target, self._doubled(args) if exact else args, kwargs)
        if target in _MATMULS:
            self.sizes |= {result.numel()}
        if target in _STARTS or (_is_float(result) and tensors and result.numel() in self.sizes and not exact):
            return (
                result if target in _STARTS else super().call_function(target, self._doubled(args), kwargs)
            ).double()
        return result

    def _doubled(self, args: Any) -> Any:
        return tuple(a.double() if _is_float(a) else a for a in args)


aten, prims = torch.ops.aten, torch.ops.prims
_MATMULS = (aten._int_mm.default, aten.mm.default, aten.addmm.default, aten.bmm.default)
_STARTS = (aten._int_mm.default, aten.round.default)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


class _Snapshot(CustomGraphPass):
    """Notes the operators of each graph that passes by, and those that its outputs are reshapes of."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.outputs: list[str] = []

    def __call__(self, graph: Graph) -> None:
        self.ops += [str(n.target) for n in graph.nodes if n.op == "call_function"]
        for output in graph.output_node().all_input_nodes:
            below: Node | None = output
            while below is not None:
                node, below = below, reshaped_input(below)
            self.outputs.append(str(node.target))

    def uuid(self) -> None:
        return None

    def __deepcopy__(self, memo: object) -> _Snapshot:
        return self


class _Copy(_Snapshot):
    """Keeps a copy of the last graph as well."""

    graph: GraphModule

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        self.graph = _copy_with_constants(graph)


def _copy_with_constants(graph: Graph) -> GraphModule:
    """Return a copy of a joint graph, with constants for the same parameters as freezing has them for."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    module = GraphModule(graph.owning_module, copied)
    context = TracingContext.try_get()  # there is none where it is compiled ahead of time
    if inductor_config.freezing and context and context.fw_metadata and context.params_flat_unwrap_subclasses:
        metadata = copy.copy(context.fw_metadata)  # which is written to
        replace_params_with_constants(module, context.params_flat_unwrap_subclasses, metadata)
    return module


@contextlib.contextmanager
def snapshots() -> Iterator[tuple[_Copy, _Snapshot]]:
    """Note the operators before and after qfuse."""
    before, after = _Copy(), _Snapshot()
    others = tuple(p for p in installed_passes() if p is not FUSION_PASS)
    with inductor_config.patch(joint_custom_post_pass=(*others, before, FUSION_PASS, after)):
        yield before, after


def trace(model: Model, *args: Any) -> Traced:
    """Run `model` fused, its canonical ops by their reference implementation, without a compile."""
    interpreter: type[Interpreter] | None = None

    def load(fused: GraphModule) -> Callable[..., Any]:
        unfused = before.graph
        return lambda *a: fused(*a) if interpreter is None else interpreter(unfused).run(*a)

    def run_unfused(by: type[Interpreter]) -> Any:
        nonlocal interpreter
        interpreter = by
        return compiled(*args)

    with recording() as (matches, misses), snapshots() as (before, after):
        compiled = _compiled(model, load, graph_pass=FUSION_PASS, options=None)
        result = compiled(*args)
    return Traced(result, qfuse.Report(matches, misses), before.ops, after.ops, after.outputs, run_unfused)


def compile_and_run(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, qfuse.Report]:
    """Run `model` fused, for real."""
    torch._dynamo.reset()
    with recording() as (matches, misses):
        result = torch.compile(model, **kwargs)(*args)
    return result, qfuse.Report(matches, misses)


def one_translation_unit() -> contextlib.AbstractContextManager[None]:
    """Have Inductor write all kernels of a graph into one file, which takes GCC a third of the time."""
    return cast(contextlib.AbstractContextManager[None], inductor_config.patch(cpp_wrapper=True))


def compile_together(models: Sequence[Model], inputs: Sequence[Sequence[Any]], **kwargs: Any) -> tuple[list[Any], str]:
    """Run each model with its inputs, all compiled as one graph; return the results and the code."""
    torch._dynamo.reset()

    @with_fresh_code
    def together(*inputs: Sequence[Any]) -> list[Any]:
        return [model(*args) for model, args in zip(models, inputs, strict=True)]

    with one_translation_unit(), inductor_config.patch(fx_graph_cache=False):
        results, (*_, code) = run_and_get_code(torch.compile(together, **kwargs), *inputs)
    return results, code


def calls_of_kernels(text: str, code: str) -> int:
    """Return how often kernels with `text` in them are called in `compile_together`'s code.

    Of kernels that are alike, the code has one.
    """
    kernels = re.findall(r"void\s+(cpp_fused\w+)\(((?:(?!\nextern \"C\").)*)", code, re.DOTALL)
    names = {name for name, body in kernels if text in body}
    return sum(len(re.findall(rf"^ +{name}\(", code, re.MULTILINE)) for name in names)


def error(result: Any, exact: Any) -> float:
    """Return the largest deviation in any column, relative to the largest value of that column."""
    results, exacts = (r if isinstance(r, tuple) else (r,) for r in (result, exact))
    worst = 0.0
    for r, e in zip(results, exacts, strict=True):
        assert r.shape == e.shape
        if r.numel():
            deviation = (r.double() - e).abs().reshape(-1, r.shape[-1]).amax(0)
            largest = e.abs().reshape(-1, r.shape[-1]).amax(0).clamp_min(1e-30)
            worst = max(worst, (deviation / largest).max().item())
    return worst


def assert_no_worse(result: Any, model: Model, *args: Any) -> None:
    """Check the promise: the error against float64 is no larger than the unfused graph's, within 5 %.

    In float32 both are a few ulp, and which of two orders of multiplication is luckier is chance: 2 ulp are granted.
    """
    _assert_no_worse(result, *unfused_and_in_float64(model, *args))


def _assert_no_worse(result: Any, plain: Any, exact: Any) -> None:
    assert error(plain, exact) < 0.1  # not inf, or anything would do
    dtypes = [
        (r.dtype, p.dtype)
        for r, p in zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, plain)), strict=True)
    ]
    assert all(r is p for r, p in dtypes), dtypes
    assert error(result, exact) <= 1.05 * error(plain, exact) + 2 * torch.finfo(torch.float32).eps


def without_amx() -> contextlib.AbstractContextManager[object]:
    """Fuse as on a CPU without AMX, where the activation is uint8, so that graphs and names are the same everywhere."""
    return unittest.mock.patch("qfuse.problem.cpu_isa", return_value=Isa.AVX512_VNNI)


def run_python(code: str, *, cwd: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process that finds the tests' modules, and insist that it succeeds."""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def at_end_of_page(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` that ends where a page does, behind which nothing may be read."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, pages + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(area)) + pages
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    memory = torch.frombuffer(area, dtype=tensor.dtype, count=pages // tensor.element_size())
    return memory[memory.numel() - tensor.numel() :].view(tensor.shape).copy_(tensor)


def linear_problem(**facts: Any) -> Problem:
    """Return `facts`, and else those of a small linear on this CPU: a constant weight, called from Python."""
    usual: dict[str, Any] = {
        "m": 5,
        "k": 64,
        "n": 48,
        "x_dtype": torch.int8,
        "out_dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "isa": cpu_isa(),
        "weight_is_constant": True,
        "called_from_python": True,
    }
    return Problem(**usual | facts)
