"""The private APIs of torch that matching and activation rely on, in one place.

`tests/test_inductor.py` notices when one of them changes its meaning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any, cast
from unittest import mock

import torch
from torch._inductor import config as _inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes
from torch._logging._internal import trace_log, trace_structured
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._config_module import _UNSET_SENTINEL
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "are_equal_now",
    "compile_frozen_graph",
    "compile_like_inductor",
    "compiler",
    "concrete",
    "copy_origin",
    "emits_python",
    "fake_value",
    "freezes",
    "freezing",
    "freezing_by_default",
    "freezing_setting",
    "frozen_inputs",
    "install_pass",
    "installed_passes",
    "is_traced",
    "is_training_graph",
    "overridden",
    "real_tensors",
    "remove_pass",
    "statically_known_true",
    "trace_json",
    "why_not_frozen",
    "with_fresh_code",
]

inductor_config: Any = _inductor_config  # typed as a plain module, which has no `_config`
_PASS_SLOT = "joint_custom_post_pass"


def installed_passes() -> tuple[Any, ...]:
    """Return the passes that Inductor would run on the joint graph in this thread."""
    return get_custom_graph_passes(getattr(inductor_config, _PASS_SLOT))


def install_pass(graph_pass: CustomGraphPass) -> None:
    """Append `graph_pass` to Inductor's joint-graph passes, for all threads, keeping what is there.

    Inductor's configuration is per thread: a value that a user sets lives in a `ContextVar`, and a compile in another
    thread sees the default. So the pass goes into the default, and also into this thread's value where there is one.
    A tuple, because reading a default of any mutable type would deep-copy it.
    """
    entry = inductor_config._config[_PASS_SLOT]
    default = get_custom_graph_passes(entry.default)
    if graph_pass not in default:
        entry.default = (*default, graph_pass)
    current = installed_passes()
    if graph_pass not in current:
        setattr(inductor_config, _PASS_SLOT, (*current, graph_pass))


def remove_pass(graph_pass: CustomGraphPass) -> None:
    """Take back what `install_pass` did, keeping every other pass."""
    entry = inductor_config._config[_PASS_SLOT]
    entry.default = _without(entry.default, graph_pass)
    current = getattr(inductor_config, _PASS_SLOT)
    if graph_pass in get_custom_graph_passes(current):
        setattr(inductor_config, _PASS_SLOT, _without(current, graph_pass))


def _without(slot: Any, graph_pass: CustomGraphPass) -> Any:
    return tuple(p for p in get_custom_graph_passes(slot) if p is not graph_pass) or None


def freezing_by_default(on: bool) -> None:
    """Make freezing Inductor's default in all threads; what the user has set himself still wins.

    `TORCHINDUCTOR_FREEZING` in the environment is read by Inductor into the very default, so it is respected here.
    """
    if "TORCHINDUCTOR_FREEZING" in os.environ:
        return
    inductor_config._config["freezing"].default = on
    _forget_cached_options(["freezing"])


def freezing_setting() -> tuple[bool, str]:
    """Return whether freezing is on in this thread, and who has decided it."""
    if inductor_config._config["freezing"].user_override.get() is not _UNSET_SENTINEL:
        by = "set in torch._inductor.config.freezing"
    elif "TORCHINDUCTOR_FREEZING" in os.environ:
        by = "set by TORCHINDUCTOR_FREEZING"
    else:
        by = "the default with qfuse" if inductor_config.freezing else "the default"
    return bool(inductor_config.freezing), by


def compiler() -> str | None:
    """Return the C++ compiler that Inductor would call, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return None


def emits_python() -> bool:
    """Tell whether the graph being compiled will be called from Python (not from C++: `cpp_wrapper`, AOTInductor)."""
    from torch._inductor.virtualized import V

    return not (inductor_config.cpp_wrapper or V.aot_compilation)


def is_training_graph(graph: Graph) -> bool:
    """Tell whether `graph` is a joint forward and backward graph, which has gradients among its inputs."""
    return any(str(node.target).startswith("tangents_") for node in graph.find_nodes(op="placeholder"))


def frozen_inputs(graph: Graph) -> dict[Node, torch.Tensor]:
    """Return the inputs of `graph` that freezing will turn into constants, with their values.

    Empty where Inductor does not freeze: freezing off, gradients enabled, no model around the graph, or the graph of a
    branch inside another (`torch.cond`), whose inputs are not the model's and have no descriptor. The rule is
    that of `torch._inductor.freezing.replace_params_with_constants`: parameters and buffers that the graph neither
    mutates nor returns as an alias.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or not freezes():
        return {}
    metadata, values = context.fw_metadata, context.params_flat_unwrap_subclasses
    if metadata is None or values is None:
        return {}
    kept = {out.base_idx for out in metadata.output_info}
    kept |= {i for i, info in enumerate(metadata.input_info) if info.mutation_type.name != "NOT_MUTATED"}
    inputs = graph.find_nodes(op="placeholder")
    if any(node.meta.get("desc") is None for node in inputs):
        return {}
    return {node: value for i, (node, value) in enumerate(zip(inputs, values, strict=False)) if i not in kept}


def freezes() -> bool:
    """Tell whether Inductor turns the parameters of the graph that is being compiled into constants."""
    return bool(inductor_config.freezing) and not torch.is_grad_enabled()


def why_not_frozen() -> str:
    """Say what a user can do to make a weight a constant of the graph that is being compiled."""
    if torch.is_grad_enabled():
        return "compile and run the model under torch.no_grad(): Inductor freezes weights only without gradients"
    if not inductor_config.freezing:
        return "leave freezing on (torch._inductor.config.freezing, TORCHINDUCTOR_FREEZING)"
    return "make the weight a parameter or a buffer of the model, and do not change it in forward"


@contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors inside a compile, where fake-tensor modes are active."""
    with _disable_current_modes(), torch.no_grad():
        yield


