"""The C++ microkernels by themselves: each instruction set that this machine has, against exact integers."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from producers import quantized
from torch import Tensor

from qfuse.inductor import compiler
from qfuse.isa import Isa
from qfuse.lowerings.cpp.microkernels import MICROKERNELS

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

#: Calls a microkernel on one panel, as the kernel that is rendered for Inductor does.
DRIVER = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
{includes}
{text}
extern "C" void run(const uint8_t* x, int64_t stride, const float* x_scale, int64_t scale_stride, int64_t rows,
                    const int8_t* weight, const int32_t* compensation, const float* w_scale, int64_t k, float* out) {{
    qfuse::{class_name} microkernel(k);
    qfuse::Panel panel;
    panel.data = weight;
    panel.rows = rows;
    panel.tiles = 0;
    std::copy_n(compensation, 64, panel.compensation);
    std::copy_n(w_scale, 64, panel.scale);
    constexpr int64_t most = qfuse::{class_name}::max_rows;
    int64_t stored = 0;
    const auto store = [&](int64_t first, int64_t last) {{ stored = first == stored ? last : -1; }};
    for (int64_t i = 0; i < rows; i += most, stored = 0) {{
        microkernel({{x + i * stride, stride, x_scale + i * scale_stride, scale_stride, std::min(most, rows - i)}},
                    panel, out + 64 * i, store);
        if (stored < most) // each row of the block before, once
            out[64 * i] = NAN;
    }}
}}
"""


def _source(isa: Isa) -> str:
    kernel = MICROKERNELS[isa]
    includes = "\n".join(f"#include <{name}>" for name in kernel.includes)
    return DRIVER.format(includes=includes, text=kernel.text, class_name=kernel.class_name)


def _compile(isa: Isa, folder: Path, *options: str) -> Path:
    source, output = folder / f"{isa.name}.cpp", folder / f"{isa.name}.out"
    source.write_text(_source(isa))
    # the options of Inductor's that matter here
    command = [str(compiler()), "-std=c++20", "-O3", "-fno-tree-loop-vectorize", "-ffp-contract=off", "-w"]
    subprocess.run([*command, "-fPIC", *options, str(source), "-o", str(output)], check=True)
    return output


def _runs(isa: Isa) -> bool:
    has = torch.cpu.get_capabilities()
    return isa is Isa.NONE or bool(has.get(isa.value))


