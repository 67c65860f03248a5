// What the kernels of attention share: vectors of AVX-512.
#ifndef QFUSE_ATTENTION_VECTORS
#define QFUSE_ATTENTION_VECTORS
#define QFUSE_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define QFUSE_INLINE_AVX512 QFUSE_TARGET_AVX512 __attribute__((always_inline)) static inline
namespace qfuse {

QFUSE_INLINE_AVX512 __mmask16 first_lanes16(int64_t count) {
    return count >= 16 ? 0xffff : (1u << std::max<int64_t>(0, count)) - 1;
}

QFUSE_INLINE_AVX512 __m512 load_floats(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
QFUSE_INLINE_AVX512 __m512 load_floats(const at::BFloat16* x, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}
QFUSE_INLINE_AVX512 __m512 load_floats(const at::Half* x, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
}

QFUSE_INLINE_AVX512 void store_floats(float* to, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(to, lanes, x); }
QFUSE_INLINE_AVX512 void store_floats(at::BFloat16* to, __mmask16 lanes, __m512 x) {
    // to the nearest, ties to even; of NaN, one that survives
    const __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000)), 16);
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(high));
}
QFUSE_INLINE_AVX512 void store_floats(at::Half* to, __mmask16 lanes, __m512 x) {
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// D floats, times `by`.
template <int64_t D, typename T>
QFUSE_TARGET_AVX512 static inline void store_multiplied(const float* from, float by, T* to) {
    for (int64_t d = 0; d < D; d += 16)
        store_floats(to + d, first_lanes16(D - d), _mm512_mul_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(by)));
}

// 8 rows by 32 columns of sums, half of the registers.
constexpr int64_t sums_rows = 8;
using Sums = __m512[sums_rows][2];

QFUSE_INLINE_AVX512 void clear(Sums& sums) {
#pragma GCC unroll 8
    for (int i = 0; i < sums_rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
            sums[i][j] = _mm512_setzero_ps();
}

// out (+)= sums. is_first: nothing stands in `out`.
QFUSE_INLINE_AVX512 void add_sums(const Sums& sums, bool is_first, float* out, int64_t out_stride) {
#pragma GCC unroll 8
    for (int i = 0; i < sums_rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            float* to = out + i * out_stride + 16 * j;
            _mm512_store_ps(to, is_first ? sums[i][j] : _mm512_add_ps(_mm512_load_ps(to), sums[i][j]));
        }
}

struct Maximum {
    QFUSE_TARGET_AVX512 __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};
struct Sum {
    QFUSE_TARGET_AVX512 __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

// The maximum or the sum of each of 16 vectors.
template <typename Operator>
QFUSE_INLINE_AVX512 __m512 reduced(const float (&vectors)[16][16], Operator of) {
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

// The largest scores of each lane.
QFUSE_INLINE_AVX512 __m512 largest_of(const float* scores, int64_t count) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 a = least, b = least;
    int64_t j = 0;
    for (; j + 32 <= count; j += 32) {
        a = _mm512_max_ps(_mm512_loadu_ps(scores + j), a);
        b = _mm512_max_ps(_mm512_loadu_ps(scores + j + 16), b);
    }
    if (j < count) {
        a = _mm512_max_ps(_mm512_mask_loadu_ps(least, first_lanes16(count - j), scores + j), a);
        b = _mm512_max_ps(_mm512_mask_loadu_ps(least, first_lanes16(count - j - 16), scores + j + 16), b);
    }
    return _mm512_max_ps(a, b);
}

// Scores times `by`, plus a mask. mask: null if there is none; all of a mask with stride 0 is its first element.
template <typename M>
QFUSE_TARGET_AVX512 __attribute__((noinline)) static void scale_scores(
    float* scores, float by, const M* mask, int64_t mask_stride, int64_t count) {
    for (int64_t j = 0; j < count; j += 16) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(by));
        if (mask != nullptr)
            s = _mm512_add_ps(
                s, mask_stride == 0 ? _mm512_broadcastss_ps(_mm512_castps512_ps128(load_floats(mask, 1)))
                                    : load_floats(mask + j, first_lanes16(count - j)));
        _mm512_storeu_ps(scores + j, s);
    }
}

