// Attention by AVX-512, in float32 whatever the operands are. Keys and values are packed as float32, in panels of 32 keys,
// [key / 32][d][key % 32], and of 32 columns, [d / 32][key][d % 32].
#ifndef QFUSE_ATTENTION_AVX512
#define QFUSE_ATTENTION_AVX512
namespace qfuse {

template <typename T, int64_t D>
class Avx512Attention {
 public:
    using Element = T;
    static constexpr int64_t rows = 16;
    static constexpr int64_t keys = 256;
    static constexpr int64_t panel = 32;
    static constexpr int64_t padded_head = (D + panel - 1) / panel * panel;
    static constexpr int64_t window = 65536 / padded_head / keys * keys;
    static constexpr int64_t score_stride = keys + 16; // not a power of two: rows are in different sets of the cache
    using Known = AttentionRows<rows>;

    explicit Avx512Attention(int64_t all_keys)
        : capacity_(std::min(window, ceil_div(all_keys, panel) * panel)), k_(capacity_ * D), v_(capacity_ * padded_head) {}

    QFUSE_TARGET_AVX512 void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count) {
        for (int64_t key = 0; key < ceil_div(count, panel) * panel; key += 16)
            for (int64_t d = 0; d < D; d += 16)
                pack_keys(k + key * k_stride + d, k_stride, count - key, D - d, k_.data() + key / panel * panel * D + d * panel + key % panel);
        for (int64_t d = 0; d < padded_head; d += 16)
            for (int64_t key = 0; key < count; ++key)
                _mm512_store_ps(
                    v_.data() + d / panel * panel * capacity_ + key * panel + d % panel,
                    load_floats(v + key * v_stride + d, first_lanes16(D - d)));
    }

    QFUSE_TARGET_AVX512 void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t d = 0; d < D; d += 16)
                _mm512_store_ps(
                    q_[i] + d, i < count ? load_floats(q[i] + d, first_lanes16(D - d)) : _mm512_setzero_ps());
    }

    float* scores(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += panel)
            for (int64_t row = 0; row < count_; row += sums_rows)
                multiply(q_[row], padded_head, k_.data() + (first + key) * D, D, true, scores_[row] + key, score_stride);
        return scores_[0];
    }

    void weigh(const int64_t* seen, int64_t count, float factor, bool is_first, Known& known, float* sums) {
        weigh_rows<FloatWeights<sizeof(T) == 4 ? 6 : 4>>(
            scores_[0], score_stride, count_, seen, count, factor, is_first, known, sums, padded_head);
    }

    void add(int64_t first, int64_t count, bool is_first, float* sums) const {
        for (int64_t d = 0; d < padded_head; d += panel)
            for (int64_t row = 0; row < count_; row += sums_rows)
                multiply(
                    scores_[row], score_stride, v_.data() + d * capacity_ + first * panel, count, is_first,
                    sums + row * padded_head + d, padded_head);
    }

    void store(const float* sums, float factor, T* out) const { store_multiplied<D>(sums, factor, out); }

 private:
    const int64_t capacity_;
    Buffer<float> k_, v_;
    int64_t count_ = 0;
    alignas(64) float q_[rows][padded_head];
    alignas(64) float scores_[rows][score_stride];

    // 16 keys and columns, transposed; of what is missing, zeros.
    QFUSE_TARGET_AVX512 static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t columns, float* out) {
        __m512i a[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i)
            a[i] = i < count ? _mm512_castps_si512(load_floats(k + i * stride, first_lanes16(columns))) : _mm512_setzero_si512();
        transpose(a);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i)
            if (i < columns)
                _mm512_store_si512(out + i * panel, a[i]);
    }

    // out[8][32] (+)= a[8][depth] · b[depth][32]. Not added up in `out` one by one: shorter sums are more exact. In float32, sums
    // of 16 products are added up first, and that to `out`: where MKL does so (on Zen 4), one sum of all was up to 1.5 times as
    // inexact.
    QFUSE_TARGET_AVX512 static void multiply(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) {
        if (sizeof(T) < 4)
            return multiply_part(a, a_stride, b, depth, is_first, out, out_stride);
        alignas(64) float sums[sums_rows][panel];
        float* const to = is_first ? out : sums[0];
        for (int64_t k = 0; k < depth; k += 16)
            multiply_part(
                a + k, a_stride, b + k * panel, std::min<int64_t>(16, depth - k), k == 0, to, is_first ? out_stride : panel);
        if (is_first)
            return;
        for (int64_t i = 0; i < sums_rows; ++i)
            for (int64_t j = 0; j < panel; j += 16) {
                float* const sum = out + i * out_stride + j;
                _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_load_ps(sums[i] + j)));
            }
    }

    QFUSE_TARGET_AVX512 __attribute__((noinline)) static void multiply_part(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) {
        Sums sums;
        clear(sums);
        for (int64_t k = 0; k < depth; ++k, b += panel) {
            const __m512 left = _mm512_load_ps(b), right = _mm512_load_ps(b + 16);
#pragma GCC unroll 8
            for (int i = 0; i < sums_rows; ++i) {
                const __m512 one = _mm512_set1_ps(a[i * a_stride + k]);
                sums[i][0] = _mm512_fmadd_ps(one, left, sums[i][0]);
                sums[i][1] = _mm512_fmadd_ps(one, right, sums[i][1]);
            }
        }
        add_sums(sums, is_first, out, out_stride);
    }
};

} // namespace qfuse
#endif
