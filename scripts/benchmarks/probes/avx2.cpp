// How many operations AVX2's multiplication of 16-bit integers does, with the addition that it needs, from registers only: the
// peak of an exact int8 matmul on a CPU that has AVX2 but no VNNI. A multiplication and an addition count as two operations.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>

namespace {

// As many accumulators as a tile of a matmul has; variables and asm statements for the same reasons as in vnni.cpp.
constexpr int kChains = 12;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

__attribute__((target("avx2"))) void chain(int64_t steps) {
    const __m256i a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(-2);
#define DECLARE(J) __m256i c##J = _mm256_setzero_si256(), p##J;
#define MULTIPLY(J)                                                                                                     \
    __asm__ volatile("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(c##J), "=&x"(p##J) : "x"(a), "x"(b));
    EACH(DECLARE)
    for (int64_t i = 0; i < steps; i++) {
        EACH(MULTIPLY)
    }
#undef DECLARE
#undef MULTIPLY
}

} // namespace

extern "C" {

// The operations of one step of one thread, or 0 where the CPU has no AVX2, or better than that.
int64_t qfuse_probe_operations() {
    const bool has_vnni = __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
    return __builtin_cpu_supports("avx2") && !has_vnni ? kChains * 16 * 2 : 0;
}

// Do `steps` steps on each of `threads` threads, and return the seconds that took.
double qfuse_probe_run(int threads, int64_t steps) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    chain(steps);
    return omp_get_wtime() - start;
}

}
