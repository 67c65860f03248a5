// Attention of a few queries by AVX-512 or AVX2, in float32 whatever the operands are: keys and values are read once, where
// they lie, as in decoding.
#ifndef QFUSE_ATTENTION_FEW_QUERIES
#define QFUSE_ATTENTION_FEW_QUERIES
namespace qfuse {
namespace {

// Of a value, as many vectors at a time that their sums for four rows are half of the registers.
constexpr int64_t value_vectors = lanes == 16 ? 4 : 2;

// See `attention.h`.
template <typename T, int64_t D>
class FewQueriesAttention {
 public:
    using Element = T;
    static constexpr int64_t rows = 8;
    static constexpr int64_t window = int64_t{1} << 40; // nothing is packed
    static constexpr int64_t padded_head = (D + lanes - 1) / lanes * lanes;

    explicit FewQueriesAttention(int64_t) {}

    void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t) {
        k_ = k, k_stride_ = k_stride, v_ = v, v_stride_ = v_stride;
    }

    QFUSE_TARGET_VECTORS void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t d = 0; d < D; d += lanes)
                store_lanes(q_[i] + d, load_first(q[i] + d, D - d));
    }

    QFUSE_TARGET_VECTORS float* scores(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += lanes) {
            const T* k = k_ + (first + key) * k_stride_;
            const int64_t some = std::min(lanes, count - key);
            int64_t row = 0;
            for (; row + 4 <= count_; row += 4)
                multiply<4>(k, some, row);
            switch (count_ - row) {
                case 3: multiply<3>(k, some, row); break;
                case 2: multiply<2>(k, some, row); break;
                case 1: multiply<1>(k, some, row); break;
            }
            for (row = 0; row < count_; ++row)
                store_lanes(scores_ + row * score_stride + key, reduced(products_[row], Sum()));
        }
        return scores_;
    }

    void weigh(
        const int64_t* seen, int64_t count, float factor, bool is_first, AttentionRows<rows>& known, float* sums) {
        weigh_rows<FloatWeights<4>>(scores_, score_stride, count_, seen, count, factor, is_first, known, sums, padded_head);
    }

    QFUSE_TARGET_VECTORS void add(int64_t first, int64_t count, bool is_first, float* sums) const {
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

    void store(const float* sums, float factor, T* out) const { store_multiplied<D>(sums, factor, out); }

 private:
    const T *k_ = nullptr, *v_ = nullptr;
    int64_t k_stride_ = 0, v_stride_ = 0, count_ = 0;
    alignas(64) float q_[rows][padded_head];
    alignas(64) float products_[rows][lanes][lanes]; // of a row and a key, to be summed up
    alignas(64) float scores_[rows * score_stride];

    // Whether some elements from `d` on begin a line of the cache.
    static bool begins_line(int64_t d) { return d * sizeof(T) % 64 == 0; }

    // R rows and up to as many keys as lanes.
    template <int R>
    QFUSE_TARGET_VECTORS __attribute__((noinline)) void multiply(const T* k, int64_t count, int64_t row) {
        for (int64_t key = 0; key < count; ++key, k += k_stride_) {
            Floats sums[R];
#pragma GCC unroll 4
            for (int i = 0; i < R; ++i)
                sums[i] = Floats{};
#pragma GCC unroll 16
            for (int64_t d = 0; d < D; d += lanes) {
                if (begins_line(d)) // the rows of 16 keys on: they may be far from each other
                    _mm_prefetch(reinterpret_cast<const char*>(k + 16 * k_stride_ + d), _MM_HINT_T0);
                const Floats of_key = load_first(k + d, D - d);
#pragma GCC unroll 4
                for (int i = 0; i < R; ++i)
                    sums[i] = multiply_add(of_key, load_lanes(q_[row + i] + d), sums[i]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < R; ++i)
                store_lanes(products_[row + i][key], sums[i]);
        }
    }

    // R rows and all columns, some vectors at a time.
    template <int R>
    QFUSE_TARGET_VECTORS __attribute__((noinline)) void add_to(const T* v, int64_t count, int64_t row, float* sums) const {
        constexpr int64_t columns = value_vectors * lanes;
        for (int64_t d = 0; d < D; d += columns) {
            const auto is_column = [d](int64_t behind) { return D % columns == 0 || d + behind < D; };
            Floats acc[R][value_vectors];
#pragma GCC unroll 4
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < value_vectors; ++j)
                    acc[i][j] = Floats{};
            for (int64_t key = 0; key < count; ++key) {
#pragma GCC unroll 4
                for (int64_t j = 0; j < value_vectors; ++j) {
                    const int64_t at = d + j * lanes;
                    if (!is_column(j * lanes))
                        continue;
                    if (begins_line(at))
                        _mm_prefetch(reinterpret_cast<const char*>(v + (key + 16) * v_stride_ + at), _MM_HINT_T0);
                    const Floats value = load_first(v + key * v_stride_ + at, D - at);
#pragma GCC unroll 4
                    for (int i = 0; i < R; ++i)
                        acc[i][j] = multiply_add(value, broadcast(scores_[(row + i) * score_stride + key]), acc[i][j]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
                for (int64_t j = 0; j < value_vectors; ++j)
                    if (is_column(j * lanes)) {
                        float* to = sums + (row + i) * padded_head + d + j * lanes;
                        store_lanes(to, load_lanes(to) + acc[i][j]);
                    }
        }
    }
};

} // namespace
} // namespace qfuse
#endif
