// What `attention.h` and the kernel of attention for AVX2 need of vectors: 8 floats. See `attention_vectors.h` for AVX-512.
#ifndef QFUSE_ATTENTION_VECTORS_AVX2
#define QFUSE_ATTENTION_VECTORS_AVX2
#define QFUSE_TARGET_AVX2_FMA __attribute__((target("avx2,fma,f16c")))
#define QFUSE_INLINE_AVX2_FMA QFUSE_TARGET_AVX2_FMA __attribute__((always_inline)) static inline
namespace qfuse {

// All bits of the first lanes.
QFUSE_INLINE_AVX2_FMA __m256i first_lanes8(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(count, 0, 8))), lanes);
}

QFUSE_INLINE_AVX2_FMA __m256 load_eight(const float* x) { return _mm256_loadu_ps(x); }
QFUSE_INLINE_AVX2_FMA __m256 load_eight(const at::BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
QFUSE_INLINE_AVX2_FMA __m256 load_eight(const at::Half* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Up to 8, and zeros.
template <typename T>
QFUSE_INLINE_AVX2_FMA __m256 load_floats(const T* x, int64_t count) {
    if (count >= 8)
        return load_eight(x);
    alignas(32) T some[8] = {};
    std::memcpy(some, x, std::max<int64_t>(0, count) * sizeof(T));
    return load_eight(some);
}

QFUSE_INLINE_AVX2_FMA void store_eight(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
QFUSE_INLINE_AVX2_FMA void store_eight(at::BFloat16* to, __m256 x) {
    // to the nearest, ties to even; of NaN, one that survives
    const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high); // of each half, twice
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
QFUSE_INLINE_AVX2_FMA void store_eight(at::Half* to, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// D floats, times `by`.
template <int64_t D, typename T>
QFUSE_TARGET_AVX2_FMA static inline void store_multiplied(const float* from, float by, T* to) {
    for (int64_t d = 0; d < D; d += 8) {
        const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(from + d), _mm256_set1_ps(by));
        if (D - d >= 8) {
            store_eight(to + d, x);
        } else {
            alignas(32) T some[8];
            store_eight(some, x);
            std::memcpy(to + d, some, (D - d) * sizeof(T));
        }
    }
}

struct Maximum {
    QFUSE_TARGET_AVX2_FMA __m256 operator()(__m256 a, __m256 b) const { return _mm256_max_ps(a, b); }
};
struct Sum {
    QFUSE_TARGET_AVX2_FMA __m256 operator()(__m256 a, __m256 b) const { return _mm256_add_ps(a, b); }
};

// The maximum or the sum of each of 8 vectors.
template <typename Operator>
QFUSE_INLINE_AVX2_FMA __m256 reduced(const float (&vectors)[8][8], Operator of) {
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
QFUSE_INLINE_AVX2_FMA void transpose(__m256 (&a)[8]) {
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

// The largest scores of each lane.
QFUSE_INLINE_AVX2_FMA __m256 largest_of(const float* scores, int64_t count) {
    const __m256 least = _mm256_set1_ps(-INFINITY);
    __m256 a = least, b = least;
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
        a = _mm256_max_ps(_mm256_loadu_ps(scores + j), a);
        b = _mm256_max_ps(_mm256_loadu_ps(scores + j + 8), b);
    }
    for (; j < count; j += 8) {
        const __m256 lanes = _mm256_castsi256_ps(first_lanes8(count - j));
        a = _mm256_max_ps(_mm256_blendv_ps(least, _mm256_loadu_ps(scores + j), lanes), a);
    }
    return _mm256_max_ps(a, b);
}

// Scores times `by`, plus a mask. mask: null if there is none; all of a mask with stride 0 is its first element.
template <typename M>
QFUSE_TARGET_AVX2_FMA __attribute__((noinline)) static void scale_scores(
    float* scores, float by, const M* mask, int64_t mask_stride, int64_t count) {
    for (int64_t j = 0; j < count; j += 8) {
        __m256 s = _mm256_mul_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(by));
        if (mask != nullptr)
            s = _mm256_add_ps(
                s, mask_stride == 0 ? _mm256_set1_ps(static_cast<float>(*mask)) : load_floats(mask + j, count - j));
        _mm256_storeu_ps(scores + j, s);
    }
}

// Tell whether a mask adds nothing to scores: all of it is zero. stride: as above, of the mask's keys.
template <typename M>
QFUSE_TARGET_AVX2_FMA static bool adds_nothing(const M* mask, int64_t stride, int64_t count) {
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

// 2ˣ, for x up to 127. 2⁰ is exact, NaN stays NaN, what is below 2⁻¹²⁶ is 0. Relatively within 4e-6 if the degree of the polynomial is
// 4, and 7e-8 if it is 6, if not for the rounding of x.
template <int degree>
QFUSE_INLINE_AVX2_FMA __m256 power_of_2(__m256 x) {
    static_assert(degree == 4 || degree == 6);
    constexpr float quartic[] = {1.355574746e-2f, 5.203237012e-2f, 2.413797677e-1f, 6.930321455e-1f, 1.0f};
    constexpr float sextic[] = {2.171502565e-4f, 1.244087704e-3f, 9.678063914e-3f, 5.548415333e-2f,
                                2.402295172e-1f, 6.931470037e-1f, 1.0f};
    const float* const coefficients = degree == 4 ? quartic : sextic;
    x = _mm256_max_ps(_mm256_set1_ps(-127), x); // of two, `max` takes the second if one is NaN
    const __m256 n = _mm256_floor_ps(x), f = _mm256_sub_ps(x, n);
    __m256 p = _mm256_set1_ps(coefficients[0]);
#pragma GCC unroll 6
    for (int i = 1; i <= degree; ++i)
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(coefficients[i]));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// Weights, 2^((score − from) · factor), of one row: in place. Those from `seen` to `count` are 0. Return their sums in each lane.
template <int degree>
QFUSE_INLINE_AVX2_FMA __m256 weigh_row(float* scores, int64_t seen, int64_t count, float from, float factor) {
    const __m256 subtracted = _mm256_set1_ps(from), by = _mm256_set1_ps(factor);
    const auto weights = [=](int64_t j) QFUSE_TARGET_AVX2_FMA {
        return power_of_2<degree>(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(scores + j), subtracted), by));
    };
    __m256 sum_a = _mm256_setzero_ps(), sum_b = sum_a;
    int64_t j = 0;
    for (; j + 16 <= seen; j += 16) {
        const __m256 a = weights(j), b = weights(j + 8);
        _mm256_storeu_ps(scores + j, a);
        _mm256_storeu_ps(scores + j + 8, b);
        sum_a = _mm256_add_ps(sum_a, a);
        sum_b = _mm256_add_ps(sum_b, b);
    }
    for (; j < count; j += 8) {
        const __m256 a = _mm256_and_ps(_mm256_castsi256_ps(first_lanes8(seen - j)), weights(j));
        _mm256_storeu_ps(scores + j, a);
        sum_a = _mm256_add_ps(sum_a, a);
    }
    return _mm256_add_ps(sum_a, sum_b);
}

// What `weigh` of a kernel does, see `attention.h`. The rows are taken in three steps, because each is a long chain of latencies for
// one row.
template <int degree, typename Known>
QFUSE_TARGET_AVX2_FMA __attribute__((noinline)) static void weigh_rows(
    float* scores, int64_t score_stride, int64_t rows, const int64_t* seen, int64_t count, float factor, bool is_first,
    Known& known, float* sums, int64_t padded_head) {
    for (int64_t row = 0; row < rows; row += 8, scores += 8 * score_stride) {
        const int64_t some = std::min<int64_t>(8, rows - row);
        alignas(32) float partial[8][8] = {}, from[8];
        for (int64_t i = 0; i < some; ++i)
            _mm256_store_ps(partial[i], largest_of(scores + i * score_stride, seen[row + i]));
        const __m256 none = _mm256_set1_ps(-INFINITY), before = is_first ? none : _mm256_load_ps(known.largest + row);
        const __m256 largest = _mm256_max_ps(before, reduced(partial, Maximum()));
        _mm256_store_ps(known.largest + row, largest);
        // where all scores are −∞, the weights are 0
        const __m256 subtracted = _mm256_andnot_ps(_mm256_cmp_ps(largest, none, _CMP_EQ_OQ), largest);
        _mm256_store_ps(from, subtracted);
        for (int64_t i = 0; i < some; ++i)
            _mm256_store_ps(
                partial[i], weigh_row<degree>(scores + i * score_stride, seen[row + i], count, from[i], factor));
        __m256 sum = reduced(partial, Sum());
        if (!is_first) {
            const __m256 shrunk = power_of_2<6>(_mm256_mul_ps(_mm256_sub_ps(before, subtracted), _mm256_set1_ps(factor)));
            sum = _mm256_fmadd_ps(_mm256_load_ps(known.sum + row), shrunk, sum);
            alignas(32) float by[8];
            _mm256_store_ps(by, shrunk);
            for (int64_t i = 0; i < some; ++i)
                if (by[i] != 1)
                    for (int64_t d = 0; d < padded_head; d += 8) {
                        float* to = sums + (row + i) * padded_head + d;
                        _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_loadu_ps(to), _mm256_set1_ps(by[i])));
                    }
        }
        _mm256_store_ps(known.sum + row, sum);
    }
}

} // namespace qfuse
#endif
