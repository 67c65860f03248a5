// Functions of float vectors, inlined, for what Inductor fuses behind the matmul. Sleef's, which `at::vec` calls, take
// most of the time of a fused GELU or SiLU. Errors are at most 2 ulp, but for `rough_erf`.
// Only AVX-512 has its own; others call `at::vec`.
#ifndef QFUSE_VECTOR_MATH
#define QFUSE_VECTOR_MATH
namespace qfuse {

#if defined(CPU_CAPABILITY_AVX512)
// eˣ, after Cody and Waite: x = n · ln 2 + r. What overflows is inf, what underflows 0, NaN stays NaN.
static inline __m512 exp_of(__m512 x) {
    // outside of these bounds nothing changes any more; of two operands, min and max return the second if one is NaN
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f); // the coefficients of Cephes' expf
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// erf x: a polynomial times x near zero, and 1 − e^(polynomial) beyond, as in N. Juffa's erff.
static inline __m512 erf_of(__m512 x) {
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f)), t = _mm512_abs_ps(x), s = _mm512_mul_ps(x, x);
    __m512 near = _mm512_set1_ps(-5.96761703e-4f);
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(4.99119423e-3f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(-2.67681349e-2f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(1.12819925e-1f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(-3.76125336e-1f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(1.28379166e-1f));
    near = _mm512_fmadd_ps(near, x, x);
    // beyond 4, erf is 1 in float32, and the polynomial is not meant for more
    const __m512 c = _mm512_min_ps(_mm512_set1_ps(4.0f), t), c2 = _mm512_mul_ps(c, c);
    __m512 far = _mm512_fmadd_ps(_mm512_set1_ps(-1.72853470e-5f), c, _mm512_set1_ps(3.83197126e-4f));
    const __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(-3.88396438e-3f), c, _mm512_set1_ps(2.42546219e-2f));
    far = _mm512_fmadd_ps(far, c2, u);
    far = _mm512_fmadd_ps(far, c, _mm512_set1_ps(-1.06777877e-1f));
    far = _mm512_fmadd_ps(far, c, _mm512_set1_ps(-6.34846687e-1f));
    far = _mm512_fmadd_ps(far, c, _mm512_set1_ps(-1.28717512e-1f));
    far = _mm512_fnmadd_ps(_mm512_set1_ps(1.0f), c, _mm512_mul_ps(far, c));
    far = _mm512_or_ps(_mm512_sub_ps(_mm512_set1_ps(1.0f), exp_of(far)), sign);
    // a NaN is near: no comparison with it holds
    return _mm512_mask_mov_ps(near, _mm512_cmp_ps_mask(t, _mm512_set1_ps(0.921875f), _CMP_GT_OQ), far);
}

// erf x for results that are rounded to bfloat16: x times a rational function of x², within 5 ulp (at::vec's: 3)
// (fitted to the least relative error on 0 ≤ x ≤ 3.9375, where erf rounds to 1), in half the time.
static inline __m512 rough_erf_of(__m512 x) {
    const __m512 end = _mm512_set1_ps(3.9375f);
    const __m512 c = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), end), _mm512_min_ps(end, x));
    const __m512 s = _mm512_mul_ps(c, c);
    __m512 p = _mm512_set1_ps(2.035941861322499e-06f);
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(2.847550786100328e-04f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(3.7900747265666723e-03f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(5.2821435034275055e-02f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(1.910659372806549e-01f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(1.1283791065216064f));
    __m512 q = _mm512_set1_ps(3.7939014873700216e-05f);
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(1.167217269539833e-03f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(1.5018563717603683e-02f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(1.1436853557825089e-01f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(5.026604533195496e-01f));
    const __m512 one = _mm512_set1_ps(1.0f);
    q = _mm512_fmadd_ps(q, s, one);
    __m512 inverse = _mm512_rcp14_ps(q); // 1 ≤ q, and small: a step of Newton's is all it takes
    inverse = _mm512_fmadd_ps(inverse, _mm512_fnmadd_ps(q, inverse, one), inverse);
    return _mm512_mul_ps(_mm512_mul_ps(c, p), inverse);
}

// tanh x: Cephes' polynomial near zero, and 1 − 2 / (e^2|x| + 1) beyond.
static inline __m512 tanh_of(__m512 x) {
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f)), t = _mm512_abs_ps(x), s = _mm512_mul_ps(x, x);
    __m512 near = _mm512_set1_ps(-5.70498872745e-3f);
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(2.06390887954e-2f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(-5.37397155531e-2f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(1.33314422036e-1f));
    near = _mm512_fmadd_ps(near, s, _mm512_set1_ps(-3.33332819422e-1f));
    near = _mm512_fmadd_ps(_mm512_mul_ps(near, s), x, x);
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(exp_of(_mm512_mul_ps(two, t)), one)));
    const __mmask16 is_far = _mm512_cmp_ps_mask(t, _mm512_set1_ps(0.625f), _CMP_GT_OQ);
    return _mm512_mask_mov_ps(near, is_far, _mm512_or_ps(far, sign));
}
#endif

#if defined(CPU_CAPABILITY_AVX512)
#define QFUSE_VECTOR_FUNCTION(NAME, OTHERWISE)                                                                                 \
    template <typename V>                                                                                            \
    static inline V NAME(const V& x) {                                                                               \
        if constexpr (std::is_same_v<V, at::vec::Vectorized<float>>) {                                               \
            return NAME##_of(x);                                                                                     \
        } else {                                                                                                     \
            return x.OTHERWISE();                                                                                         \
        }                                                                                                            \
    }                                                                                                                \
    template <int N>                                                                                                 \
    static inline at::vec::VectorizedN<float, N> NAME(at::vec::VectorizedN<float, N> x) {                            \
        for (int i = 0; i < N; ++i)                                                                                  \
            x[i] = NAME##_of(x[i]);                                                                                  \
        return x;                                                                                                    \
    }
#else
#define QFUSE_VECTOR_FUNCTION(NAME, OTHERWISE)                                                                                 \
    template <typename V>                                                                                            \
    static inline V NAME(const V& x) {                                                                               \
        return x.OTHERWISE();                                                                                             \
    }
#endif
QFUSE_VECTOR_FUNCTION(exp, exp)
QFUSE_VECTOR_FUNCTION(erf, erf)
QFUSE_VECTOR_FUNCTION(tanh, tanh)
QFUSE_VECTOR_FUNCTION(rough_erf, erf)
#undef QFUSE_VECTOR_FUNCTION

// `at::vec::convert`, which rounds to bfloat16 with ten integer instructions where one does.
template <typename To, typename V>
static inline auto convert(const V& x) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
    if constexpr (std::is_same_v<To, at::BFloat16> && std::is_same_v<V, at::vec::Vectorized<float>>) {
        const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
        return at::vec::Vectorized<at::BFloat16>(_mm512_castsi256_si512(rounded));
    } else
#endif
        return at::vec::convert<To>(x);
}

template <typename To, int to_vectors, typename From, int from_vectors, typename V>
static inline auto convert(const V& x) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
    if constexpr (std::is_same_v<To, at::BFloat16> && std::is_same_v<V, at::vec::VectorizedN<float, 2>>)
        return at::vec::Vectorized<at::BFloat16>(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0])));
    else
#endif
        return at::vec::convert<To, to_vectors, From, from_vectors>(x);
}

} // namespace qfuse
#endif