@pytest.fixture(scope="module", params=[isa for isa in Isa if _runs(isa)], ids=lambda isa: isa.name)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The driver of one instruction set, as a function of pointers and sizes."""
    library = ctypes.CDLL(str(_compile(request.param, tmp_path_factory.mktemp("microkernel"), "-shared")))
    return library.run  # type: ignore[no-any-return]


def _call(run: Callable[..., Any], x: Tensor, x_scale: Tensor, w: Tensor, zero_point: int, w_scale: Tensor) -> Tensor:
    (m, k), compensation = x.shape, zero_point * w.sum(1, dtype=torch.int32)
    packed = torch.ops.qfuse.pack_int8_weight(w)
    out = torch.full((m, 64), float("nan"))
    run(
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)), ctypes.c_void_p(x_scale.data_ptr())),
        *(ctypes.c_int64(int(len(x_scale) > 1)), ctypes.c_int64(m), ctypes.c_void_p(packed.data_ptr())),
        *(ctypes.c_void_p(t.data_ptr()) for t in (compensation, w_scale)),
        *(ctypes.c_int64(k), ctypes.c_void_p(out.data_ptr())),
    )
    return out


def _expected(x: Tensor, x_scale: Tensor, w: Tensor, zero_point: int, w_scale: Tensor) -> Tensor:
    """In the order of `block.h`: exact integers, then two products of float32."""
    sums = (x.double() - zero_point) @ w.double().t()
    return sums.float() * x_scale.reshape(-1, 1) * w_scale


def test_bits(run: Callable[..., Any]) -> None:
    """200 shapes and more, bit for bit: every number of rows up to two blocks of any kernel, odd and even K."""
    choose = random.Random(0)
    shapes = [(m, choose.choice([1, 3, 4, 63, 64, 65, 128, 130, 257, 384, 511])) for m in range(1, 100)]
    shapes += list(itertools.product([1, 2, 3, 4, 5, 6, 16, 17, 32, 33], [1, 2, 5, 8, 60, 62, 64, 127, 192, 255, 320]))
    assert len(shapes) > 200
    for m, k in shapes:
        x = quantized(m, k + 5, torch.uint8)[:, :k]  # rows that are not next to each other
        operands = x, torch.rand(choose.choice([1, m])), quantized(64, k), choose.choice([0, 128, 3]), torch.rand(64)
        assert torch.equal(_call(run, *operands), _expected(*operands)), (m, k)


def test_extremes(run: Callable[..., Any]) -> None:
    """The largest products there are do not saturate, and the largest sums do not wrap."""
    for x_value, w_value, k in itertools.product([0, 255], [-128, 127], [64, 1027, 65793]):
        x, w = torch.full((7, k), x_value, dtype=torch.uint8), torch.full((64, k), w_value, dtype=torch.int8)
        operands = x, torch.ones(1), w, 0, torch.ones(64)
        assert torch.equal(_call(run, *operands), _expected(*operands)), (x_value, w_value, k)


def test_nothing_is_read_beyond_the_rows(run: Callable[..., Any]) -> None:
    """The activation may end where a page does."""
    import mmap

    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
    memory = torch.frombuffer(area, dtype=torch.uint8, count=page)
    memory.copy_(quantized(1, page, torch.uint8)[0])
    for m, k in [(1, 3), (7, 61), (17, 66), (33, 100), (40, 64)]:
        x = memory[-m * k :].view(m, k)
        operands = x, torch.rand(m), quantized(64, k), 128, torch.rand(64)
        assert torch.equal(_call(run, *operands), _expected(*operands)), (m, k)


@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.name)
def test_compiles_for_any_cpu(isa: Isa, tmp_path: Path) -> None:
    """On a machine without the instructions as well: each function names its own."""
    _compile(isa, tmp_path, "-c", "-march=x86-64")


@pytest.mark.parametrize("isa", [Isa.AMX, Isa.AVX_VNNI], ids=lambda isa: isa.name)
def test_old_compilers_get_another_kernel(isa: Isa, tmp_path: Path) -> None:
    """GCC 10 knows neither; what it compiles instead gives the same bits."""
    if not _runs(isa):
        pytest.skip("the CPU has not even the other kernel's instructions")
    assembly = _compile(isa, tmp_path, "-S", "-DQFUSE_COMPILER_IS_OLD=1").read_text()
    assert "tdpbusd" not in assembly
    assert "{vex} vpdpbusd" not in assembly
    # Nothing may be written to the file of a library that is loaded: the process would crash when it ends.
    run = ctypes.CDLL(str(_compile(isa, tmp_path, "-shared", "-DQFUSE_COMPILER_IS_OLD=1"))).run
    operands = quantized(77, 67, torch.uint8), torch.rand(77), quantized(64, 67), 128, torch.rand(64)
    assert torch.equal(_call(run, *operands), _expected(*operands))


@pytest.mark.parametrize(("isa", "register"), [(Isa.AVX512_VNNI, "zmm"), (Isa.AVX_VNNI, "ymm")], ids=str)
def test_accumulators_stay_in_registers(isa: Isa, register: str, tmp_path: Path) -> None:
    """No loop that multiplies stores a vector on the stack, as GCC likes to do, at a third of the speed."""
    assembly = _compile(isa, tmp_path, "-S", "-march=x86-64-v3").read_text()
    loops = [
        loop for loop in re.findall(r"\n(\.L\d+:\n(?:(?!\.L\d+:).*\n)*?\tj\w+\t\.L\d+)", assembly) if "vpdpbusd" in loop
    ]
    assert len(loops) >= 6  # a tile of each number of rows has one
    for loop in loops:
        assert not re.search(rf"vmov\w+\t%{register}\d+, -?\d*\(%[er][sb]p\)", loop), loop
