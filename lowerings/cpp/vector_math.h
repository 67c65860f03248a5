// Functions of float vectors, inlined, for what Inductor fuses behind the matmul. Sleef's, which `at::vec` calls, take
// most of the time of a fused GELU or SiLU. Errors are at most 4 ulp, but for the rough ones.
// AVX-512 and AVX2 have their own; others call `at::vec`.
#ifndef QFUSE_VECTOR_MATH
#define QFUSE_VECTOR_MATH
namespace qfuse {

// ---- what a register can do. Of two operands, the least and the largest are the second one if one is NaN.

#if defined(CPU_CAPABILITY_AVX512)
#define QFUSE_REGISTERS
using Register = __m512;
static inline Register of(float a) { return _mm512_set1_ps(a); }
static inline Register fused(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }          // a · b + c
static inline Register fused_negated(Register a, Register b, Register c) { return _mm512_fnmadd_ps(a, b, c); } // c − a · b
static inline Register least(Register a, Register b) { return _mm512_min_ps(a, b); }
static inline Register largest(Register a, Register b) { return _mm512_max_ps(a, b); }
static inline Register common_bits(Register a, Register b) { return _mm512_and_ps(a, b); }
static inline Register all_bits(Register a, Register b) { return _mm512_or_ps(a, b); }
static inline Register absolute(Register a) { return _mm512_abs_ps(a); }
static inline Register nearest_integer(Register a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
static inline Register fraction(Register a) { return _mm512_reduce_ps(a, 9); } // a − ⌊a⌋
static inline Register times_power_of_two(Register a, Register n) { return _mm512_scalef_ps(a, n); } // a · 2^⌊n⌋
// `then` where a is more than b, and otherwise, or where one is NaN, `otherwise`
static inline Register if_more(Register a, Register b, Register then, Register otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), then);
}

