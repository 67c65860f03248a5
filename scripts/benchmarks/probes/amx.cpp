// How many int8 operations the tiles of AMX do, from tile registers only: the peak of an s8×s8 matmul on such a CPU.
// A multiplication and an addition count as two operations.
#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kTiles = 4; // accumulators: two tiles of A by two of B, as in a matmul

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_a_row[16];
    uint8_t rows[16];
};

bool cpu_has_amx_int8() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1); // tiles, and int8 in them
}

// Linux hands out the tiles' state on request only, once a process.
bool kernel_allows_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

__attribute__((target("amx-tile,amx-int8"))) void chain(int64_t steps) {
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes_of_a_row[i] = 64, config.rows[i] = 16;
    // GCC 12's intrinsic names eight of the 64 bytes that are read, and the stores to the others would be dropped.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    alignas(64) static const int8_t data[16 * 64] = {1, 2, 3};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, data, 64);
    _tile_loadd(5, data, 64);
    _tile_loadd(6, data, 64);
    _tile_loadd(7, data, 64);
    for (int64_t i = 0; i < steps; i++) { // the intrinsics are volatile asm: nothing is dropped
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
}

} // namespace

extern "C" {

// The operations of one step of one thread, or 0 where the CPU has no AMX, or the kernel does not allow it.
int64_t qfuse_probe_operations() {
    static const bool usable = cpu_has_amx_int8() && kernel_allows_tiles();
    return usable ? kTiles * 16 * 16 * 64 * 2 : 0;
}

// Do `steps` steps on each of `threads` threads, and return the seconds that took.
double qfuse_probe_run(int threads, int64_t steps) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    chain(steps);
    return omp_get_wtime() - start;
}

}
