// LayerNorm and RMSNorm of rows, computed in float32; the variance after the mean, so that nothing cancels out, with
// what rounding left of the mean taken out of both (Chan, Golub & LeVeque 1983). `F`, `load` and the
// others that are not here are those of quantize_rows.cpp.jinja.
#ifndef QFUSE_ROW_NORM
#define QFUSE_ROW_NORM

namespace qfuse_rows {

#ifdef QFUSE_ROWS_AVX512
static inline float sum(F a) { return _mm512_reduce_add_ps(_mm512_add_ps(a.v[0], a.v[1])); }
static inline F fused_multiply_add(F a, F b, F c) {
    return {_mm512_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm512_fmadd_ps(a.v[1], b.v[1], c.v[1])};
}

// Elements of p in the order of those of a row: lane by lane with them.
template <typename V, typename T, typename Lanes> static inline F load_like(const V*, const T* p, Lanes lanes) {
    const F a = load(p, lanes);
    constexpr bool is_interleaved = std::is_same_v<T, at::BFloat16>;
    if constexpr (is_interleaved == std::is_same_v<V, at::BFloat16>) {
        return a;
    } else if constexpr (is_interleaved) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        return {_mm512_permutex2var_ps(a.v[0], low, a.v[1]), _mm512_permutex2var_ps(a.v[0], high, a.v[1])};
    } else {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        return {_mm512_permutex2var_ps(a.v[0], even, a.v[1]), _mm512_permutex2var_ps(a.v[0], odd, a.v[1])};
    }
}

static inline __m512i bits(at::BFloat16, F a) {
#ifdef __AVX512BF16__
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(a.v[1], a.v[0]));
    const __m512i pairs = _mm512_setr_epi32(
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
        0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    return _mm512_permutexvar_epi16(pairs, halves);
#else
    const F b = rounded<at::BFloat16>(a);
    const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(b.v[0]), 16);
    return _mm512_mask_mov_epi16(even, 0xaaaaaaaa, _mm512_castps_si512(b.v[1]));
#endif
}
static inline __m512i bits(at::Half, F a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m256i low = _mm512_cvtps_ph(a.v[0], nearest), high = _mm512_cvtps_ph(a.v[1], nearest);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
template <typename T> static inline void store(T* p, F a, Full) { _mm512_storeu_si512(p, bits(T(), a)); }
template <typename T> static inline void store(T* p, F a, int n) { _mm512_mask_storeu_epi16(p, mask(n), bits(T(), a)); }
static inline void store(float* p, F a, Full) { _mm512_storeu_ps(p, a.v[0]), _mm512_storeu_ps(p + 16, a.v[1]); }
static inline void store(float* p, F a, int n) {
    _mm512_mask_storeu_ps(p, mask(n), a.v[0]), _mm512_mask_storeu_ps(p + 16, mask(n) >> 16, a.v[1]);
}
#else
static inline float sum(F a) {
    const Floats halves = (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
    float r = 0;
    for (int i = 0; i < 8; i++) r += halves[i];
    return r;
}
static inline F fused_multiply_add(F a, F b, F c) {
#ifdef __FMA__
    for (int i = 0; i < VECTORS; i++) c.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
    return c;
#else
    return add(mul(a, b), c);
#endif
}
template <typename V, typename T, typename Lanes> static inline F load_like(const V*, const T* p, Lanes lanes) { return load(p, lanes); }
template <typename T> static inline void store(T* p, F a, int n) {
    for_vectors(n, [&](int i, int lanes) {
        const Shorts halves = bits(T(), a.v[i]);
        std::memcpy(p + 8 * i, &halves, lanes * sizeof(T));
    });
}
static inline void store(float* p, F a, int n) {
    for_vectors(n, [&](int i, int lanes) { std::memcpy(p + 8 * i, &a.v[i], lanes * sizeof(float)); });
}
#endif

// Calls body(k, lanes in use, first sum, second sum) all along a row, and returns both sums. They are sums of parts: a
// float to which thousands of numbers are added loses something each time.
template <int64_t K, typename Body> static inline std::pair<F, F> summed(const Body& body) {
    constexpr int64_t part = 256;
    F first(0.f), second(0.f);
    for (int64_t from = 0; from < K; from += part) {
        F a(0.f), b(0.f);
        for_lanes(std::min(part, K - from), [&](int64_t k, auto lanes) { body(from + k, lanes, a, b); });
        first = add(first, a), second = add(second, b);
    }
    return {first, second};
}

// (x − mean(x)) / √(mean((x − mean(x))²) + eps) · weight + bias for each of `count` rows, without the mean if not
// centered. x: its rows are `stride` elements apart. weight, bias: K numbers, or nullptr. result: contiguous rows.
// Each step is done for all rows before the next one, because a reduction ends in a chain of latencies.
template <bool centered, int64_t K, int64_t R, typename X, typename W, typename B, typename V>
static inline void normalize(
    const X* x, int64_t stride, W weight, B bias, float eps, V* result, int64_t count) {
    constexpr int64_t lanes_of_row = (K + LANES - 1) / LANES * LANES;
    alignas(64) float kept[R][lanes_of_row];  // x, and then its deviation from the mean
    float mean[R], variance[R];
    for (int64_t m = 0; m < count; m++) {
        const auto [total, squares] = summed<K>([&](int64_t k, auto lanes, F& total, F& squares) {
            const F a = load_like(result, x + m * stride + k, lanes);  // lanes that are not in use are 0
            if constexpr (centered) total = add(total, a);
            else squares = fused_multiply_add(a, a, squares);
            store(kept[m] + k, a, Full());
        });
        if constexpr (centered) mean[m] = sum(total) / K;
        else variance[m] = sum(squares) / K;
    }
    if constexpr (centered) {
        for (int64_t m = 0; m < count; m++) {
            if (!std::isfinite(mean[m])) {  // the sum of large numbers, maybe, whose mean is one
                const auto shares = summed<K>([&](int64_t k, auto, F& total, F&) {
                    total = fused_multiply_add(load(kept[m] + k, Full()), F(1.f / K), total);
                });
                mean[m] = sum(shares.first);
            }
            const auto [rest, squares] = summed<K>([&](int64_t k, auto lanes, F& rest, F& squares) {
                const F a = first(result, sub(load(kept[m] + k, Full()), F(mean[m])), F(0.f), lanes);
                rest = add(rest, a);
                squares = fused_multiply_add(a, a, squares);
                store(kept[m] + k, a, Full());
            });
            mean[m] = sum(rest) / K;  // of what is kept: not 0, where the mean is large and was rounded
            const float square = sum(squares) / K;
            variance[m] = std::isfinite(square) ? std::max(0.f, square - mean[m] * mean[m]) : square;
        }
    }
    for (int64_t m = 0; m < count; m++) {
        const float inverse = 1.f / std::sqrt(variance[m] + eps);
        const F scale(inverse), shift(centered ? -mean[m] * inverse : 0.f);
        for_lanes(K, [&](int64_t k, auto lanes) {
            F a = fused_multiply_add(load(kept[m] + k, Full()), scale, shift);
            if constexpr (!std::is_null_pointer_v<W>) a = mul(a, load_like(result, weight + k, lanes));
            if constexpr (!std::is_null_pointer_v<B>) a = add(a, load_like(result, bias + k, lanes));
            store(result + m * K + k, a, lanes);
        });
    }
}

}  // namespace qfuse_rows
#endif