#elif defined(CPU_CAPABILITY_AVX2)
#define QFUSE_REGISTERS
using Register = __m256;
static inline Register of(float a) { return _mm256_set1_ps(a); }
static inline Register fused(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
static inline Register fused_negated(Register a, Register b, Register c) { return _mm256_fnmadd_ps(a, b, c); }
static inline Register least(Register a, Register b) { return _mm256_min_ps(a, b); }
static inline Register largest(Register a, Register b) { return _mm256_max_ps(a, b); }
static inline Register common_bits(Register a, Register b) { return _mm256_and_ps(a, b); }
static inline Register all_bits(Register a, Register b) { return _mm256_or_ps(a, b); }
static inline Register absolute(Register a) { return _mm256_andnot_ps(of(-0.0f), a); }
static inline Register nearest_integer(Register a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
static inline Register fraction(Register a) {
    const Register f = _mm256_sub_ps(a, _mm256_floor_ps(a));
    return common_bits(f, _mm256_cmp_ps(absolute(a), of(INFINITY), _CMP_NEQ_UQ)); // of ∞: 0
}
static inline Register power_of_two(__m256i n) { // for −126 ≤ n ≤ 127; of others, as where a NaN comes from, some number
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
static inline Register times_power_of_two(Register a, Register n) {
    // by two factors: a · 2ⁿ may be a float where 2ⁿ is none
    const __m256i all = _mm256_cvtps_epi32(_mm256_floor_ps(largest(of(-200.0f), least(of(200.0f), n))));
    const __m256i half = _mm256_srai_epi32(all, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(all, half)));
}
static inline Register if_more(Register a, Register b, Register then, Register otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
#endif

#ifdef QFUSE_REGISTERS
// ---- functions. Sums and products are those of the compiler's vectors.

// eˣ, after Cody and Waite: x = n · ln 2 + r. What overflows is inf, what underflows 0, NaN stays NaN.
static inline Register exp_of(Register x) {
    x = least(of(89.0f), largest(of(-104.0f), x)); // outside of these bounds nothing changes any more
    const Register n = nearest_integer(x * of(1.44269504f));
    Register r = fused_negated(n, of(0.693359375f), x);
    r = fused_negated(n, of(-2.12194440e-4f), r);
    Register p = of(1.9875691500e-4f); // the coefficients of Cephes' expf
    p = fused(p, r, of(1.3981999507e-3f));
    p = fused(p, r, of(8.3334519073e-3f));
    p = fused(p, r, of(4.1665795894e-2f));
    p = fused(p, r, of(1.6666665459e-1f));
    p = fused(p, r, of(5.0000001201e-1f));
    p = fused(p, r * r, r) + of(1.0f);
    return times_power_of_two(p, n);
}

// erf x: a polynomial times x near zero, and 1 − e^(polynomial) beyond, as in N. Juffa's erff.
static inline Register erf_of(Register x) {
    const Register sign = common_bits(x, of(-0.0f)), t = absolute(x), s = x * x;
    Register near = of(-5.96761703e-4f);
    near = fused(near, s, of(4.99119423e-3f));
    near = fused(near, s, of(-2.67681349e-2f));
    near = fused(near, s, of(1.12819925e-1f));
    near = fused(near, s, of(-3.76125336e-1f));
    near = fused(near, s, of(1.28379166e-1f));
    near = fused(near, x, x);
    // beyond 4, erf is 1 in float32, and the polynomial is not meant for more
    const Register c = least(of(4.0f), t), c2 = c * c;
    Register far = fused(of(-1.72853470e-5f), c, of(3.83197126e-4f));
    const Register u = fused(of(-3.88396438e-3f), c, of(2.42546219e-2f));
    far = fused(far, c2, u);
    far = fused(far, c, of(-1.06777877e-1f));
    far = fused(far, c, of(-6.34846687e-1f));
    far = fused(far, c, of(-1.28717512e-1f));
    far = fused_negated(of(1.0f), c, far * c);
    far = all_bits(of(1.0f) - exp_of(far), sign);
    return if_more(t, of(0.921875f), far, near); // a NaN is near
}

static inline Register sigmoid_of(Register x) { return of(1.0f) / (of(1.0f) + exp_of(-x)); }

// tanh x: Cephes' polynomial near zero, and 1 − 2 / (e^2|x| + 1) beyond.
static inline Register tanh_of(Register x) {
    const Register sign = common_bits(x, of(-0.0f)), t = absolute(x), s = x * x;
    Register near = of(-5.70498872745e-3f);
    near = fused(near, s, of(2.06390887954e-2f));
    near = fused(near, s, of(-5.37397155531e-2f));
    near = fused(near, s, of(1.33314422036e-1f));
    near = fused(near, s, of(-3.33332819422e-1f));
    near = fused(near * s, x, x);
    const Register far = of(1.0f) - of(2.0f) / (exp_of(of(2.0f) * t) + of(1.0f));
    return all_bits(if_more(t, of(0.625f), far, near), sign); // the polynomial loses the sign of zero
}

// 2ᶠ for 0 ≤ f ≤ 1, relatively within 2e-7, and exact at 0 and 1.
static inline Register rough_power_of_fraction(Register f) {
    Register p = of(1.879318617e-3f);
    p = fused(p, f, of(8.990994655e-3f));
    p = fused(p, f, of(5.581867695e-2f));
    p = fused(p, f, of(2.401592731e-1f));
    p = fused(p, f, of(6.931517124e-1f));
    return fused(p, f, of(1.0f));
}

// eˣ for results that are rounded to bfloat16, relatively within 2e-7 + 6e-8 |x|, where x is rounded.
static inline Register rough_exp_of(Register x) {
    const Register y = x * of(1.44269504f);
    return times_power_of_two(rough_power_of_fraction(fraction(y)), y);
}
#endif

#if defined(CPU_CAPABILITY_AVX512)
// A cubic of x, whose coefficients are chosen out of 32 of each power by the last five bits of i.
static inline __m512 cubic_of(__m512 x, const float (&coefficients)[4][32], __m512i i) {
    const auto coefficient = [&](int power) {
        const float* of = coefficients[power];
        return _mm512_permutex2var_ps(_mm512_load_ps(of), i, _mm512_load_ps(of + 16));
    };
    __m512 p = _mm512_fmadd_ps(coefficient(3), x, coefficient(2));
    p = _mm512_fmadd_ps(p, x, coefficient(1));
    return _mm512_fmadd_ps(p, x, coefficient(0));
}

// The coefficients of erf (i / 8 + r), |r| ≤ 1 / 16, as a polynomial of r, for i from 0 to 31: erf is odd in the first,
// and in the last rounds to the largest float below 1, and to 1 from 3.92 on.
alignas(64) static const float erf_coefficients[4][32] = {
    {
      0.0f, 1.40316069e-01f, 2.76326150e-01f, 4.04116601e-01f, 5.20499527e-01f, 6.23240530e-01f, 7.11155355e-01f,
      7.84074843e-01f, 8.42700660e-01f, 8.88388157e-01f, 9.22900140e-01f, 9.48170125e-01f, 9.66105223e-01f,
      9.78443801e-01f, 9.86671746e-01f, 9.91990149e-01f, 9.95322347e-01f, 9.97346044e-01f, 9.98537302e-01f,
      9.99217093e-01f, 9.99593079e-01f, 9.99794662e-01f, 9.99899387e-01f, 9.99952137e-01f, 9.99977887e-01f,
      9.99990106e-01f, 9.99995708e-01f, 9.99998212e-01f, 9.99999285e-01f, 9.99999702e-01f, 9.99999881e-01f, 9.99999940e-01f
    },
    {
      1.12837899e+00f, 1.11088479e+00f, 1.06001377e+00f, 9.80352581e-01f, 8.78782570e-01f, 7.63499677e-01f,
      6.42931342e-01f, 5.24745345e-01f, 4.15107816e-01f, 3.18274260e-01f, 2.36521348e-01f, 1.70359924e-01f,
      1.18930362e-01f, 8.04722682e-02f, 5.27749658e-02f, 3.35457735e-02f, 2.06669234e-02f, 1.23407608e-02f,
      7.14226812e-03f, 4.00643796e-03f, 2.17825500e-03f, 1.14785496e-03f, 5.86264068e-04f, 2.90220109e-04f,
      1.39248194e-04f, 6.47559282e-05f, 2.91875240e-05f, 1.27509575e-05f, 5.39903385e-06f, 2.21573077e-06f,
      8.81344135e-07f, 4.0e-07f
    },
    {
      0.0f, -1.38592601e-01f, -2.64508098e-01f, -3.66982311e-01f, -4.38676864e-01f, -4.76498514e-01f,
      -4.81610060e-01f, -4.58713025e-01f, -4.14837182e-01f, -3.57948720e-01f, -2.95675159e-01f, -2.34363511e-01f,
      -1.78569376e-01f, -1.30961433e-01f, -9.25440118e-02f, -6.30634502e-02f, -4.14685160e-02f, -2.63272412e-02f,
      -1.61448047e-02f, -9.56673082e-03f, -5.47943171e-03f, -3.03435395e-03f, -1.62501319e-03f, -8.41773232e-04f,
      -4.21849400e-04f, -2.04555385e-04f, -9.59875179e-05f, -4.35934708e-05f, -1.91636300e-05f, -8.15502972e-06f,
      -3.35971436e-06f, 2.9e-06f
    },
    {
      -3.75685930e-01f, -3.58215153e-01f, -3.08780223e-01f, -2.34654263e-01f, -1.46427900e-01f, -5.58054186e-02f,
      2.65291892e-02f, 9.25957710e-02f, 1.38031647e-01f, 1.62153095e-01f, 1.67305484e-01f, 1.57788232e-01f,
      1.38679326e-01f, 1.14830069e-01f, 9.01895091e-02f, 6.74969628e-02f, 4.82868105e-02f, 3.30983810e-02f,
      2.17765793e-02f, 1.37713440e-02f, 8.37997068e-03f, 4.91103483e-03f, 2.77385768e-03f, 1.51091209e-03f,
      7.94072053e-04f, 4.02842328e-04f, 1.97345333e-04f, 9.33846750e-05f, 4.26976367e-05f, 1.88676986e-05f,
      8.05964555e-06f, 0.0f
    },
};

// erf x for results that are rounded to bfloat16, within 4e-7 and relatively 2e-6, in half the time.
static inline __m512 rough_erf_of(__m512 x) {
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(3.93f), _mm512_abs_ps(x)); // of NaN, NaN
    const __m512 integer = _mm512_set1_ps(12582912.0f); // 1.5 · 2²³: what is added to it is rounded to an integer
    const __m512 shifted = _mm512_fmadd_ps(t, _mm512_set1_ps(8.0f), integer);
    const __m512 r = _mm512_fnmadd_ps(_mm512_sub_ps(shifted, integer), _mm512_set1_ps(0.125f), t);
    const __m512i i = _mm512_castps_si512(shifted); // its last five bits
    const __m512 p = cubic_of(r, erf_coefficients, i);
    return _mm512_or_ps(p, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

// The coefficients of |x| Φ(−|x|) as a polynomial of |x|: 16 for |x| < 2, 1 / 8 apart, and 16 up to 6, 1 / 4 apart. The first
// is 0 at 0, the last everywhere.
alignas(64) static const float gelu_coefficients[4][32] = {
    {
      0.0f, -6.59187e-5f, -0.00051521155f, -0.0017414177f, -0.0038217898f, -0.006116461f, -0.0070172506f,
      -0.00396072f, 0.0062356982f, 0.026790533f, 0.060227774f, 0.10768872f, 0.1684507f, 0.23977618f, 0.31713718f,
      0.3947748f, 0.49760494f, 0.5837267f, 0.5914886f, 0.5274167f, 0.41914427f, 0.29961497f, 0.19397534f, 0.11434657f,
      0.061633997f, 0.030479705f, 0.013867511f, 0.0058181416f, 0.0022553203f, 0.0008090659f, 0.0002689792f, 0.0f
    },
    {
      0.50000423f, 0.50151885f, 0.50686353f, 0.5166709f, 0.5292047f, 0.54032546f, 0.5440821f, 0.53378874f, 0.5033998f,
      0.44878092f, 0.36870074f, 0.26527944f, 0.14383706f, 0.012190014f, -0.12044587f, -0.24472316f, -0.397297f,
      -0.5130117f, -0.5231074f, -0.45374f, -0.34573984f, -0.23549287f, -0.14493437f, -0.081187576f, -0.041610256f,
      -0.01958869f, -0.008496164f, -0.003403325f, -0.0012615375f, -0.00043343034f, -0.00013821293f, 0.0f
    },
    {
      -0.39953732f, -0.41183782f, -0.43326062f, -0.45953128f, -0.48476875f, -0.50276244f, -0.50798225f, -0.49642137f,
      -0.46621314f, -0.41781065f, -0.35385525f, -0.27870834f, -0.19777776f, -0.116763175f, -0.040945444f, 0.02537849f,
      0.10086394f, 0.15271227f, 0.15706454f, 0.13202363f, 0.096103914f, 0.062200442f, 0.0363182f, 0.019304276f,
      0.009397637f, 0.004208231f, 0.0017389756f, 0.00066477817f, 0.00023555855f, 7.749021e-5f, 2.3696308e-5f, 0.0f
    },
    {
      0.012535724f, 0.047957525f, 0.07689265f, 0.10045986f, 0.11744268f, 0.1271626f, 0.12957916f, 0.12524863f,
      0.11523295f, 0.10092786f, 0.083895f, 0.065687925f, 0.04770505f, 0.031082375f, 0.016632926f, 0.004832233f,
      -0.0076207435f, -0.015367996f, -0.01599036f, -0.012976289f, -0.008992979f, -0.0055167624f, -0.00305047f,
      -0.0015365314f, -0.0007098205f, -0.00030213431f, -0.000118888835f, -4.3356304e-5f, -1.4681311e-5f,
      -4.623131e-6f, -1.3554745e-6f, 0.0f
    },
};

// GELU, x Φ(x) = max(x, 0) − |x| Φ(−|x|), for results that are rounded to bfloat16, within 6e-7, relatively within 1e-3
// down to −5: with a third as many multiplications as by erf, which take the ports of `vpdpbusd`. Where x is −∞ it is 0, not NaN.
static inline __m512 rough_gelu_of(__m512 x) {
    // floats, which GCC loads from memory: integers it moves from general registers, by a port of the multiplications
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(5.875f), _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x)); // of NaN, NaN
    // between 2 and 4, and between 4 and 8, a float's exponent and first four bits number the 32
    const __m512i i = _mm512_srli_epi32(_mm512_castps_si512(_mm512_add_ps(t, _mm512_set1_ps(2.0f))), 19);
    const __m512 p = cubic_of(t, gelu_coefficients, i);
    return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), p); // of two operands, max returns the second if one is NaN
}

