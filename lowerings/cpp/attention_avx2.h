// Attention by AVX2, in float32 whatever the operands are. Keys and values are packed as float32, in panels of 16 keys,
// [key / 16][d][key % 16], and of 16 columns, [d / 16][key][d % 16].
#ifndef QFUSE_ATTENTION_AVX2
#define QFUSE_ATTENTION_AVX2
namespace qfuse {

template <typename T, int64_t D>
class Avx2Attention {
 public:
    using Element = T;
    static constexpr int64_t rows = 16;
    static constexpr int64_t keys = 256;
    static constexpr int64_t panel = 16;
    static constexpr int64_t padded_head = (D + panel - 1) / panel * panel;
    static constexpr int64_t window = std::max<int64_t>(1, 32768 / padded_head / keys) * keys;
    static constexpr int64_t score_stride = keys + 16; // not a power of two: rows are in different sets of the cache
    using Known = AttentionRows<rows>;

    explicit Avx2Attention(int64_t all_keys)
        : capacity_(std::min(window, ceil_div(all_keys, panel) * panel)), k_(capacity_ * D), v_(capacity_ * padded_head) {}

    QFUSE_TARGET_AVX2_FMA void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count) {
        for (int64_t key = 0; key < ceil_div(count, panel) * panel; key += 8)
            for (int64_t d = 0; d < D; d += 8)
                pack_keys(
                    k + key * k_stride + d, k_stride, count - key, D - d,
                    k_.data() + key / panel * panel * D + d * panel + key % panel);
        for (int64_t d = 0; d < padded_head; d += 8)
            for (int64_t key = 0; key < count; ++key)
                _mm256_store_ps(
                    v_.data() + d / panel * panel * capacity_ + key * panel + d % panel,
                    load_floats(v + key * v_stride + d, D - d));
    }

    QFUSE_TARGET_AVX2_FMA void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t d = 0; d < D; d += 8)
                _mm256_store_ps(q_[i] + d, i < count ? load_floats(q[i] + d, D - d) : _mm256_setzero_ps());
    }

    float* scores(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += panel)
            multiply_rows(q_[0], padded_head, k_.data() + (first + key) * D, D, true, scores_[0] + key, score_stride);
        return scores_[0];
    }

    void weigh(const int64_t* seen, int64_t count, float factor, bool is_first, Known& known, float* sums) {
        weigh_rows<sizeof(T) == 4 ? 6 : 4>(
            scores_[0], score_stride, count_, seen, count, factor, is_first, known, sums, padded_head);
    }

    void add(int64_t first, int64_t count, bool is_first, float* sums) const {
        for (int64_t d = 0; d < padded_head; d += panel)
            multiply_rows(
                scores_[0], score_stride, v_.data() + d * capacity_ + first * panel, count, is_first, sums + d, padded_head);
    }

    void store(const float* sums, float factor, T* out) const { store_multiplied<D>(sums, factor, out); }

 private:
    const int64_t capacity_;
    Buffer<float> k_, v_;
    int64_t count_ = 0;
    alignas(32) float q_[rows][padded_head];
    alignas(32) float scores_[rows][score_stride];

    // 8 keys and columns, transposed; of what is missing, zeros.
    QFUSE_TARGET_AVX2_FMA static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t columns, float* out) {
        __m256 a[8];
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i)
            a[i] = i < count ? load_floats(k + i * stride, columns) : _mm256_setzero_ps();
        transpose(a);
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i)
            if (i < columns)
                _mm256_store_ps(out + i * panel, a[i]);
    }

    // out[16][16] (+)= a[16][depth] · b[depth][16]: as many rows as there are, or some more. 6, 5 and 5 at once, because 6 rows of two
    // vectors are what 16 registers hold.
    void multiply_rows(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) const {
        multiply<6>(a, a_stride, b, depth, is_first, out, out_stride);
        if (count_ > 6)
            multiply<5>(a + 6 * a_stride, a_stride, b, depth, is_first, out + 6 * out_stride, out_stride);
        if (count_ > 11)
            multiply<5>(a + 11 * a_stride, a_stride, b, depth, is_first, out + 11 * out_stride, out_stride);
    }

    // Not added up in `out` one by one: shorter sums are more exact. In float32, sums of 32 products are added up first, and that to
    // `out`: of 64, few keys are up to 1.2 times as inexact as ATen's, and one sum of all up to 1.8 times.
    template <int R>
    QFUSE_TARGET_AVX2_FMA static void multiply(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) {
        if (sizeof(T) < 4)
            return multiply_part<R>(a, a_stride, b, depth, is_first, out, out_stride);
        alignas(32) float sums[R][panel];
        float* const to = is_first ? out : sums[0];
        for (int64_t k = 0; k < depth; k += 32)
            multiply_part<R>(
                a + k, a_stride, b + k * panel, std::min<int64_t>(32, depth - k), k == 0, to, is_first ? out_stride : panel);
        if (is_first)
            return;
        for (int64_t i = 0; i < R; ++i)
            for (int64_t j = 0; j < panel; j += 8) {
                float* const sum = out + i * out_stride + j;
                _mm256_store_ps(sum, _mm256_add_ps(_mm256_load_ps(sum), _mm256_load_ps(sums[i] + j)));
            }
    }

    template <int R>
    QFUSE_TARGET_AVX2_FMA __attribute__((noinline)) static void multiply_part(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) {
        __m256 sums[R][2];
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i)
            sums[i][0] = sums[i][1] = _mm256_setzero_ps();
        for (int64_t k = 0; k < depth; ++k, b += panel) {
            const __m256 left = _mm256_load_ps(b), right = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
            for (int i = 0; i < R; ++i) {
                const __m256 one = _mm256_broadcast_ss(a + i * a_stride + k);
                sums[i][0] = _mm256_fmadd_ps(one, left, sums[i][0]);
                sums[i][1] = _mm256_fmadd_ps(one, right, sums[i][1]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                float* const to = out + i * out_stride + 8 * j;
                _mm256_store_ps(to, is_first ? sums[i][j] : _mm256_add_ps(_mm256_load_ps(to), sums[i][j]));
            }
    }
};

} // namespace qfuse
#endif
