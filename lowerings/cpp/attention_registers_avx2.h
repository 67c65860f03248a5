// What attention needs of registers, here those of AVX2. `attention_registers_avx512.h` has the same for AVX-512.
#ifdef QFUSE_ATTENTION_REGISTERS_AVX512
#error "a program has one of both headers: their names are the same"
#endif
#ifndef QFUSE_ATTENTION_REGISTERS_AVX2
#define QFUSE_ATTENTION_REGISTERS_AVX2
#define QFUSE_TARGET_VECTORS __attribute__((target("avx2,fma,f16c")))
#define QFUSE_INLINE_VECTORS QFUSE_TARGET_VECTORS __attribute__((always_inline)) static inline
namespace qfuse {
namespace {

using Floats = __m256;
constexpr int64_t lanes = 8; // of them in a register

// All bits of the first lanes.
QFUSE_INLINE_VECTORS __m256i first_lanes8(int64_t count) {
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(count, 0, 8))), numbers);
}

QFUSE_INLINE_VECTORS __m256 load_eight(const float* x) { return _mm256_loadu_ps(x); }
QFUSE_INLINE_VECTORS __m256 load_eight(const at::BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
QFUSE_INLINE_VECTORS __m256 load_eight(const at::Half* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// The first `count` lanes: of memory, to memory, and of a register; the others are 0, or those of `otherwise`.
template <typename T>
QFUSE_INLINE_VECTORS Floats load_first(const T* x, int64_t count) {
    if (count >= 8)
        return load_eight(x);
    alignas(32) T some[8] = {};
    std::memcpy(some, x, std::max<int64_t>(0, count) * sizeof(T));
    return load_eight(some);
}

QFUSE_INLINE_VECTORS void store_eight(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
QFUSE_INLINE_VECTORS void store_eight(at::BFloat16* to, __m256 x) {
    // to the nearest, ties to even; of NaN, one that survives
    const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high); // of each half, twice
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
QFUSE_INLINE_VECTORS void store_eight(at::Half* to, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <typename T>
QFUSE_INLINE_VECTORS void store_first(T* to, int64_t count, Floats x) {
    if (count >= 8)
        return store_eight(to, x);
    alignas(32) T some[8];
    store_eight(some, x);
    std::memcpy(to, some, std::max<int64_t>(0, count) * sizeof(T));
}
// x: 8 floats, whatever the last ones are.
QFUSE_INLINE_VECTORS Floats load_first_or(Floats otherwise, const float* x, int64_t count) {
    return _mm256_blendv_ps(otherwise, _mm256_loadu_ps(x), _mm256_castsi256_ps(first_lanes8(count)));
}
QFUSE_INLINE_VECTORS Floats first_of(Floats x, int64_t count) {
    return _mm256_and_ps(_mm256_castsi256_ps(first_lanes8(count)), x);
}

QFUSE_INLINE_VECTORS Floats load_lanes(const float* x) { return _mm256_loadu_ps(x); }
QFUSE_INLINE_VECTORS void store_lanes(float* to, Floats x) { _mm256_storeu_ps(to, x); }
QFUSE_INLINE_VECTORS Floats broadcast(float x) { return _mm256_set1_ps(x); }
QFUSE_INLINE_VECTORS Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); } // a · b + c
QFUSE_INLINE_VECTORS Floats zero_where_equal(Floats x, Floats y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, y, _CMP_EQ_OQ), x);
}

// Of 2ˣ: x within bounds, its part behind the point, and p · 2^⌊x⌋, for x up to 127. What is below 2⁻¹²⁶ is 0.
QFUSE_INLINE_VECTORS Floats bounded_exponent(Floats x) {
    return _mm256_max_ps(_mm256_set1_ps(-127), x); // of two, `max` takes the second if one is NaN
}
QFUSE_INLINE_VECTORS Floats behind_point(Floats x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
QFUSE_INLINE_VECTORS Floats times_power(Floats p, Floats x) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

struct Maximum {
    QFUSE_TARGET_VECTORS __m256 operator()(__m256 a, __m256 b) const { return _mm256_max_ps(a, b); }
};
struct Sum {
    QFUSE_TARGET_VECTORS __m256 operator()(__m256 a, __m256 b) const { return _mm256_add_ps(a, b); }
};

// The maximum or the sum of each of 8 vectors.
template <typename Operator>
QFUSE_INLINE_VECTORS __m256 reduced(const float (&vectors)[8][8], Operator of) {
    __m256 a[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        a[i] = _mm256_load_ps(vectors[i]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) // of rows i and i + 4, in turn
        a[i] = of(_mm256_unpacklo_ps(a[i], a[i + 4]), _mm256_unpackhi_ps(a[i], a[i + 4]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) // i, i + 4, i + 2, i + 6, in each half
        a[i] = of(
            _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a[i]), _mm256_castps_pd(a[i + 2]))),
            _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a[i]), _mm256_castps_pd(a[i + 2]))));
    const __m256 all = of(_mm256_permute2f128_ps(a[0], a[1], 0x20), _mm256_permute2f128_ps(a[0], a[1], 0x31));
    return _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
}

// 8 rows become 8 columns.
QFUSE_INLINE_VECTORS void transpose(__m256 (&a)[8]) {
    __m256 b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        a[i] = b[i];
}

// Tell whether a mask adds nothing to scores: all of it is zero. stride: of its keys, 0 if one stands for all.
template <typename M>
QFUSE_TARGET_VECTORS static bool adds_nothing(const M* mask, int64_t stride, int64_t count) {
    const auto* const bytes = reinterpret_cast<const char*>(mask);
    const int64_t size = (stride == 0 ? std::min<int64_t>(1, count) : count) * static_cast<int64_t>(sizeof(M));
    __m256i bits = _mm256_setzero_si256();
    int64_t at = 0;
    for (; at + 32 <= size; at += 32)
        bits = _mm256_or_si256(bits, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + at)));
    alignas(32) char rest[32] = {};
    std::memcpy(rest, bytes + at, size - at);
    bits = _mm256_or_si256(bits, _mm256_load_si256(reinterpret_cast<const __m256i*>(rest)));
    return _mm256_testz_si256(bits, bits);
}

} // namespace
} // namespace qfuse
#endif