// a / b by one step of Newton's and one that corrects the rounding (Markstein 1990), in half the time of the instruction, and
// as exact: of 24 million quotients, all were equal. By the instruction where one of the two is so large or so small that
// something might overflow or underflow; and where a is zero, whose sign the correction loses.
static inline __m512 div_of(__m512 a, __m512 b) {
    const __m512 x = _mm512_abs_ps(a), y = _mm512_abs_ps(b), small = _mm512_set1_ps(1e-18f), large = _mm512_set1_ps(1e18f);
    const __mmask16 is_small_enough = _mm512_cmp_ps_mask(_mm512_max_ps(x, y), large, _CMP_LT_OQ);
    if (_mm512_mask_cmp_ps_mask(is_small_enough, _mm512_min_ps(x, y), small, _CMP_GT_OQ) != 0xffff)
        return _mm512_div_ps(a, b);
    const __m512 rough = _mm512_rcp14_ps(b), error = _mm512_fnmadd_ps(b, rough, _mm512_set1_ps(1.0f));
    const __m512 inverse = _mm512_fmadd_ps(rough, error, rough), quotient = _mm512_mul_ps(a, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(b, quotient, a), inverse, quotient);
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline Register rough_erf_of(Register x) { return erf_of(x); }

// GELU, x Φ(x) = max(x, 0) − |x| Φ(−|x|), for results that are rounded to bfloat16, within 1e-6, relatively within 1e-5 down
// to −5.8, where it becomes 0. log₂ Φ(−t) is a polynomial of degree 7. Where x is −∞ it is 0, not NaN.
static inline Register rough_gelu_of(Register x) {
    // as integers, so that of NaN it is a number: the maximum is NaN
    const __m256i bits = _mm256_castps_si256(absolute(x)), most = _mm256_castps_si256(of(5.8125f));
    const Register t = _mm256_castsi256_ps(_mm256_min_epu32(bits, most));
    Register p = of(-1.82944189e-06f);
    p = fused(p, t, of(6.15070167e-05f));
    p = fused(p, t, of(-0.000929926813f));
    p = fused(p, t, of(0.00850599166f));
    p = fused(p, t, of(-0.0539570563f));
    p = fused(p, t, of(-0.458466589f));
    p = fused(p, t, of(-1.15125048f));
    p = fused(p, t, of(-0.999995291f));
    const Register n = _mm256_floor_ps(p), power = rough_power_of_fraction(p - n) * power_of_two(_mm256_cvtps_epi32(n));
    const Register product = if_more(of(5.8125f), t, t * power, of(0.0f));
    return largest(of(0.0f), x) - product; // of two operands, the largest is the second if one is NaN
}

static inline Register div_of(Register a, Register b) { return a / b; }
#endif

#ifdef QFUSE_REGISTERS
static inline Register rough_sigmoid_of(Register x) { return div_of(of(1.0f), of(1.0f) + rough_exp_of(-x)); }

#define QFUSE_VECTOR_FUNCTION(NAME, OTHERWISE)                                                                       \
    template <typename V>                                                                                            \
    static inline V NAME(const V& x) {                                                                               \
        if constexpr (std::is_same_v<V, at::vec::Vectorized<float>>) {                                               \
            return NAME##_of(x);                                                                                     \
        } else {                                                                                                     \
            return OTHERWISE;                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    template <int N>                                                                                                 \
    static inline at::vec::VectorizedN<float, N> NAME(at::vec::VectorizedN<float, N> x) {                            \
        for (int i = 0; i < N; ++i)                                                                                  \
            x[i] = NAME##_of(x[i]);                                                                                  \
        return x;                                                                                                    \
    }
#else
#define QFUSE_VECTOR_FUNCTION(NAME, OTHERWISE)                                                                       \
    template <typename V>                                                                                            \
    static inline V NAME(const V& x) {                                                                               \
        return OTHERWISE;                                                                                            \
    }
#endif
QFUSE_VECTOR_FUNCTION(exp, x.exp())
QFUSE_VECTOR_FUNCTION(erf, x.erf())
QFUSE_VECTOR_FUNCTION(tanh, x.tanh())
QFUSE_VECTOR_FUNCTION(sigmoid, V(1) / (V(1) + x.neg().exp()))
QFUSE_VECTOR_FUNCTION(rough_exp, x.exp())
QFUSE_VECTOR_FUNCTION(rough_erf, x.erf())
QFUSE_VECTOR_FUNCTION(rough_gelu, x * V(0.5f) * (V(1) + (x * V(0.70710678f)).erf()))
QFUSE_VECTOR_FUNCTION(rough_sigmoid, V(1) / (V(1) + x.neg().exp()))
#undef QFUSE_VECTOR_FUNCTION

template <typename V>
static inline V div(const V& a, const V& b) {
#ifdef QFUSE_REGISTERS
    if constexpr (std::is_same_v<V, at::vec::Vectorized<float>>)
        return div_of(a, b);
    else
#endif
        return a / b;
}

#ifdef QFUSE_REGISTERS
template <int N>
static inline at::vec::VectorizedN<float, N> div(
    at::vec::VectorizedN<float, N> a, const at::vec::VectorizedN<float, N>& b) {
    for (int i = 0; i < N; ++i)
        a[i] = div_of(a[i], b[i]);
    return a;
}
#endif

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
    if constexpr (to_vectors == from_vectors && to_vectors > 1) { // one by one: torch 2.13 goes through memory
        at::vec::VectorizedN<To, to_vectors> converted;
        for (int i = 0; i < to_vectors; ++i)
            converted[i] = at::vec::convert<To>(x[i]);
        return converted;
    } else {
        return at::vec::convert<To, to_vectors, From, from_vectors>(x);
    }
}

} // namespace qfuse
#endif
