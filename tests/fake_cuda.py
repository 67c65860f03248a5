"""A CUDA device that is not there: FakeTensors go in, generated source and compiled binaries come out.

Nothing is launched. Inductor believes in a GPU of the compute capability that is asked for; Triton compiles for it with
the ptxas that it brings.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import operator
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_binary
import torch
import torch._dynamo.device_interface as device_interface
import torch.utils._triton as torch_triton
from torch import Tensor, nn
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._inductor import config as inductor_config
from torch._inductor import graph as inductor_graph
from torch._inductor import utils as inductor_utils
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph, misc_patterns
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._inductor.template_heuristics import triton as template_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import qfuse
import qfuse.constants
from qfuse.constants import Constants
from qfuse.inductor import frozen_inputs

_C10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))


@dataclass(frozen=True)
class Gpu:
    """What Inductor asks of a device. shared: bytes of a block at most, and of a multiprocessor."""

    name: str
    multiprocessors: int
    shared: tuple[int, int]
    threads: int  # of a multiprocessor
    l2_bytes: int


#: By compute capability; figures of NVIDIA's.
GPUS = {
    80: Gpu("NVIDIA A100-SXM4-80GB", 108, (166912, 167936), 2048, 40 << 20),
    86: Gpu("NVIDIA A10", 72, (101376, 102400), 1536, 6 << 20),
    89: Gpu("NVIDIA L40S", 142, (101376, 102400), 1536, 96 << 20),
    90: Gpu("NVIDIA H100 80GB HBM3", 132, (232448, 233472), 2048, 50 << 20),
    100: Gpu("NVIDIA B200", 148, (232448, 233472), 2048, 126 << 20),
    120: Gpu("NVIDIA GeForce RTX 5090", 170, (101376, 102400), 1536, 96 << 20),
}


@dataclass
class Generated:
    """What Inductor made of a model. sources: of the wrappers. kernels: by name. tuned: choices, as described."""

    sources: list[str] = field(default_factory=list)
    kernels: dict[str, CachingAutotuner] = field(default_factory=dict)
    tuned: list[list[str]] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Return the only wrapper's source."""
        (source,) = self.sources
        return source

    @property
    def calls(self) -> str:
        """Return the part of the wrapper that allocates and launches, without its comments."""
        return re.sub(r"#.*", "", self.source.split("def call(")[1].split("\nrunner = ")[0])

    @property
    def launches(self) -> list[str]:
        """Return the names of the kernels that a call launches, one after the other."""
        return re.findall(r"(\w+)\.run\(", self.calls)

    def outputs(self, name: str) -> list[str]:
        """Return the types of the tensors that a kernel writes, as Triton calls them."""
        signature = self.kernels[name].triton_meta["signature"]
        return [kind for argument, kind in signature.items() if re.match(r"(in_)?out_ptr", argument)]

    def binaries(self) -> list[gpu_binary.Binary]:
        """Return the compiled kernels."""
        return [
            gpu_binary.read(result.kernel, result.config.num_warps)
            for kernel in self.kernels.values()
            for result in kernel.compile_results
        ]


def generate(
    model: Callable[..., Any],
    *inputs: Any,
    capability: int = 90,
    dynamic: bool = False,
    freezing: bool = True,
    binaries: bool = True,
    favourite: str = "",
) -> Generated:
    """Compile `model` for a device that is not there. Parameters, buffers and inputs are CPU tensors.

    binaries: let Triton compile the kernels, which takes as long as all the rest.
    favourite: what the name of a choice contains that is taken for the fastest; else the first is.
    """
    generated = Generated()
    compile_to_module = GraphLowering._compile_to_module

    def compiled(self: Any) -> Any:
        module = compile_to_module(self)
        generated.kernels |= {n: v for n, v in vars(module).items() if isinstance(v, CachingAutotuner)}
        return module

    def benchmark(self: Any, choices: Sequence[Any], *args: Any, **kwargs: Any) -> dict[Any, float]:
        generated.tuned.append([f"{choice.name}: {choice.description}" for choice in choices])
        return {choice: i + 1.0 + 1e6 * (favourite not in choice.name) for i, choice in enumerate(choices)}

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (AlgorithmSelectorCache, "benchmark", benchmark),
            (GraphLowering, "_compile_to_module", compiled),
            (GraphLowering, "save_output_code", generated.sources.append),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        if not binaries:
            stack.enter_context(mock.patch.object(CachingAutotuner, "precompile"))
        _compile(model, inputs, compile_fx, capability=capability, dynamic=dynamic, freezing=freezing)
    return generated


