"""Inductor's Triton kernels on CPU tensors, by Triton's interpreter: the very source that would be compiled for a GPU.

For processes of their own (see `support.run_python`): torch and triton are patched for good, and this has to be
imported before anything imports triton. The interpreter, as it is, rounds float32 to bfloat16 by truncation and
multiplies the bits of bfloat16 in `tl.dot`; both are mended. Every address that is not masked must lie in one of the
kernel's tensors.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import torch._inductor.runtime.triton_helpers as triton_helpers
import torch.utils._triton as torch_triton
import triton.backends
import triton.language as tl
from torch._inductor import config as inductor_config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import qfuse
from qfuse.lowerings import INT8_LINEAR, by_name


class OutOfBoundsError(Exception):
    """A kernel reads or writes memory that is not its own."""


_memory: list[tuple[int, int]] = []  # of the running kernel's tensors: first byte, and the one behind the last


def _to_torch(values: Any, dtype: tl.dtype) -> torch.Tensor:
    values = np.ascontiguousarray(values)
    if dtype == tl.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


_cast_impl = InterpreterBuilder.cast_impl


def _cast(self: Any, source: Any, target: Any) -> Any:
    """Convert from and to bfloat16 through torch, which rounds to the nearest even."""
    before, after = source.dtype.scalar, target.scalar
    if before == after or tl.bfloat16 not in (before, after):
        return _cast_impl(self, source, target)
    shape, values = np.shape(source.data), _to_torch(np.atleast_1d(source.data), before).float()
    if after == tl.bfloat16:
        result = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    else:
        result = values.numpy().astype(interpreter._get_np_dtype(after))
    return TensorHandle(result.reshape(shape), after)


_create_fp_to_fp = InterpreterBuilder.create_fp_to_fp


def _fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
    if target.scalar == tl.bfloat16 and mode != interpreter._ir.ROUNDING_MODE.RTZ:
        return _cast(self, source, target)
    return _create_fp_to_fp(self, source, target, mode)


_create_dot = InterpreterBuilder.create_dot


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_to_torch(handle.data, tl.bfloat16).float().numpy(), tl.float32)

    return _create_dot(self, widened(a), widened(b), *rest)


def _check(pointers: Any, mask: Any, what: str) -> None:
    addresses = np.atleast_1d(pointers.data)
    used = addresses[np.broadcast_to(np.atleast_1d(mask.data).astype(bool), addresses.shape)].astype(np.uint64)
    size = np.uint64(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)
    inside = np.zeros(used.shape, bool)
    for first, end in _memory:
        inside |= (used >= first) & (used + size <= end)
    if not inside.all():
        raise OutOfBoundsError(f"{what}: {int((~inside).sum())} of {used.size} addresses are out of bounds")


_masked_load, _masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def _load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    _check(pointers, mask, "load")
    return _masked_load(self, pointers, mask, *rest, **named)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check(pointers, mask, "store")
    return _masked_store(self, pointers, value, mask, *rest)


_run = CachingAutotuner.run
launched: list[str] = []  # the names of the kernels that have run


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    storages = [arg.untyped_storage() for arg in args if isinstance(arg, torch.Tensor)]
    _memory[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
    launched.append(self.fn.__name__)
    return _run(self, *args, **kwargs)


class _Interpreted:
    """Stands for a backend of Triton's in `triton.backends`."""

    compiler = None
    driver = None


def install() -> None:
    """Let Inductor generate Triton for CPU tensors, run it by the interpreter, and qfuse choose its Triton lowering."""
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_masked_load = _load
    InterpreterBuilder.create_masked_store = _store
    triton.backends.backends["cpu"] = _Interpreted
    torch_triton.has_triton.cache_clear()
    torch_triton.triton_hash_with_backend = lambda: "interpreter"
    triton_helpers.set_driver_to_cpu = lambda: None
    triton_helpers.set_driver_to_gpu = lambda: None
    CachingAutotuner.precompile = lambda self, *args, **kwargs: None
    CachingAutotuner.run = _launch
    AlgorithmSelectorCache.make_precompile_fn = lambda self, *args, **kwargs: dict
    inductor_config.cpu_backend = "triton"
    inductor_config.compile_threads = 1
    inductor_config.fx_graph_cache = False
    inductor_config.benchmark_epilogue_fusion = False
    inductor_config.emulate_precision_casts = True  # what eager rounds is rounded
    qfuse.config.fuse_quantization = False  # that kernel is C++
    INT8_LINEAR["cpu"] = INT8_LINEAR["cpu without AVX2"] = (by_name("triton"),)
