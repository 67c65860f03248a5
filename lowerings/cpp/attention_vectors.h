// What the kernels of attention share, by the registers of `attention_registers_*.h`.
#ifndef QFUSE_ATTENTION_VECTORS
#define QFUSE_ATTENTION_VECTORS
namespace qfuse {
namespace {

// D floats, times `by`.
template <int64_t D, typename T>
QFUSE_TARGET_VECTORS static inline void store_multiplied(const float* from, float by, T* to) {
    for (int64_t d = 0; d < D; d += lanes)
        store_first(to + d, D - d, load_lanes(from + d) * broadcast(by));
}

// R rows by 2 vectors of sums.
template <int R>
using Sums = Floats[R][2];

template <int R>
QFUSE_INLINE_VECTORS void clear(Sums<R>& sums) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
        sums[i][0] = sums[i][1] = Floats{};
}

// out (+)= sums. is_first: nothing stands in `out`.
template <int R>
QFUSE_INLINE_VECTORS void add_sums(const Sums<R>& sums, bool is_first, float* out, int64_t out_stride) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            float* to = out + i * out_stride + lanes * j;
            store_lanes(to, is_first ? sums[i][j] : load_lanes(to) + sums[i][j]);
        }
}

// The largest scores of each lane.
QFUSE_INLINE_VECTORS Floats largest_of(const float* scores, int64_t count) {
    const Maximum larger;
    const Floats least = broadcast(-INFINITY);
    Floats a = least, b = least;
    int64_t j = 0;
    for (; j + 2 * lanes <= count; j += 2 * lanes) {
        a = larger(load_lanes(scores + j), a);
        b = larger(load_lanes(scores + j + lanes), b);
    }
    if (j < count) {
        a = larger(load_first_or(least, scores + j, count - j), a);
        b = larger(load_first_or(least, scores + j + lanes, count - j - lanes), b);
    }
    return larger(a, b);
}

// Scores times `by`, plus a mask, rounded once, as ATen does: twice would be up to 1.15 times as inexact. mask: null if there
// is none; all of a mask with stride 0 is its first element.
template <typename M>
QFUSE_TARGET_VECTORS __attribute__((noinline)) static void scale_scores(
    float* scores, float by, const M* mask, int64_t mask_stride, int64_t count) {
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats added = mask == nullptr ? Floats{}
            : mask_stride == 0               ? broadcast(static_cast<float>(*mask))
                                             : load_first(mask + j, count - j);
        store_lanes(scores + j, multiply_add(load_lanes(scores + j), broadcast(by), added));
    }
}

// 2ˣ. 2⁰ and 2¹ are exact, NaN stays NaN, −∞ gives 0. Relatively within 1e-4 if the degree of the polynomial is 3, 4e-6 if it
// is 4, and 7e-8 if it is 6, if not for the rounding of x.
template <int degree>
QFUSE_INLINE_VECTORS Floats power_of_2(Floats x) {
    static_assert(degree == 3 || degree == 4 || degree == 6);
    constexpr float cubic[] = {0.07826797f, 0.22630768f, 0.69542435f, 1.0f};
    constexpr float quartic[] = {1.355574746e-2f, 5.203237012e-2f, 2.413797677e-1f, 6.930321455e-1f, 1.0f};
    constexpr float sextic[] = {2.171502565e-4f, 1.244087704e-3f, 9.678063914e-3f, 5.548415333e-2f,
                                2.402295172e-1f, 6.931470037e-1f, 1.0f};
    const float* const coefficients = degree == 3 ? cubic : degree == 4 ? quartic : sextic;
    x = bounded_exponent(x);
    const Floats f = behind_point(x);
    Floats p = broadcast(coefficients[0]);
#pragma GCC unroll 6
    for (int i = 1; i <= degree; ++i)
        p = multiply_add(p, f, broadcast(coefficients[i]));
    return times_power(p, x);
}

// Weights in float32, 2^((score − from) · factor), of one row: in place. Those from `seen` to `count` are 0. Return their sums
// in each lane.
template <int degree>
struct FloatWeights {
    QFUSE_TARGET_VECTORS static Floats of(float* scores, int64_t seen, int64_t count, float from, float factor) {
        const Floats subtracted = broadcast(from), by = broadcast(factor);
        const auto weights = [=](int64_t j) QFUSE_TARGET_VECTORS {
            return power_of_2<degree>((load_lanes(scores + j) - subtracted) * by);
        };
        Floats sum_a = {}, sum_b = sum_a;
        int64_t j = 0;
        for (; j + 2 * lanes <= seen; j += 2 * lanes) {
            const Floats a = weights(j), b = weights(j + lanes);
            store_lanes(scores + j, a);
            store_lanes(scores + j + lanes, b);
            sum_a = sum_a + a;
            sum_b = sum_b + b;
        }
        for (; j < count; j += lanes) {
            const Floats a = first_of(weights(j), seen - j);
            store_lanes(scores + j, a);
            sum_a = sum_a + a;
        }
        return sum_a + sum_b;
    }
};

// What `weigh` of a kernel does, see `attention.h`. `Weights` is like `FloatWeights`. The rows are taken in three steps, because
// each is a long chain of latencies for one row.
template <typename Weights, typename Rows>
QFUSE_TARGET_VECTORS __attribute__((noinline)) static void weigh_rows(
    float* scores, int64_t score_stride, int64_t rows, const int64_t* seen, int64_t count, float factor, bool is_first,
    Rows& known, float* sums, int64_t padded_head) {
    for (int64_t row = 0; row < rows; row += lanes, scores += lanes * score_stride) {
        const int64_t some = std::min<int64_t>(lanes, rows - row);
        alignas(64) float partial[lanes][lanes], from[lanes];
        for (int64_t i = 0; i < some; ++i)
            store_lanes(partial[i], largest_of(scores + i * score_stride, seen[row + i]));
        const Floats none = broadcast(-INFINITY), before = is_first ? none : load_lanes(known.largest + row);
        const Floats largest = Maximum()(before, reduced(partial, Maximum()));
        store_lanes(known.largest + row, largest);
        // where all scores are −∞, the weights are 0
        const Floats subtracted = zero_where_equal(largest, none);
        store_lanes(from, subtracted);
        for (int64_t i = 0; i < some; ++i)
            store_lanes(
                partial[i], Weights::of(scores + i * score_stride, seen[row + i], count, from[i], factor));
        Floats sum = reduced(partial, Sum());
        if (!is_first) {
            const Floats shrunk = power_of_2<6>((before - subtracted) * broadcast(factor));
            sum = multiply_add(load_lanes(known.sum + row), shrunk, sum);
            alignas(64) float by[lanes];
            store_lanes(by, shrunk);
            for (int64_t i = 0; i < some; ++i)
                if (by[i] != 1)
                    for (int64_t d = 0; d < padded_head; d += lanes) {
                        float* to = sums + (row + i) * padded_head + d;
                        store_lanes(to, load_lanes(to) * broadcast(by[i]));
                    }
        }
        store_lanes(known.sum + row, sum);
    }
}

} // namespace
} // namespace qfuse
#endif
