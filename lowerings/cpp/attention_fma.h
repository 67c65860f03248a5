// Attention in float32, on the vectors of `at::vec`: for float32 operands, and for CPUs without AMX. Weights are not rounded.
//
// Keys are packed [key / keys][d][key % keys], values [key][d], both filled up with zeros to whole vectors, so that scores
// and sums are one kind of product, of tiles that stay in the registers.
#ifndef QFUSE_ATTENTION_FMA
#define QFUSE_ATTENTION_FMA
namespace qfuse {

template <typename T, int64_t D>
class FmaAttention {
    using Vec = at::vec::Vectorized<float>;
    static constexpr int64_t lanes = Vec::size();
    // With 32 registers a tile has 24 sums, with 16 it has 12.
#if defined(CPU_CAPABILITY_AVX512)
    static constexpr int64_t registers = 32;
#else
    static constexpr int64_t registers = 16;
#endif

 public:
    using Element = T;
    static constexpr int64_t rows = 24;
    static constexpr int64_t keys = 256;
    static constexpr int64_t score_stride = keys + 16; // not a power of two: rows are in different sets of the cache
    static constexpr float log_of_e = 1;
    static constexpr int64_t padded_head = (D + lanes - 1) / lanes * lanes;
    static constexpr int64_t window = std::max<int64_t>(1, 65536 / padded_head / keys) * keys;
    using Known = AttentionRows<rows>;

    explicit FmaAttention(int64_t all_keys)
        : k_(std::min(window, ceil_div(all_keys, keys) * keys) * D), v_(std::min(window, all_keys) * padded_head) {}

    void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count) {
        alignas(64) float some[lanes * padded_head];
        for (int64_t key = 0; key < ceil_div(count, lanes) * lanes; key += lanes) {
            for (int64_t i = 0; i < lanes; ++i)
                for (int64_t d = 0; d < padded_head; d += lanes) {
                    const bool is_there = key + i < count;
                    (is_there ? loaded(k + (key + i) * k_stride + d, D - d) : Vec(0)).store(some + i * padded_head + d);
                    if (is_there)
                        loaded(v + (key + i) * v_stride + d, D - d).store(v_.data() + (key + i) * padded_head + d);
                }
            float* to = k_.data() + key / keys * keys * D + key % keys;
            for (int64_t d = 0; d < D; d += lanes)
                at::vec::transpose_mxn<float>(
                    some + d, padded_head, to + d * keys, keys, lanes, std::min<int64_t>(lanes, D - d));
        }
    }

