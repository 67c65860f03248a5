// What attention needs of registers, here those of AVX-512. `attention_registers_avx2.h` has the same for AVX2.
#ifdef QFUSE_ATTENTION_REGISTERS_AVX2
#error "a program has one of both headers: their names are the same"
#endif
#ifndef QFUSE_ATTENTION_REGISTERS_AVX512
#define QFUSE_ATTENTION_REGISTERS_AVX512
#define QFUSE_TARGET_VECTORS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define QFUSE_INLINE_VECTORS QFUSE_TARGET_VECTORS __attribute__((always_inline)) static inline
namespace qfuse {
namespace {

using Floats = __m512;
constexpr int64_t lanes = 16; // of them in a register

QFUSE_INLINE_VECTORS __mmask16 first_lanes16(int64_t count) {
    return count >= 16 ? 0xffff : (1u << std::max<int64_t>(0, count)) - 1;
}

QFUSE_INLINE_VECTORS __m512 load_floats(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
QFUSE_INLINE_VECTORS __m512 load_floats(const at::BFloat16* x, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
QFUSE_INLINE_VECTORS __m512 load_floats(const at::Half* x, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

QFUSE_INLINE_VECTORS void store_floats(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
QFUSE_INLINE_VECTORS void store_floats(at::BFloat16* to, __mmask16 mask, __m512 x) {
    // to the nearest, ties to even; of NaN, one that survives
    const __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000)), 16);
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(high));
}
QFUSE_INLINE_VECTORS void store_floats(at::Half* to, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The first `count` lanes: of memory, to memory, and of a register; the others are 0, or those of `otherwise`.
template <typename T>
QFUSE_INLINE_VECTORS Floats load_first(const T* x, int64_t count) { return load_floats(x, first_lanes16(count)); }
template <typename T>
QFUSE_INLINE_VECTORS void store_first(T* to, int64_t count, Floats x) { store_floats(to, first_lanes16(count), x); }
QFUSE_INLINE_VECTORS Floats load_first_or(Floats otherwise, const float* x, int64_t count) {
    return _mm512_mask_loadu_ps(otherwise, first_lanes16(count), x);
}
QFUSE_INLINE_VECTORS Floats first_of(Floats x, int64_t count) { return _mm512_maskz_mov_ps(first_lanes16(count), x); }

QFUSE_INLINE_VECTORS Floats load_lanes(const float* x) { return _mm512_loadu_ps(x); }
QFUSE_INLINE_VECTORS void store_lanes(float* to, Floats x) { _mm512_storeu_ps(to, x); }
QFUSE_INLINE_VECTORS Floats broadcast(float x) { return _mm512_set1_ps(x); }
QFUSE_INLINE_VECTORS Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); } // a · b + c
QFUSE_INLINE_VECTORS Floats zero_where_equal(Floats x, Floats y) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), _mm512_setzero_ps());
}

// Of 2ˣ: x within bounds, its part behind the point, and p · 2^⌊x⌋.
QFUSE_INLINE_VECTORS Floats bounded_exponent(Floats x) { return x; }
QFUSE_INLINE_VECTORS Floats behind_point(Floats x) { return _mm512_reduce_ps(x, 9); }
QFUSE_INLINE_VECTORS Floats times_power(Floats p, Floats x) { return _mm512_scalef_ps(p, x); }

struct Maximum {
    QFUSE_TARGET_VECTORS __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};
struct Sum {
    QFUSE_TARGET_VECTORS __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

// The maximum or the sum of each of 16 vectors.
template <typename Operator>
QFUSE_INLINE_VECTORS __m512 reduced(const float (&vectors)[16][16], Operator of) {
    __m512 a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = _mm512_load_ps(vectors[i]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) // of rows i and i + 8, in turn
        a[i] = of(_mm512_unpacklo_ps(a[i], a[i + 8]), _mm512_unpackhi_ps(a[i], a[i + 8]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) // i, i + 8, i + 4, i + 12
        a[i] = of(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 4]))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 4]))));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) // the same of i, and then of i + 2, in two quarters each
        a[i] = of(_mm512_shuffle_f32x4(a[i], a[i + 2], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 2], 0xdd));
    const __m512 all = of(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15), all);
}

// 16 rows become 16 columns.
QFUSE_INLINE_VECTORS void transpose(__m512i (&a)[16]) {
    __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        // quarters of four rows each: rows 0 to 3 of quarters 0 and 2, and so on
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}
QFUSE_INLINE_VECTORS void transpose(__m512 (&a)[16]) { transpose(reinterpret_cast<__m512i (&)[16]>(a)); }

// Tell whether a mask adds nothing to scores: all of it is zero. stride: of its keys, 0 if one stands for all.
template <typename M>
QFUSE_TARGET_VECTORS static bool adds_nothing(const M* mask, int64_t stride, int64_t count) {
    const auto* const bytes = reinterpret_cast<const char*>(mask);
    const int64_t size = (stride == 0 ? std::min<int64_t>(1, count) : count) * static_cast<int64_t>(sizeof(M));
    __m512i bits = _mm512_setzero_si512();
    int64_t at = 0;
    for (; at + 64 <= size; at += 64)
        bits = _mm512_or_si512(bits, _mm512_loadu_si512(bytes + at));
    const __mmask64 rest = (uint64_t{1} << (size - at)) - 1;
    bits = _mm512_or_si512(bits, _mm512_maskz_loadu_epi8(rest, bytes + at));
    return _mm512_test_epi32_mask(bits, bits) == 0;
}

} // namespace
} // namespace qfuse
#endif
