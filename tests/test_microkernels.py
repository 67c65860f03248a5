"""The C++ microkernels by themselves: each instruction set that this machine has, against exact integers."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from producers import quantized
from support import at_end_of_page
from torch import Tensor

from qfuse.inductor import compiler
from qfuse.isa import Isa
from qfuse.lowerings.cpp.microkernels import MICROKERNELS

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

#: Calls a microkernel on each panel, as the kernel that is rendered for Inductor does.
DRIVER = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
{includes}
{text}
extern "C" void run(const uint8_t* x, int64_t stride, int64_t rows, const int8_t* weight, const int32_t* sums,
                    int32_t zero_point, int64_t k, int64_t n, int32_t* out) {{
    qfuse::{class_name} microkernel(k, rows % 2);
    qfuse::Panel panel;
    alignas(64) int32_t start[64];
    constexpr int64_t most = qfuse::{class_name}::max_rows;
    alignas(64) int32_t block[most * 64];
    qfuse::Part part;
    const auto store = [&](int64_t first, int64_t last, int64_t column) {{
        for (int64_t i = first; i < last; ++i)
            for (int64_t j = column; j < std::min(column + 32, part.columns); ++j)
                out[(part.row + i) * n + part.column + j] += block[i * 64 + j];
    }};
    for (panel.first = 0; panel.first < n; panel.first += 64) {{
        panel.data = weight + panel.first * ((k + 63) / 64 * 64);
        panel.columns = std::min<int64_t>(64, n - panel.first);
        panel.rows = rows;
        panel.tiles = 0;
        panel.start = zero_point ? start : nullptr;
        for (int64_t j = 0; j < 64; ++j) {{
            panel.column_sums[j] = sums[std::min(panel.first + j, n - 1)];
            start[j] = -zero_point * panel.column_sums[j];
        }}
        for (int64_t i = 0; i < rows; i += most)
            microkernel({{x + i * stride, stride, i, std::min(most, rows - i)}}, panel, block, part, store);
    }}
    qfuse::store_all(part, store);
}}
"""


@dataclass(frozen=True)
class Case:
    """A microkernel, for unsigned rows or for signed ones."""

    isa: Isa
    rows: torch.dtype

    def __str__(self) -> str:
        return self.isa.name if self.rows is torch.uint8 else f"{self.isa.name}-signed"

    @property
    def source(self) -> str:
        """The driver and the microkernel."""
        kernel = MICROKERNELS[self.isa]
        includes = "\n".join(f"#include <{name}>" for name in kernel.includes)
        return DRIVER.format(includes=includes, text=kernel.text, class_name=kernel.class_names[self.rows])

    @property
    def runs(self) -> bool:
        """Whether this machine has the instructions."""
        return _runs(self.isa)


def _runs(isa: Isa) -> bool:
    return isa is Isa.NONE or bool(torch.cpu.get_capabilities().get(isa.value))


CASES = [Case(isa, rows) for isa in Isa for rows in MICROKERNELS[isa].class_names]


def _compile(case: Case, folder: Path, *options: str) -> Path:
    return _compile_text(case.source, folder / str(case), *options)


def _compile_text(text: str, path: Path, *options: str) -> Path:
    source, output = path.with_suffix(".cpp"), path.with_suffix(".out")
    source.write_text(text)
    # the options of Inductor's that matter here
    command = [str(compiler()), "-std=c++20", "-O3", "-fno-tree-loop-vectorize", "-ffp-contract=off", "-w"]
    subprocess.run([*command, "-fPIC", *options, str(source), "-o", str(output)], check=True)
    return output


