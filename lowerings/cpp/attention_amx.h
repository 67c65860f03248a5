// Attention of bfloat16 by AMX: `tdpbf16ps` on tiles of 16 × 32. Weights are rounded to bfloat16, as in ATen.
//
// Keys are packed [key / 16][d / 32][d / 2 % 16][key % 16][d % 2], values [key / 32][d / 16][key / 2 % 16][d % 16][key % 2]:
// the tiles of both, one after the other. What is missing to whole tiles is zero.
#ifndef QFUSE_ATTENTION_AMX
#define QFUSE_ATTENTION_AMX
#define QFUSE_TARGET_AMX_BF16 \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
namespace qfuse {

template <typename T, int64_t D>
class AmxAttention {
 public:
    using Element = T; // 16 bits, read as such
    static constexpr int64_t rows = 32;
    static constexpr int64_t keys = 256;
    static constexpr int64_t score_stride = keys + 16; // not a power of two: rows are in different sets of the cache
    static constexpr int64_t padded_head = (D + 31) / 32 * 32;
    using Known = AttentionRows<rows>;
    static constexpr int64_t window = 131072 / padded_head / keys * keys;

    QFUSE_TARGET_AMX_BF16 explicit AmxAttention(int64_t all_keys)
        : k_(std::min(window, ceil_div(all_keys, 32) * 32) * padded_head),
          v_(std::min(window, ceil_div(all_keys, 32) * 32) * padded_head) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        // GCC 12 believes that the next reads 8 of the 64 bytes, and may leave out what sets the others.
        __asm__ volatile("" : "+m"(config));
        _tile_loadconfig(&config);
    }
    AmxAttention(const AmxAttention&) = delete;
    AmxAttention& operator=(const AmxAttention&) = delete;
    QFUSE_TARGET_AMX_BF16 ~AmxAttention() { _tile_release(); }