def is_traced() -> bool:
    """Tell whether a structured trace is being written; torch takes its handler away where none is wanted."""
    return bool(trace_log.handlers)


def trace_json(name: str, payload: Callable[[], str]) -> None:
    """Add a JSON artifact to the structured trace (`TORCH_TRACE`, read by tlparse)."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


def compile_like_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    graph_pass: CustomGraphPass | None,
    mode: str | None,
    options: dict[str, Any] | None,
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Do what `torch.compile(backend="inductor", mode=..., options=...)` does, with `graph_pass` and freezing on.

    `inner_compile` takes the place of Inductor's code generation, which then does not run.
    """
    # The wrapper checks names and types of `options`, and knows the modes.
    chosen = torch._TorchCompileInductorWrapper(mode, options, None).config
    ours = {name: chosen.pop(name) for name in (_PASS_SLOT, "freezing") if name in chosen}
    if graph_pass is not None:
        before = get_custom_graph_passes(ours.get(_PASS_SLOT, installed_passes()))
        ours[_PASS_SLOT] = before if graph_pass in before else (*before, graph_pass)
        ours = _freezing_unless_decided() | ours
    kwargs: dict[str, Any] = {} if inner_compile is None else {"inner_compile": inner_compile}
    from torch._inductor.compile_fx import compile_fx  # heavy: only when something is compiled

    with overridden(ours):
        return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=chosen, **kwargs))


@contextmanager
def overridden(values: dict[str, Any]) -> Iterator[None]:
    """Set options in this thread for a while; those that were unset are unset afterwards.

    `config.patch` leaves the previous value behind as if the user had set it, and would hide later changes of defaults.
    """
    variables = {name: inductor_config._config[name].user_override for name in values}
    tokens = {name: variables[name].set(value) for name, value in values.items()}
    try:
        _forget_cached_options(values)
        yield
    finally:
        for name, token in tokens.items():
            variables[name].reset(token)
        _forget_cached_options(values)


def _forget_cached_options(names: Iterable[str]) -> None:
    """Tell Inductor's config, which caches the dictionary of its options, that these changed behind its back."""
    for name in names:
        inductor_config._mark_get_dict_dirty(name)
    inductor_config._hash_dirty_var.set(True)


def freezing() -> AbstractContextManager[None]:
    """Freeze in this thread for a while, unless the user has decided about freezing himself."""
    return overridden(_freezing_unless_decided())


def _freezing_unless_decided() -> dict[str, Any]:
    override = inductor_config._config["freezing"].user_override.get()
    decided = "TORCHINDUCTOR_FREEZING" in os.environ or override is not _UNSET_SENTINEL
    return {} if decided else {"freezing": True}


def concrete(value: Any) -> Any:
    """Return an example for a symbolic number: the one that the graph was traced with."""
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def compile_frozen_graph(
    gm: GraphModule, inputs: Sequence[torch.Tensor]
) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]:
    """Compile a graph whose attributes are constants, inside another compile, for tensors like `inputs`."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    fake_mode = FakeTensorMode()
    fakes = [fake_mode.from_tensor(tensor) for tensor in inputs]
    context = torch._guards.TracingContext(fake_mode)
    options = {_PASS_SLOT: None, "fx_graph_cache": False, "cpp_wrapper": False, "triton.cudagraphs": False}
    with (
        V.set_fake_mode(fake_mode),
        V.set_aot_compilation(False),
        torch._guards.tracing(context),
        overridden(options),
    ):
        with fake_mode, mock.patch.object(fake_mode, "allow_non_fake_inputs", True):
            FakeTensorProp(gm, fake_mode).propagate_dont_convert_inputs(*fakes)
        with mock.patch.object(fake_mode, "allow_non_fake_inputs", True):
            compiled = compile_fx_inner(gm, fakes, is_inference=True)
    assert callable(compiled)
    return compiled


def with_fresh_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a code object of its own: dynamo caches, and limits recompiles, by code object."""
    assert isinstance(function, FunctionType)
    function.__code__ = function.__code__.replace()
    return function


def are_equal_now(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Tell whether two shapes are equal, and have the graph compiled anew when they are no longer.

    Keys and values that grow have two symbols for one length, which ATen's attention neither compares nor guards.
    """
    return len(shape) == len(other) and all(guard_or_false(a == b) for a, b in zip(shape, other, strict=True))


def arguments_of(node: Node) -> dict[str, Any]:
    """Return all arguments of an operator by name, defaults included."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([p.name for p in parameters], node.args, strict=False)) | node.kwargs
    return {p.name: given.get(p.name, p.default_value) for p in parameters}


def fake_value(node: Node) -> Any:
    """Return the fake tensor (shape, dtype, strides) that `node` computes."""
    return node.meta["val"]


def copy_origin(source: Node, targets: Sequence[Node]) -> None:
    """Give `targets` the source location and module of `source`, so that profiles and logs name the user's code."""
    for target in targets:
        for key in ("stack_trace", "nn_module_stack", "original_aten", "source_fn_stack", "seq_nr"):
            if key in source.meta:
                target.meta[key] = source.meta[key]