    void load(const T* const* q, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t d = 0; d < padded_head; d += lanes)
                loaded(q[i] + d, D - d).store(q_ + i * padded_head + d);
    }

    float* scores(int64_t first, int64_t count) {
        product(q_, padded_head, D, k_.data() + first * D, keys, ceil_div(count, lanes), true, scores_, score_stride);
        return scores_;
    }

    template <typename M>
    void scale(float* scores, float by, const M* mask, int64_t mask_stride, int64_t count) const {
        for (int64_t j = 0; j < count; j += lanes) {
            Vec s = Vec::loadu(scores + j) * Vec(by);
            if (mask != nullptr)
                s = s + (mask_stride == 0 ? Vec(static_cast<float>(*mask)) : loaded(mask + j, count - j));
            s.store(scores + j);
        }
    }

    // See `attention.h`.
    void weigh(const int64_t* seen, int64_t count, float factor, bool is_first, Known& known, float* sums) {
        const Vec by(factor);
        for (int64_t i = 0; i < count_; ++i) {
            float* s = scores_ + i * score_stride;
            const int64_t end = ceil_div(count, lanes) * lanes;
            std::fill(s + seen[i], s + end, -INFINITY);
            Vec most(-INFINITY);
            for (int64_t j = 0; j < seen[i]; j += lanes)
                most = at::vec::maximum(most, Vec::loadu(s + j));
            const float before = is_first ? -INFINITY : known.largest[i];
            const float largest = std::max(before, at::vec::vec_reduce_all<float>(maximum, most));
            const Vec from(largest == -INFINITY ? 0.0f : largest); // where all scores are −∞, the weights are 0
            Vec sum(0);
            for (int64_t j = 0; j < end; j += lanes) {
                const Vec weight = exp((Vec::loadu(s + j) - from) * by);
                weight.store(s + j);
                sum = sum + weight;
            }
            float all = at::vec::vec_reduce_all<float>(plus, sum);
            if (!is_first) {
                const Vec change = exp((Vec(before) - from) * by);
                alignas(64) float changes[lanes];
                change.store(changes);
                all += known.sum[i] * changes[0];
                if (changes[0] != 1)
                    for (int64_t d = 0; d < padded_head; d += lanes)
                        (Vec::loadu(sums + i * padded_head + d) * change).store(sums + i * padded_head + d);
            }
            known.largest[i] = largest;
            known.sum[i] = all;
        }
    }

    void add(int64_t first, int64_t count, bool is_first, float* sums) const {
        product(
            scores_, score_stride, count, v_.data() + first * padded_head, padded_head, padded_head / lanes, is_first,
            sums, padded_head);
    }

    void store(const float* sums, float factor, T* out) const {
        for (int64_t d = 0; d < D; d += lanes) {
            const at::vec::VectorizedN<float, 1> x = Vec::loadu(sums + d) * Vec(factor);
            const int count = static_cast<int>(std::min<int64_t>(lanes, D - d));
            if constexpr (std::is_same_v<T, float>)
                x.store(out + d, count);
            else
                at::vec::convert<T, 1, float, 1>(x).store(out + d, count);
        }
    }

 private:
    Buffer<float> k_, v_;
    int64_t count_ = 0;
    alignas(64) float q_[rows * padded_head];
    alignas(64) float scores_[rows * score_stride];

    static Vec maximum(const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }
    static Vec plus(const Vec& a, const Vec& b) { return a + b; }

    // Up to a vector of what is there; the rest is 0.
    template <typename U>
    static Vec loaded(const U* from, int64_t count) {
        const int some = static_cast<int>(std::clamp<int64_t>(count, 0, lanes));
        if constexpr (std::is_same_v<U, float>)
            return some == lanes ? Vec::loadu(from) : Vec::loadu(from, some);
        else
            return at::vec::convert<float, 1, U, 1>(at::vec::VectorizedN<U, 1>::loadu(from, some));
    }

    // c = (c +) a · b, for all rows. a: [rows][k], b: [k][vectors], c: [rows][vectors].
    void product(
        const float* a, int64_t a_stride, int64_t k, const float* b, int64_t b_stride, int64_t vectors, bool is_first,
        float* c, int64_t c_stride) const {
        // One sum after the other is less exact than sums of sums, as soon as the result is not rounded anyway.
        const int64_t part = std::is_same_v<T, float> ? 32 : k;
        for (int64_t at = 0; at < k; at += part, is_first = false)
            product_of_part(
                a + at, a_stride, std::min(part, k - at), b + at * b_stride, b_stride, vectors, is_first, c, c_stride);
    }

    void product_of_part(
        const float* a, int64_t a_stride, int64_t k, const float* b, int64_t b_stride, int64_t vectors, bool is_first,
        float* c, int64_t c_stride) const {
        constexpr int wide = registers / 8;
        int64_t j = 0;
        for (; j + wide <= vectors; j += wide)
            columns<6, wide>(a, a_stride, k, b + j * lanes, b_stride, is_first, c + j * lanes, c_stride);
        for (; j + 2 <= vectors; j += 2)
            columns<3 * wide, 2>(a, a_stride, k, b + j * lanes, b_stride, is_first, c + j * lanes, c_stride);
        for (; j < vectors; ++j)
            columns<3 * wide, 1>(a, a_stride, k, b + j * lanes, b_stride, is_first, c + j * lanes, c_stride);
    }

    template <int ROWS, int VECTORS>
    void columns(
        const float* a, int64_t a_stride, int64_t k, const float* b, int64_t b_stride, bool is_first, float* c,
        int64_t c_stride) const {
        int64_t i = 0;
        for (; i + ROWS <= count_; i += ROWS)
            tile<ROWS, VECTORS>(a + i * a_stride, a_stride, k, b, b_stride, is_first, c + i * c_stride, c_stride);
        for (; i + 4 <= count_; i += 4)
            tile<4, VECTORS>(a + i * a_stride, a_stride, k, b, b_stride, is_first, c + i * c_stride, c_stride);
        for (; i < count_; ++i)
            tile<1, VECTORS>(a + i * a_stride, a_stride, k, b, b_stride, is_first, c + i * c_stride, c_stride);
    }

    template <int ROWS, int VECTORS>
    __attribute__((noinline)) static void tile(
        const float* a, int64_t a_stride, int64_t k, const float* b, int64_t b_stride, bool is_first, float* c,
        int64_t c_stride) {
        Vec sums[ROWS][VECTORS];
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                sums[i][j] = Vec(0);
        for (int64_t at = 0; at < k; ++at, b += b_stride) {
            Vec column[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                column[j] = Vec::loadu(b + j * lanes);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                const Vec row(a[i * a_stride + at]);
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j)
                    sums[i][j] = at::vec::fmadd(row, column[j], sums[i][j]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) {
                float* to = c + i * c_stride + j * lanes;
                (is_first ? sums[i][j] : sums[i][j] + Vec::loadu(to)).store(to);
            }
    }
};

} // namespace qfuse
#endif
