// How many int8 operations the dot-product instructions of this CPU do, from registers only: the peak of a u8×s8 matmul.
// A multiplication and an addition count as two operations.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>

namespace {

volatile int32_t sink; // what is stored here cannot be optimized away

// Twelve independent accumulators hide the latency of the instruction. They are variables rather than an array, and
// pass through an empty asm statement: GCC would keep an array in memory, and merge accumulators that are equal.
constexpr int kChains = 12;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

__attribute__((target("avx512f,avx512vnni"))) void chain512(int64_t steps) {
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
#define DECLARE(J) __m512i c##J = _mm512_setzero_si512();
#define MULTIPLY(J) c##J = _mm512_dpbusd_epi32(c##J, a, b); __asm__ volatile("" : "+v"(c##J));
#define ADD(J) sum = _mm512_xor_si512(sum, c##J);
    EACH(DECLARE)
    for (int64_t i = 0; i < steps; i++) {
        EACH(MULTIPLY)
    }
    __m512i sum = _mm512_setzero_si512();
    EACH(ADD)
    sink = _mm512_reduce_add_epi32(sum);
#undef DECLARE
#undef MULTIPLY
#undef ADD
}

__attribute__((target("avx2,avxvnni"))) void chain256(int64_t steps) {
    const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
#define DECLARE(J) __m256i c##J = _mm256_setzero_si256();
#define MULTIPLY(J) c##J = _mm256_dpbusd_avx_epi32(c##J, a, b); __asm__ volatile("" : "+x"(c##J));
#define ADD(J) sum = _mm256_xor_si256(sum, c##J);
    EACH(DECLARE)
    for (int64_t i = 0; i < steps; i++) {
        EACH(MULTIPLY)
    }
    __m256i sum = _mm256_setzero_si256();
    EACH(ADD)
    sink = _mm256_extract_epi32(sum, 0);
#undef DECLARE
#undef MULTIPLY
#undef ADD
}

} // namespace

extern "C" {

// The operations of one step of one thread, or 0 where the CPU has no such instruction.
int64_t qfuse_probe_operations() {
    if (__builtin_cpu_supports("avx512vnni")) return kChains * 64 * 2;
    if (__builtin_cpu_supports("avxvnni")) return kChains * 32 * 2;
    return 0;
}

// Do `steps` steps on each of `threads` threads, and return the seconds that took.
double qfuse_probe_run(int threads, int64_t steps) {
    const bool wide = __builtin_cpu_supports("avx512vnni");
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        if (wide) chain512(steps);
        else chain256(steps);
    }
    return omp_get_wtime() - start;
}

}