@pytest.fixture(scope="module", params=[case for case in CASES if case.runs], ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The driver of one microkernel."""
    library = ctypes.CDLL(str(_compile(request.param, tmp_path_factory.mktemp("microkernel"), "-shared")))
    return Run(request.param.rows, library.run)


@dataclass(frozen=True)
class Run:
    """A microkernel that is compiled. rows: the dtype of the activation."""

    rows: torch.dtype
    function: Callable[..., Any]

    def __call__(self, x: Tensor, w: Tensor, zero_point: int) -> Tensor:
        """Multiply x, [M, K], by the transpose of w, [N, K]."""
        (m, k), sums = x.shape, w.sum(1, dtype=torch.int32)
        packed = torch.ops.qfuse.pack_int8_weight(w)
        out = torch.zeros((m, len(w)), dtype=torch.int32)  # where nothing is stored, or twice, is seen
        self.function(
            *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)), ctypes.c_int64(m)),
            *(ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(sums.data_ptr()), ctypes.c_int32(zero_point)),
            *(ctypes.c_int64(k), ctypes.c_int64(len(w)), ctypes.c_void_p(out.data_ptr())),
        )
        return out


def _expected(x: Tensor, w: Tensor, zero_point: int) -> Tensor:
    """The exact integers."""
    return ((x.double() - zero_point) @ w.double().t()).to(torch.int32)


def test_bits(run: Run) -> None:
    """200 shapes and more, bit for bit: every number of rows up to two blocks of any kernel, odd and even K."""
    choose = random.Random(0)
    shapes = [(m, choose.choice([1, 3, 4, 63, 64, 65, 128, 130, 257, 384, 511])) for m in range(1, 100)]
    shapes += list(itertools.product([1, 2, 3, 4, 5, 6, 16, 17, 32, 33], [1, 2, 5, 8, 60, 62, 64, 127, 192, 255, 320]))
    shapes += list(itertools.product([8, 9, 18, 19, 49, 50], [1024, 1028, 1103]))  # where AVX-512 changes its tiles
    shapes += [(1, k) for k in (24575, 24577, 50000)]  # where AVX2 cuts a row
    assert len(shapes) > 200
    for m, k in shapes:
        x = quantized(m, k + 5, run.rows)[:, :k]  # rows that are not next to each other
        operands = x, quantized(64, k), choose.choice([0, 128, 3])
        assert torch.equal(run(*operands), _expected(*operands)), (m, k)


def test_panels(run: Run) -> None:
    """Each part is stored once, whatever part comes next, and none beyond the last column."""
    for m, n, k in itertools.product(
        [1, 2, 3, 16, 17, 33, 34, 35, 49, 64, 98], [1, 31, 33, 64, 96, 97, 161], [64, 200]
    ):
        operands = quantized(m, k, run.rows), quantized(n, k), 3
        assert torch.equal(run(*operands), _expected(*operands)), (m, n, k)


def test_extremes(run: Run) -> None:
    """The largest products there are do not saturate, and the largest sums do not wrap."""
    limits = torch.iinfo(run.rows)
    for x_value, w_value, k in itertools.product([limits.min, limits.max], [-128, 127], [64, 1027, 65793]):
        x, w = torch.full((7, k), x_value, dtype=run.rows), torch.full((64, k), w_value, dtype=torch.int8)
        operands = x, w, 0
        assert torch.equal(run(*operands), _expected(*operands)), (x_value, w_value, k)


def test_nothing_is_read_beyond_the_rows(run: Run) -> None:
    """The activation may end where a page does."""
    for m, k in [(1, 3), (7, 61), (17, 66), (33, 100), (40, 64)]:
        x = at_end_of_page(quantized(m, k, run.rows))
        operands = x, quantized(64, k), 128
        assert torch.equal(run(*operands), _expected(*operands)), (m, k)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_any_cpu(case: Case, tmp_path: Path) -> None:
    """On a machine without the instructions as well: each function names its own."""
    _compile(case, tmp_path, "-c", "-march=x86-64")


SHARE = """
#include <thread>
extern "C" int64_t taken_once(int64_t threads, int64_t count) {
    std::vector<std::atomic<int64_t>> times(count);
    qfuse::Share share;
    std::vector<std::thread> running;
    for (int64_t i = 0; i < threads; ++i)
        running.emplace_back([&] {
            for (int64_t piece; (piece = share.take(count)) >= 0;)
                ++times[piece];
        });
    for (auto& thread : running)
        thread.join();
    return std::count(times.begin(), times.end(), 1);
}
"""


def test_each_piece_of_a_share_is_taken_once(tmp_path: Path) -> None:
    text = Case(Isa.AMX, torch.uint8).source + SHARE
    library = ctypes.CDLL(str(_compile_text(text, tmp_path / "share", "-shared", "-pthread")))
    library.taken_once.restype = ctypes.c_int64
    for threads, count in ((1, 7), (2, 1), (8, 100_000)):
        assert library.taken_once(ctypes.c_int64(threads), ctypes.c_int64(count)) == count


@pytest.mark.parametrize("case", [c for c in CASES if c.isa in (Isa.AMX, Isa.AVX_VNNI)], ids=str)
def test_old_compilers_get_another_kernel(case: Case, tmp_path: Path) -> None:
    """GCC 10 knows neither; what it compiles instead gives the same bits."""
    if not case.runs:
        pytest.skip("the CPU has not even the other kernel's instructions")
    assembly = _compile(case, tmp_path, "-S", "-DQFUSE_COMPILER_IS_OLD=1").read_text()
    assert "tdpb" not in assembly
    assert "{vex} vpdpbusd" not in assembly
    # Nothing may be written to the file of a library that is loaded: the process would crash when it ends.
    library = ctypes.CDLL(str(_compile(case, tmp_path, "-shared", "-DQFUSE_COMPILER_IS_OLD=1")))
    operands = quantized(77, 67, case.rows), quantized(64, 67), 128
    assert torch.equal(Run(case.rows, library.run)(*operands), _expected(*operands))


@pytest.mark.skipif(not _runs(Isa.AVX512_VNNI), reason="the CPU has not what runs instead")
@pytest.mark.parametrize("case", [case for case in CASES if case.isa is Isa.AMX], ids=str)
def test_amx_that_linux_refuses(case: Case, tmp_path: Path) -> None:
    """Tiles have to be asked for; where Linux refuses, the kernel does without, and gives the same bits."""
    text = case.source.replace("granted_(may_use_amx())", "granted_(false)")
    assert text != case.source
    library = ctypes.CDLL(str(_compile_text(text, tmp_path / "refused", "-shared")))
    for m in (1, 3, 50):
        operands = quantized(m, 67, case.rows), quantized(64, 67), 3
        assert torch.equal(Run(case.rows, library.run)(*operands), _expected(*operands))


@pytest.mark.skipif(not _runs(Isa.AVX512_VNNI), reason="the CPU has not the instructions")
def test_one_or_two_rows_on_cpus_with_amx(tmp_path: Path) -> None:
    """They read the weight in more places at once (`weight_streams`); other tests compile for CPUs without AMX."""
    case = Case(Isa.AVX512_VNNI, torch.uint8)
    assert "prefetcht0" not in _compile(case, tmp_path, "-S").read_text()
    assert "prefetcht0" in _compile(case, tmp_path, "-S", "-D__AMX_TILE__=1").read_text()
    library = ctypes.CDLL(str(_compile(case, tmp_path, "-shared", "-D__AMX_TILE__=1")))
    for m, k in itertools.product((1, 2, 3, 7), (1, 4, 15, 16, 63, 64, 66, 128, 257, 1024)):
        operands = quantized(m, k, case.rows), quantized(64, k), 128
        assert torch.equal(Run(case.rows, library.run)(*operands), _expected(*operands)), (m, k)


CLOBBER = """
__attribute__((noinline)) static void clobber() {
    __asm__ volatile("" ::: {});
    __asm__ volatile("vpternlogd $255, %%zmm20, %%zmm20, %%zmm20\\n vmovdqa64 %%zmm20, %%zmm31" ::: "zmm20", "zmm31");
}
""".replace("{}", ", ".join(f'"zmm{i}"' for i in range(32)))


@pytest.mark.skipif(not _runs(Isa.AVX512_VNNI), reason="the CPU has not the instructions")
@pytest.mark.parametrize("optimization", ["-O1", "-O3"])
def test_what_stores_may_use_any_register(optimization: str, tmp_path: Path) -> None:
    """It is called between the steps of the next tile, whose sums name their registers."""
    case = Case(Isa.AVX512_VNNI, torch.uint8)
    text = case.source.replace('extern "C"', CLOBBER + 'extern "C"')
    text = text.replace("for (int64_t i = first", "clobber(); for (int64_t i = first")
    assert text.count("clobber()") == 2
    path = _compile_text(text, tmp_path / "clobber", "-shared", optimization, "-mavx512f")
    run = Run(case.rows, ctypes.CDLL(str(path)).run)
    for m, k in itertools.product((9, 17, 50), (12, 67, 384, 1100)):
        operands = quantized(m, k, case.rows), quantized(96, k), 3
        assert torch.equal(run(*operands), _expected(*operands)), (m, k)


def test_fetches_are_not_left_out(tmp_path: Path) -> None:
    """GCC 12 removes a function that does nothing but fetch."""
    assembly = _compile(Case(Isa.AMX, torch.uint8), tmp_path, "-S").read_text()
    (kernel,) = re.findall(r"\n_ZNK\S*one_by_four\S*:\n(.*?)\n\t\.cfi_endproc", assembly, re.DOTALL)
    assert kernel.count("prefetcht0") == 128  # the lines of two steps


@pytest.mark.parametrize(
    ("isa", "instruction", "register"),
    [(Isa.AVX512_VNNI, "vpdpbusd", "zmm"), (Isa.AVX_VNNI, "vpdpbusd", "ymm"), (Isa.AVX2, "vpmaddwd", "ymm")],
    ids=str,
)
def test_accumulators_stay_in_registers(isa: Isa, instruction: str, register: str, tmp_path: Path) -> None:
    """No loop that multiplies stores a vector on the stack, as GCC likes to do, at a third of the speed."""
    assembly = _compile(Case(isa, torch.uint8), tmp_path, "-S", "-march=x86-64-v3").read_text()
    loops = re.findall(r"\n(\.L\d+:\n(?:(?!\.L\d+:).*\n)*?\tj\w+\t\.L\d+)", assembly)
    loops = [loop for loop in loops if instruction in loop]
    assert len(loops) >= 6  # a tile of each number of rows has one
    for loop in loops:
        assert not re.search(rf"vmov\w+\t%{register}\d+, -?\d*\(%[er][sb]p\)", loop), loop