    QFUSE_TARGET_AMX_BF16 void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count) {
        for (int64_t key = 0; key < count; key += 32) {
            const int64_t n = std::min<int64_t>(32, count - key);
            uint16_t* packed = k_.data() + key * padded_head;
            for (int64_t d = 0; d < D; d += 32) {
                pack_keys(k + key * k_stride + d, k_stride, n, D - d, packed + d * 16);
                pack_keys(k + (key + 16) * k_stride + d, k_stride, n - 16, D - d, packed + (padded_head + d) * 16);
                pack_values(v + key * v_stride + d, v_stride, n, D - d, v_.data() + key * padded_head + d * 32);
            }
        }
    }

    QFUSE_TARGET_AMX_BF16 void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < ceil_div(count, 16) * 16; ++i)
            for (int64_t d = 0; d < padded_head; d += 32)
                _mm512_storeu_si512(
                    q_ + i * padded_head + d,
                    i < count ? _mm512_maskz_loadu_epi16(first_lanes32(D - d), q[i] + d) : _mm512_setzero_si512());
    }

    QFUSE_TARGET_AMX_BF16 __attribute__((noinline)) float* scores(int64_t first, int64_t count) {
        __asm__ volatile("" : : : "memory"); // GCC 12's `_tile_loadd` does not tell that it reads memory
        const uint16_t* k = k_.data() + first * padded_head;
        for (int64_t key = 0; key < count; key += 32) {
            if (count_ > 16)
                scores_of<true>(k + key * padded_head, scores_ + key);
            else
                scores_of<false>(k + key * padded_head, scores_ + key);
        }
        return scores_;
    }

    void weigh(const int64_t* seen, int64_t count, float factor, bool is_first, Known& known, float* sums) {
        weigh_rows<Weights>(scores_, score_stride, count_, seen, count, factor, is_first, known, sums, padded_head);
    }

    // sums (+)= weights · values, [rows][padded_head]
    QFUSE_TARGET_AMX_BF16 __attribute__((noinline)) void add(
        int64_t first, int64_t count, bool is_first, float* sums) const {
        __asm__ volatile("" : : : "memory");
        const uint16_t* v = v_.data() + first * padded_head;
        for (int64_t d = 0; d < padded_head; d += 32) {
            if (count_ > 16)
                add_to<true>(v + 32 * d, count, is_first, sums + d);
            else
                add_to<false>(v + 32 * d, count, is_first, sums + d);
        }
    }

    QFUSE_TARGET_AMX_BF16 void store(const float* sums, float factor, T* out) const {
        for (int64_t d = 0; d < D; d += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(factor));
            _mm256_mask_storeu_epi16(out + d, first_lanes16(D - d), (__m256i)_mm512_cvtneps_pbh(x));
        }
    }

 private:
    Buffer<uint16_t> k_, v_;
    int64_t count_ = 0;
    alignas(64) uint16_t q_[rows * padded_head];
    alignas(64) float scores_[rows * score_stride];

    static __mmask32 first_lanes32(int64_t count) {
        return count >= 32 ? 0xffffffff : (1u << std::max<int64_t>(0, count)) - 1;
    }

    // A tile of keys: 16 rows of 16 pairs, transposed.
    QFUSE_TARGET_AMX_BF16 static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t d, uint16_t* out) {
        __m512i a[16];
        const __mmask32 lanes = first_lanes32(d);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i)
            a[i] = i < count ? _mm512_maskz_loadu_epi16(lanes, k + i * stride) : _mm512_setzero_si512();
        transpose(a);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i)
            _mm512_storeu_si512(out + 32 * i, a[i]);
    }

    // Two tiles of values: pairs of rows, interleaved.
    QFUSE_TARGET_AMX_BF16 static void pack_values(const T* v, int64_t stride, int64_t count, int64_t d, uint16_t* out) {
        const __mmask32 lanes = first_lanes32(d);
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int64_t i = 0; i < 32; i += 2) {
            const __m512i a = i < count ? _mm512_maskz_loadu_epi16(lanes, v + i * stride) : _mm512_setzero_si512();
            const __m512i b = i + 1 < count ? _mm512_maskz_loadu_epi16(lanes, v + (i + 1) * stride) : _mm512_setzero_si512();
            const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
            _mm512_storeu_si512(out + 16 * i, _mm512_permutex2var_epi64(low, first, high));
            _mm512_storeu_si512(out + 16 * i + 512, _mm512_permutex2var_epi64(low, second, high));
        }
    }

    // Up to 32 rows by 32 keys.
    template <bool has_two>
    QFUSE_TARGET_AMX_BF16 __attribute__((always_inline)) inline void scores_of(const uint16_t* k, float* out) const {
        _tile_zero(0);
        _tile_zero(1);
        if (has_two) {
            _tile_zero(2);
            _tile_zero(3);
        }
#pragma GCC unroll 8
        for (int64_t d = 0; d < padded_head; d += 32) {
            _tile_loadd(4, q_ + d, 2 * padded_head);
            _tile_loadd(6, k + 16 * d, 64);
            _tile_loadd(7, k + 16 * (d + padded_head), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (has_two) {
                _tile_loadd(5, q_ + 16 * padded_head + d, 2 * padded_head);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out, 4 * score_stride);
        _tile_stored(1, out + 16, 4 * score_stride);
        if (has_two) {
            _tile_stored(2, out + 16 * score_stride, 4 * score_stride);
            _tile_stored(3, out + 16 * score_stride + 16, 4 * score_stride);
        }
    }

    // Up to 32 rows by 32 columns.
    template <bool has_two>
    QFUSE_TARGET_AMX_BF16 __attribute__((always_inline)) inline void add_to(
        const uint16_t* v, int64_t count, bool is_first, float* sums) const {
        constexpr int64_t stride = 4 * padded_head;
        if (is_first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, stride);
            _tile_loadd(1, sums + 16, stride);
            if (has_two) {
                _tile_loadd(2, sums + 16 * padded_head, stride);
                _tile_loadd(3, sums + 16 * padded_head + 16, stride);
            }
        }
        const auto* weights = reinterpret_cast<const uint16_t*>(scores_);
        for (int64_t key = 0; key < count; key += 32) {
            _tile_loadd(4, weights + key, 4 * score_stride);
            _tile_loadd(6, v + key * padded_head, 64);
            _tile_loadd(7, v + key * padded_head + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (has_two) {
                _tile_loadd(5, weights + key + 32 * score_stride, 4 * score_stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums, stride);
        _tile_stored(1, sums + 16, stride);
        if (has_two) {
            _tile_stored(2, sums + 16 * padded_head, stride);
            _tile_stored(3, sums + 16 * padded_head + 16, stride);
        }
    }

    // In place: they are half as wide as scores. AMX reads 32 at a time.
    struct Weights {
        QFUSE_TARGET_AMX_BF16 static __m512 of(float* scores, int64_t seen, int64_t count, float from, float factor) {
            // The product is rounded, and may leave the range of float, where the difference is small: rows that are masked by
            // −1e10 or the least float.
            return std::abs(from * factor) < 1e3f ? of<false>(scores, seen, count, from * factor, factor)
                                                   : of<true>(scores, seen, count, from, factor);
        }

     private:
        template <bool is_large>
        QFUSE_TARGET_AMX_BF16 __attribute__((always_inline)) static inline __m512 of(
            float* scores, int64_t seen, int64_t count, float from, float factor) {
            const __m512 subtracted = _mm512_set1_ps(from), by = _mm512_set1_ps(factor);
            const auto weights = [=](int64_t j) QFUSE_TARGET_AMX_BF16 {
                const __m512 s = _mm512_loadu_ps(scores + j);
                return power_of_2<3>(
                    is_large ? _mm512_mul_ps(_mm512_sub_ps(s, subtracted), by) : _mm512_fmsub_ps(s, by, subtracted));
            };
            auto* out = reinterpret_cast<uint16_t*>(scores);
            __m512 sum_a = _mm512_setzero_ps(), sum_b = sum_a;
            int64_t j = 0;
            for (; j + 32 <= seen; j += 32) {
                const __m512 a = weights(j), b = weights(j + 16);
                sum_a = _mm512_add_ps(sum_a, a);
                sum_b = _mm512_add_ps(sum_b, b);
                _mm512_storeu_si512(out + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
            for (; j < count; j += 32) {
                const __m512 a = _mm512_maskz_mov_ps(first_lanes16(seen - j), weights(j));
                const __m512 b = _mm512_maskz_mov_ps(first_lanes16(seen - j - 16), weights(j + 16));
                sum_a = _mm512_add_ps(sum_a, a);
                sum_b = _mm512_add_ps(sum_b, b);
                _mm512_storeu_si512(out + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
            return _mm512_add_ps(sum_a, sum_b);
        }
    };
};

} // namespace qfuse
#endif