def trace(model: Callable[..., Any], *inputs: Any, capability: int = 90, dynamic: bool = False) -> list[str]:
    """Run the passes on a model's graphs, without code generation; return the operators that are left."""
    operators: list[str] = []

    def note(gm: GraphModule, example_inputs: Any, **unused: Any) -> Any:
        operators.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    _compile(model, inputs, functools.partial(compile_fx, inner_compile=note), capability=capability, dynamic=dynamic)
    return operators


def _compile(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    compile_graph: Callable[..., Any],
    *,
    capability: int,
    dynamic: bool,
    freezing: bool = True,
) -> None:
    """Hand a model's graphs to `compile_graph`, as dynamo makes them of tensors on the device."""

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        compile_graph(gm, example_inputs)
        return gm.forward  # on fake tensors: shapes only

    with (
        _device(capability),
        inductor_config.patch(freezing=freezing),
        qfuse.config.patch(verify=False),  # nothing can be run to compare it
        torch.no_grad(),
    ):
        torch._dynamo.reset()
        if isinstance(model, nn.Module):
            model = copy.deepcopy(model).eval()
        with FakeTensorMode():
            if isinstance(model, nn.Module):
                _move(model)
            fakes = [_moved(i) if isinstance(i, Tensor) else i for i in inputs]
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*fakes)


