// How fast memory is read: 512-bit loads where there are any, and else 256-bit ones or whatever the compiler makes.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace {

volatile uint64_t sink; // what is stored here cannot be optimized away

constexpr int64_t kAhead = 4096; // bytes; the hardware's own prefetcher stops at each page

// Each reads `n` bytes from `p` on, as `streams` consecutive parts in turn, 256 bytes of each. hint: the cache that it fetches
// into: there are CPUs that the first level slows down.
template <int streams, _mm_hint hint>
__attribute__((target("avx512f"))) void read512(const uint8_t* p, int64_t n) {
    __m512i c[4] = {};
    for (int64_t i = 0; i < n / streams; i += 256)
        for (int64_t stream = 0; stream < streams; stream++) {
            const uint8_t* at = p + n / streams * stream + i;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                _mm_prefetch(reinterpret_cast<const char*>(at) + 64 * j + kAhead, hint);
                c[j] = _mm512_xor_si512(c[j], _mm512_loadu_si512(at + 64 * j));
            }
        }
    sink = _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(c[0], c[1]), _mm512_xor_si512(c[2], c[3])));
}

template <int streams, _mm_hint hint>
__attribute__((target("avx2"))) void read256(const uint8_t* p, int64_t n) {
    __m256i c[8] = {};
    for (int64_t i = 0; i < n / streams; i += 256)
        for (int64_t stream = 0; stream < streams; stream++) {
            const uint8_t* at = p + n / streams * stream + i;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) _mm_prefetch(reinterpret_cast<const char*>(at) + 64 * j + kAhead, hint);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                c[j] = _mm256_xor_si256(c[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * j)));
        }
    for (int j = 1; j < 8; j++) c[0] = _mm256_xor_si256(c[0], c[j]);
    sink = _mm256_extract_epi64(c[0], 0);
}

template <int streams>
void read_portable(const uint8_t* p, int64_t n) {
    uint64_t c[8] = {};
    for (int64_t i = 0; i < n / streams; i += 64)
        for (int64_t stream = 0; stream < streams; stream++)
            for (int j = 0; j < 8; j++) {
                uint64_t v;
                std::memcpy(&v, p + n / streams * stream + i + 8 * j, 8);
                c[j] ^= v;
            }
    for (int j = 1; j < 8; j++) c[0] ^= c[j];
    sink = c[0];
}

template <int streams, _mm_hint hint>
void read(const uint8_t* p, int64_t n, int width) {
    if (width == 512) read512<streams, hint>(p, n);
    else if (width == 256) read256<streams, hint>(p, n);
    else read_portable<streams>(p, n);
}

} // namespace

extern "C" {

// Bits of a load: 512, 256, or 64 for whatever the compiler makes.
int qfuse_probe_width() {
    if (__builtin_cpu_supports("avx512f")) return 512;
    if (__builtin_cpu_supports("avx2")) return 256;
    return 64;
}

// Read `bytes` (a multiple of 1024 for each thread) once, a consecutive part on each of `threads` threads, in 1 or 4
// places in turn, fetching into the cache of that level, 1 or 2, and return the seconds that took.
double qfuse_probe_read(const uint8_t* memory, int64_t bytes, int threads, int places, int level) {
    const int width = qfuse_probe_width();
    const int64_t part = bytes / threads / 1024 * 1024;
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        const uint8_t* own = memory + part * omp_get_thread_num();
        if (places == 4) level == 1 ? read<4, _MM_HINT_T0>(own, part, width) : read<4, _MM_HINT_T1>(own, part, width);
        else level == 1 ? read<1, _MM_HINT_T0>(own, part, width) : read<1, _MM_HINT_T1>(own, part, width);
    }
    return omp_get_wtime() - start;
}

}