// Tell whether a mask adds nothing to scores: all of it is zero. stride: as above, of the mask's keys.
template <typename M>
QFUSE_TARGET_AVX512 static bool adds_nothing(const M* mask, int64_t stride, int64_t count) {
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

// 16 rows become 16 columns.
QFUSE_INLINE_AVX512 void transpose(__m512i (&a)[16]) {
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

// 2ˣ. 2⁰ and 2¹ are exact, NaN stays NaN, −∞ gives 0. Relatively within 1e-4 if the degree of the polynomial is 3, 4e-6 if it
// is 4, and 7e-8 if it is 6, if not for the rounding of x.
template <int degree>
QFUSE_INLINE_AVX512 __m512 power_of_2(__m512 x) {
    static_assert(degree == 3 || degree == 4 || degree == 6);
    constexpr float cubic[] = {0.07826797f, 0.22630768f, 0.69542435f, 1.0f};
    constexpr float quartic[] = {1.355574746e-2f, 5.203237012e-2f, 2.413797677e-1f, 6.930321455e-1f, 1.0f};
    constexpr float sextic[] = {2.171502565e-4f, 1.244087704e-3f, 9.678063914e-3f, 5.548415333e-2f,
                                2.402295172e-1f, 6.931470037e-1f, 1.0f};
    const float* const coefficients = degree == 3 ? cubic : degree == 4 ? quartic : sextic;
    const __m512 f = _mm512_reduce_ps(x, 9); // x − ⌊x⌋
    __m512 p = _mm512_set1_ps(coefficients[0]);
#pragma GCC unroll 6
    for (int i = 1; i <= degree; ++i)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(coefficients[i]));
    return _mm512_scalef_ps(p, x);
}

// Weights in float32, 2^((score − from) · factor), of one row: in place. Those from `seen` to `count` are 0. Return their sums
// in each lane.
template <int degree>
struct FloatWeights {
    QFUSE_TARGET_AVX512 static __m512 of(float* scores, int64_t seen, int64_t count, float from, float factor) {
        const __m512 subtracted = _mm512_set1_ps(from), by = _mm512_set1_ps(factor);
        const auto weights = [=](int64_t j) QFUSE_TARGET_AVX512 {
            return power_of_2<degree>(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), subtracted), by));
        };
        __m512 sum_a = _mm512_setzero_ps(), sum_b = sum_a;
        int64_t j = 0;
        for (; j + 32 <= seen; j += 32) {
            const __m512 a = weights(j), b = weights(j + 16);
            _mm512_storeu_ps(scores + j, a);
            _mm512_storeu_ps(scores + j + 16, b);
            sum_a = _mm512_add_ps(sum_a, a);
            sum_b = _mm512_add_ps(sum_b, b);
        }
        for (; j < count; j += 16) {
            const __m512 a = _mm512_maskz_mov_ps(first_lanes16(seen - j), weights(j));
            _mm512_storeu_ps(scores + j, a);
            sum_a = _mm512_add_ps(sum_a, a);
        }
        return _mm512_add_ps(sum_a, sum_b);
    }
};

// What `weigh` of a kernel does, see `attention.h`. `Weights` is like `FloatWeights`. The rows are taken in three steps, because each is a
// long chain of latencies for one row.
template <typename Weights, typename Known>
QFUSE_TARGET_AVX512 __attribute__((noinline)) static void weigh_rows(
    float* scores, int64_t score_stride, int64_t rows, const int64_t* seen, int64_t count, float factor, bool is_first,
    Known& known, float* sums, int64_t padded_head) {
    for (int64_t row = 0; row < rows; row += 16, scores += 16 * score_stride) {
        const int64_t some = std::min<int64_t>(16, rows - row);
        alignas(64) float partial[16][16], from[16];
        for (int64_t i = 0; i < some; ++i)
            _mm512_store_ps(partial[i], largest_of(scores + i * score_stride, seen[row + i]));
        const __m512 before = is_first ? _mm512_set1_ps(-INFINITY) : _mm512_load_ps(known.largest + row);
        const __m512 largest = _mm512_max_ps(before, reduced(partial, Maximum()));
        _mm512_store_ps(known.largest + row, largest);
        // where all scores are −∞, the weights are 0
        const __mmask16 is_none = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
        const __m512 subtracted = _mm512_mask_mov_ps(largest, is_none, _mm512_setzero_ps());
        _mm512_store_ps(from, subtracted);
        for (int64_t i = 0; i < some; ++i)
            _mm512_store_ps(
                partial[i], Weights::of(scores + i * score_stride, seen[row + i], count, from[i], factor));
        __m512 sum = reduced(partial, Sum());
        if (!is_first) {
            const __m512 shrunk = power_of_2<6>(_mm512_mul_ps(_mm512_sub_ps(before, subtracted), _mm512_set1_ps(factor)));
            sum = _mm512_fmadd_ps(_mm512_load_ps(known.sum + row), shrunk, sum);
            alignas(64) float by[16];
            _mm512_store_ps(by, shrunk);
            for (int64_t i = 0; i < some; ++i)
                if (by[i] != 1)
                    for (int64_t d = 0; d < padded_head; d += 16) {
                        float* to = sums + (row + i) * padded_head + d;
                        _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(by[i])));
                    }
        }
        _mm512_store_ps(known.sum + row, sum);
    }
}

} // namespace qfuse
#endif