def compile_for_amd(kernel: CachingAutotuner, architecture: str = "gfx942") -> Any:
    """Compile a kernel that was generated for CUDA for a GPU of AMD's; return what Triton's compiler returns."""
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_triton

    (result,) = kernel.compile_results
    config, meta = result.config, kernel.triton_meta
    source = ASTSource(
        fn=kernel.fn, signature=meta["signature"], constexprs=meta.get("constants", {}), attrs=meta["configs"][0]
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_triton(source, target=GPUTarget("hip", architecture, 64), options=options)


def _move(module: nn.Module) -> None:
    done: dict[Tensor, Tensor] = {}  # tied weights stay one
    for one in module.modules():
        for tensors in (one._parameters, one._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = done[tensor] if tensor in done else done.setdefault(tensor, _moved(tensor))


def _moved(tensor: Tensor) -> Tensor:
    """Return a fake tensor on CUDA, which remembers the one on the CPU."""
    moved: Any
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight of torchao's, made of several tensors
        names, context = tensor.__tensor_flatten__()
        inner = {name: _moved(getattr(tensor, name)) for name in names}
        moved = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    else:
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0")
        moved.on_cpu = tensor
    moved._is_param = isinstance(tensor, nn.Parameter)  # `nn.Parameter` would make another tensor
    return moved


def _properties(capability: int) -> Any:
    gpu = GPUS[capability]
    return types.SimpleNamespace(
        name=gpu.name,
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared[0],
        shared_memory_per_multiprocessor=gpu.shared[1],
        L2_cache_size=gpu.l2_bytes,
        uuid="fake",
        gcnArchName="",
    )


class _Driver:
    """Stands for `triton.backends.nvidia.driver.CudaDriver`."""

    def __init__(self, capability: int) -> None:
        gpu = GPUS[capability]
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = types.SimpleNamespace(
            load_binary=self._load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "max_shared_mem": gpu.shared[0],
                "max_num_regs": 65536,
                "multiprocessor_count": gpu.multiprocessors,
                "warpSize": 32,
                "sm_clock_rate": 0,
                "mem_clock_rate": 0,
                "mem_bus_width": 0,
            },
        )

    @staticmethod
    def _load_binary(name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        registers, stack = gpu_binary.resources(cubin)
        return 1, 1, registers, stack // 4, 1024

    class launcher_cls:  # noqa: N801  (Triton's name)
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("there is no device to launch anything on")

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @classmethod
    def is_active(cls) -> bool:
        return True


@contextlib.contextmanager
def _device(capability: int) -> Iterator[None]:
    _trace_patterns()
    TorchInGraphFunctionVariable._get_handlers()  # remembered: by their real functions, not by those below
    properties = _properties(capability)

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value  # another function each time: dynamo tells handlers apart by them

    of_torch = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": divmod(capability, 10),
        "get_device_name": properties.name,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "current_stream": None,
        "memory_allocated": 0,
        "is_current_stream_capturing": False,
    }
    of_interface = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": properties,
        "get_compute_capability": capability,
        "get_raw_stream": 0,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "memory_allocated": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device_guard())

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for name, value in of_torch.items():
            patch(torch.cuda, name, always(value))
        for name, value in of_interface.items():
            patch(device_interface.CudaInterface, name, staticmethod(always(value)))
        if torch.version.cuda is None:
            patch(torch.version, "cuda", "13.0")
        patch(torch._C, "_cuda_getCurrentRawStream", always(0))
        # What Inductor and qfuse read of constants they read of CPU tensors.
        for owner, name in ((joint_graph.UniformValueConstantFolder, "_deduce_value"), (Constants, "_evaluate")):
            patch(owner, name, _on_cpu(getattr(owner, name)))
        patch(inductor_graph, "is_same_tensor", operator.is_)  # fake tensors have one address, which is 0
        patch(qfuse.constants, "frozen_inputs", lambda g: {n: v.on_cpu for n, v in frozen_inputs(g).items()})
        patch(FakeTensorMode, "avoid_device_init", property(always(True)))
        patch(triton_helpers, "set_driver_to_gpu", always(None))
        stack.enter_context(
            inductor_config.patch(
                always_keep_tensor_constants=True,  # small ones would become numbers in the code
                compile_threads=1,
                fx_graph_cache=False,
                use_static_triton_launcher=False,
                benchmark_epilogue_fusion=False,
                shape_padding=False,  # measures whether padding pays
                autotune_local_cache=False,
                autotune_in_subproc=False,
            )
        )
        _forget()
        before = getattr(driver, "_active", None)
        driver.set_active(_Driver(capability))
        device_interface.caching_worker_device_properties["cuda"] = [properties]
        try:
            yield
        finally:
            driver._active = before
            _forget()


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Let C++ guard CUDA devices by what guards meta tensors: nothing.

    A build of torch without CUDA has no guard for it, and methods like `Tensor.contiguous` ask for one first.
    """
    cuda, meta = 1, 14  # of c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(_C10, "_ZN3c104impl26device_guard_impl_registryE")
    missing = guards[cuda] is None
    guards[cuda] = guards[meta] if missing else guards[cuda]
    try:
        yield
    finally:
        guards[cuda] = None if missing else guards[cuda]


class _OnCpu(TorchDispatchMode):
    """Makes new tensors on the CPU, wherever they are wanted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({**kwargs, "device": "cpu"} if kwargs and "device" in kwargs else kwargs or {}))


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that computes constants of a graph compute them on the CPU."""

    def computed(*args: Any) -> Any:
        with _OnCpu():
            return function(*args)

    return computed


@functools.cache
def _trace_patterns() -> None:
    """Let Inductor trace its own patterns; those with random numbers for the CPU, because no generator is there."""
    on_cpu = functools.partial(misc_patterns._misc_patterns_init, torch.device("cpu"))
    with mock.patch.object(misc_patterns, "_misc_patterns_init", side_effect=lambda device=None: on_cpu()):
        joint_graph.lazy_init(torch.device("cuda", 0))


def _forget() -> None:
    """Forget what torch remembers of a device."""
    device_interface.caching_worker_device_properties.pop("cuda", None)
    remembering = [DeviceProperties.create, inductor_utils.is_big_gpu, inductor_utils.get_max_num_sms]
    remembering += [*vars(torch_triton).values(), *vars(template_heuristics).values()]
    for function in remembering:
        function = getattr(function, "__func__", function)
        if hasattr(function, "cache_clear"):
            function.cache_clear()
