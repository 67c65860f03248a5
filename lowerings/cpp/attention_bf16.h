// What the kernels of attention in bfloat16 share, `attention_amx.h` and `attention_avx512_bf16.h`: packing, and weights that
// are rounded to bfloat16, as in ATen.
//
// Keys are packed [key / 16][d / 32][d / 2 % 16][key % 16][d % 2], values [key / 32][d / 16][key / 2 % 16][d % 16][key % 2]:
// tiles of AMX, one after the other, whose rows are vectors of AVX-512. What is missing to whole tiles is zero.
#ifndef QFUSE_ATTENTION_BF16
#define QFUSE_ATTENTION_BF16
#define QFUSE_TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
namespace qfuse {
namespace {

template <typename T, int64_t D>
class Bf16Attention {
    static_assert(std::is_same_v<T, at::BFloat16>);

 public:
    using Element = T;
    static constexpr int64_t rows = 32;
    static constexpr int64_t padded_head = (D + 31) / 32 * 32;
    static constexpr int64_t window = 131072 / padded_head / keys_at_once * keys_at_once;

    explicit Bf16Attention(int64_t all_keys)
        : k_(std::min(window, ceil_div(all_keys, 32) * 32) * padded_head),
          v_(std::min(window, ceil_div(all_keys, 32) * 32) * padded_head) {}

    QFUSE_TARGET_BF16 void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count) {
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

    QFUSE_TARGET_BF16 void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < ceil_div(count, 16) * 16; ++i)
            for (int64_t d = 0; d < padded_head; d += 32)
                _mm512_storeu_si512(
                    q_ + i * padded_head + d,
                    i < count ? _mm512_maskz_loadu_epi16(first_lanes32(D - d), q[i] + d) : _mm512_setzero_si512());
    }

    void weigh(
        const int64_t* seen, int64_t count, float factor, bool is_first, AttentionRows<rows>& known, float* sums) {
        weigh_rows<Weights>(scores_, score_stride, count_, seen, count, factor, is_first, known, sums, padded_head);
    }

    QFUSE_TARGET_BF16 void store(const float* sums, float factor, T* out) const {
        for (int64_t d = 0; d < D; d += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(factor));
            _mm256_mask_storeu_epi16(out + d, first_lanes16(D - d), (__m256i)_mm512_cvtneps_pbh(x));
        }
    }

 protected:
    Buffer<uint16_t> k_, v_;
    int64_t count_ = 0;
    alignas(64) uint16_t q_[rows * padded_head];
    alignas(64) float scores_[rows * score_stride];

 private:
    static __mmask32 first_lanes32(int64_t count) {
        return count >= 32 ? 0xffffffff : (1u << std::max<int64_t>(0, count)) - 1;
    }

    // A tile of keys: 16 rows of 16 pairs, transposed.
    QFUSE_TARGET_BF16 static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t d, uint16_t* out) {
        __m512i a[16];
        const __mmask32 mask = first_lanes32(d);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i)
            a[i] = i < count ? _mm512_maskz_loadu_epi16(mask, k + i * stride) : _mm512_setzero_si512();
        transpose(a);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i)
            _mm512_storeu_si512(out + 32 * i, a[i]);
    }

    // Two tiles of values: pairs of rows, interleaved.
    QFUSE_TARGET_BF16 static void pack_values(const T* v, int64_t stride, int64_t count, int64_t d, uint16_t* out) {
        const __mmask32 mask = first_lanes32(d);
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int64_t i = 0; i < 32; i += 2) {
            const __m512i a = i < count ? _mm512_maskz_loadu_epi16(mask, v + i * stride) : _mm512_setzero_si512();
            const __m512i b = i + 1 < count ? _mm512_maskz_loadu_epi16(mask, v + (i + 1) * stride) : _mm512_setzero_si512();
            const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
            _mm512_storeu_si512(out + 16 * i, _mm512_permutex2var_epi64(low, first, high));
            _mm512_storeu_si512(out + 16 * i + 512, _mm512_permutex2var_epi64(low, second, high));
        }
    }

    // In place: they are half as wide as scores. 32 are read at a time.
    struct Weights {
        QFUSE_TARGET_BF16 static __m512 of(float* scores, int64_t seen, int64_t count, float from, float factor) {
            // The product is rounded, and may leave the range of float, where the difference is small: rows that are masked by
            // −1e10 or the least float.
            return std::abs(from * factor) < 1e3f ? of<false>(scores, seen, count, from * factor, factor)
                                                   : of<true>(scores, seen, count, from, factor);
        }

     private:
        template <bool is_large>
        QFUSE_TARGET_BF16 __attribute__((always_inline)) static inline __m512 of(
            float* scores, int64_t seen, int64_t count, float from, float factor) {
            const __m512 subtracted = _mm512_set1_ps(from), by = _mm512_set1_ps(factor);
            const auto weights = [=](int64_t j) QFUSE_TARGET_BF16 {
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

} // namespace
} // namespace qfuse
#endif
