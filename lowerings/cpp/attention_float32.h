// Attention by AVX-512 or AVX2, in float32 whatever the operands are. Keys and values are packed as float32, in panels of P
// keys, [key / P][d][key % P], and of P columns, [d / P][key][d % P], where P is two vectors.
#ifndef QFUSE_ATTENTION_FLOAT32
#define QFUSE_ATTENTION_FLOAT32
namespace qfuse {
namespace {

// A block of rows is multiplied in tiles of rows by two vectors, which begin and end here: by AVX-512, the sums of 8 rows are half of the
// registers, by AVX2 those of 6 are most of them.
constexpr int64_t tile_bounds[] = {0, lanes == 16 ? 8 : 6, lanes == 16 ? 16 : 11, 16};
// In float32, sums are of so many products, and then added up: as in MKL on Zen 4 by AVX-512, where one sum of 256 was 1.5 times
// as inexact. By AVX2, with sums of 64, few keys are up to 1.2 times as inexact as ATen's, and with one sum 1.8 times.
constexpr int64_t products_of_sum = lanes == 16 ? 16 : 32;
// Of keys that are packed, and as many of values.
constexpr int64_t packed_floats = lanes == 16 ? 65536 : 32768;

template <typename T, int64_t D>
class Float32Attention {
 public:
    using Element = T;
    static constexpr int64_t rows = 16;
    static constexpr int64_t panel = 2 * lanes;
    static constexpr int64_t padded_head = (D + panel - 1) / panel * panel;
    static constexpr int64_t window = std::max<int64_t>(1, packed_floats / padded_head / keys_at_once) * keys_at_once;

    explicit Float32Attention(int64_t all_keys)
        : capacity_(std::min(window, ceil_div(all_keys, panel) * panel)), k_(capacity_ * D), v_(capacity_ * padded_head) {}

    QFUSE_TARGET_VECTORS void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count) {
        for (int64_t key = 0; key < ceil_div(count, panel) * panel; key += lanes)
            for (int64_t d = 0; d < D; d += lanes)
                pack_keys(
                    k + key * k_stride + d, k_stride, count - key, D - d,
                    k_.data() + key / panel * panel * D + d * panel + key % panel);
        for (int64_t d = 0; d < padded_head; d += lanes)
            for (int64_t key = 0; key < count; ++key)
                store_lanes(
                    v_.data() + d / panel * panel * capacity_ + key * panel + d % panel,
                    load_first(v + key * v_stride + d, D - d));
    }

    QFUSE_TARGET_VECTORS void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t d = 0; d < D; d += lanes)
                store_lanes(q_[i] + d, i < count ? load_first(q[i] + d, D - d) : Floats{});
    }

    float* scores(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += panel)
            multiply_rows(q_[0], padded_head, k_.data() + (first + key) * D, D, true, scores_[0] + key, score_stride);
        return scores_[0];
    }

    void weigh(
        const int64_t* seen, int64_t count, float factor, bool is_first, AttentionRows<rows>& known, float* sums) {
        weigh_rows<FloatWeights<sizeof(T) == 4 ? 6 : 4>>(
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
    alignas(64) float q_[rows][padded_head];
    alignas(64) float scores_[rows][score_stride];

    // As many keys and columns as lanes, transposed; of what is missing, zeros.
    QFUSE_TARGET_VECTORS static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t columns, float* out) {
        Floats a[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
            a[i] = i < count ? load_first(k + i * stride, columns) : Floats{};
        transpose(a);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
            if (i < columns)
                store_lanes(out + i * panel, a[i]);
    }

    // out[16][panel] (+)= a[16][depth] · b[depth][panel]: the tiles of rows in which there are some.
    template <int tile = 0>
    void multiply_rows(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) const {
        constexpr int64_t first = tile_bounds[tile], end = tile_bounds[tile + 1];
        multiply<end - first>(a + first * a_stride, a_stride, b, depth, is_first, out + first * out_stride, out_stride);
        if constexpr (end < rows)
            if (count_ > end)
                multiply_rows<tile + 1>(a, a_stride, b, depth, is_first, out, out_stride);
    }

    // A tile of R rows. Not added up in `out` one by one: shorter sums are more exact. In float32, sums of some products are added
    // up first, and that to `out`.
    template <int R>
    QFUSE_TARGET_VECTORS static void multiply(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) {
        if constexpr (sizeof(T) < 4)
            return multiply_part<R>(a, a_stride, b, depth, is_first, out, out_stride);
        alignas(64) float sums[R][panel];
        float* const to = is_first ? out : sums[0];
        for (int64_t k = 0; k < depth; k += products_of_sum)
            multiply_part<R>(
                a + k, a_stride, b + k * panel, std::min(products_of_sum, depth - k), k == 0, to,
                is_first ? out_stride : panel);
        if (is_first)
            return;
        for (int64_t i = 0; i < R; ++i)
            for (int64_t j = 0; j < panel; j += lanes) {
                float* const sum = out + i * out_stride + j;
                store_lanes(sum, load_lanes(sum) + load_lanes(sums[i] + j));
            }
    }

    template <int R>
    QFUSE_TARGET_VECTORS __attribute__((noinline)) static void multiply_part(
        const float* a, int64_t a_stride, const float* b, int64_t depth, bool is_first, float* out, int64_t out_stride) {
        Sums<R> sums;
        clear<R>(sums);
        for (int64_t k = 0; k < depth; ++k, b += panel) {
            const Floats left = load_lanes(b), right = load_lanes(b + lanes);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                const Floats one = broadcast(a[i * a_stride + k]);
                sums[i][0] = multiply_add(one, left, sums[i][0]);
                sums[i][1] = multiply_add(one, right, sums[i][1]);
            }
        }
        add_sums<R>(sums, is_first, out, out_stride);
    }
};

} // namespace
} // namespace qfuse
#endif
