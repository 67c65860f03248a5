// Attention of a few queries by AVX-512, in float32 whatever the operands are: keys and values are read once, where they
// lie, as in decoding. Also what it shares with other kernels.
#ifndef QFUSE_ATTENTION_AVX512
#define QFUSE_ATTENTION_AVX512
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

QFUSE_INLINE_AVX512 void rescale(float* sums, float by, int64_t count) {
    if (by != 1)
        for (int64_t d = 0; d < count; d += 16)
            _mm512_storeu_ps(sums + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(by)));
}

// See `attention.h`.
template <typename T, int64_t D>
class FewQueriesAttention {
 public:
    using Element = T;
    static constexpr int64_t rows = 8;
    static constexpr int64_t keys = 256;
    static constexpr int64_t window = int64_t{1} << 40; // nothing is packed
    static constexpr int64_t padded_head = (D + 15) / 16 * 16;
    static constexpr int64_t score_stride = keys + 16; // not a power of two: rows are in different sets of the cache
    using Known = AttentionRows<rows>;

    explicit FewQueriesAttention(int64_t) {}

    void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t) {
        k_ = k, k_stride_ = k_stride, v_ = v, v_stride_ = v_stride;
    }

    QFUSE_TARGET_AVX512 void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t d = 0; d < D; d += 16)
                _mm512_store_ps(q_[i] + d, load_floats(q[i] + d, first_lanes16(D - d)));
    }

    QFUSE_TARGET_AVX512 float* scores(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += 16) {
            const T* k = k_ + (first + key) * k_stride_;
            const int64_t some = std::min<int64_t>(16, count - key);
            int64_t row = 0;
            for (; row + 4 <= count_; row += 4)
                multiply<4>(k, some, row);
            switch (count_ - row) {
                case 3: multiply<3>(k, some, row); break;
                case 2: multiply<2>(k, some, row); break;
                case 1: multiply<1>(k, some, row); break;
            }
            for (row = 0; row < count_; ++row)
                _mm512_storeu_ps(scores_ + row * score_stride + key, reduced(products_[row], Sum()));
        }
        return scores_;
    }

    template <typename M>
    void scale(float* scores, float by, const M* mask, int64_t mask_stride, int64_t count) const {
        scale_scores(scores, by, mask, mask_stride, count);
    }

    QFUSE_TARGET_AVX512 void weigh(
        const int64_t* seen, int64_t count, float factor, bool is_first, Known& known, float* sums) {
        const __m512 natural = _mm512_set1_ps(factor * 0.693147181f); // eˣ instead of 2ˣ
        for (int64_t i = 0; i < count_; ++i) {
            float* scores = scores_ + i * score_stride;
            const float before = is_first ? -INFINITY : known.largest[i];
            const float largest = std::max(before, _mm512_reduce_max_ps(largest_of(scores, seen[i])));
            const __m512 from = _mm512_set1_ps(largest == -INFINITY ? 0 : largest); // weights are 0 then
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < count; j += 16) {
                const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), from), natural);
                const __m512 weight = _mm512_maskz_mov_ps(first_lanes16(seen[i] - j), exp_of(x));
                _mm512_storeu_ps(scores + j, weight);
                sum = _mm512_add_ps(sum, weight);
            }
            float all = _mm512_reduce_add_ps(sum);
            if (!is_first) {
                const __m512 grown = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(before), from), natural);
                const float by = _mm512_cvtss_f32(exp_of(grown));
                all += known.sum[i] * by;
                rescale(sums + i * padded_head, by, padded_head);
            }
            known.largest[i] = largest, known.sum[i] = all;
        }
    }

    QFUSE_TARGET_AVX512 void add(int64_t first, int64_t count, bool is_first, float* sums) const {
        const T* v = v_ + first * v_stride_;
        if (is_first)
            std::fill_n(sums, count_ * padded_head, 0.0f);
        int64_t row = 0;
        for (; row + 4 <= count_; row += 4)
            add_to<4>(v, count, row, sums);
        switch (count_ - row) {
            case 3: add_to<3>(v, count, row, sums); break;
            case 2: add_to<2>(v, count, row, sums); break;
            case 1: add_to<1>(v, count, row, sums); break;
        }
    }

    QFUSE_TARGET_AVX512 void store(const float* sums, float factor, T* out) const {
        for (int64_t d = 0; d < D; ++d)
            out[d] = static_cast<T>(sums[d] * factor);
    }

 private:
    const T *k_ = nullptr, *v_ = nullptr;
    int64_t k_stride_ = 0, v_stride_ = 0, count_ = 0;
    alignas(64) float q_[rows][padded_head];
    alignas(64) float products_[rows][16][16]; // of a row and a key, to be summed up
    alignas(64) float scores_[rows * score_stride];

    // ROWS rows and up to 16 keys.
    template <int ROWS>
    QFUSE_TARGET_AVX512 __attribute__((noinline)) void multiply(const T* k, int64_t count, int64_t row) {
        for (int64_t key = 0; key < count; ++key, k += k_stride_) {
            __m512 sums[ROWS];
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                sums[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int64_t d = 0; d < D; d += 16) {
                if (d * sizeof(T) % 64 == 0) // the rows of 16 keys on: they may be far from each other
                    _mm_prefetch(reinterpret_cast<const char*>(k + 16 * k_stride_ + d), _MM_HINT_T0);
                const __m512 of_key = load_floats(k + d, first_lanes16(D - d));
    #pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                    sums[i] = _mm512_fmadd_ps(of_key, _mm512_load_ps(q_[row + i] + d), sums[i]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                _mm512_store_ps(products_[row + i][key], sums[i]);
        }
    }

    // ROWS rows and all columns, 64 at a time.
    template <int ROWS>
    QFUSE_TARGET_AVX512 __attribute__((noinline)) void add_to(const T* v, int64_t count, int64_t row, float* sums) const {
        for (int64_t d = 0; d < D; d += 64) {
            __m512 acc[ROWS][4];
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < 4; ++j)
                    acc[i][j] = _mm512_maskz_loadu_ps(
                        first_lanes16(D - d - 16 * j), sums + (row + i) * padded_head + d + 16 * j);
            for (int64_t key = 0; key < count; ++key) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    if ((d + 16 * j) * sizeof(T) % 64 == 0 && d + 16 * j < D)
                        _mm_prefetch(reinterpret_cast<const char*>(v + (key + 16) * v_stride_ + d + 16 * j), _MM_HINT_T0);
                    const __m512 value = load_floats(v + key * v_stride_ + d + 16 * j, first_lanes16(D - d - 16 * j));
        #pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                        acc[i][j] = _mm512_fmadd_ps(
                            value, _mm512_set1_ps(scores_[(row + i) * score_stride + key]), acc[i][j]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < 4; ++j)
                    _mm512_mask_storeu_ps(
                        sums + (row + i) * padded_head + d + 16 * j, first_lanes16(D - d - 16 * j), acc[i][j]);
        }
    }
};

} // namespace qfuse
#endif
