// AVX-VNNI: `vpdpbusd` on 8 columns and 4 k at once, a tile of up to 6 × 16 in 12 of the 16 registers.
#ifndef QFUSE_AVX_VNNI
#define QFUSE_AVX_VNNI
#define QFUSE_TARGET_AVX_VNNI __attribute__((target("avx2,avxvnni,fma")))
namespace qfuse {
#if !QFUSE_COMPILER_IS_OLD

// acc += four unsigned bytes of `row` times four signed ones of `column`, for 8 columns; see avx512_vnni.h.
QFUSE_TARGET_AVX_VNNI __attribute__((always_inline)) static inline void dpbusd(
    __m256i& acc, __m256i row, __m256i column) {
    __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(row), "x"(column));
}

class AvxVnni {
 public:
    static constexpr int64_t row_tile = 6;
    static constexpr int64_t max_rows = 48;
    static constexpr int64_t blocks = 1;

    explicit AvxVnni(int64_t k) : k_(k) {}

    template <typename Meanwhile>
    void operator()(const Rows& x, const Panel& w, float* out, const Meanwhile& meanwhile) const {
        meanwhile(0, max_rows);
        for (int64_t row = 0, tiles = (x.count + row_tile - 1) / row_tile; tiles > 0; --tiles) {
            const int64_t rows = (x.count - row + tiles - 1) / tiles;
            const Rows part{x.data + row * x.stride, x.stride, x.scale + row * x.scale_stride, x.scale_stride, rows};
            for (int64_t column = 0; column < panel_columns; column += 16) {
                float* to = out + row * panel_columns;
                switch (rows) {
                    case 1: tile<1>(part, w, column, to); break;
                    case 2: tile<2>(part, w, column, to); break;
                    case 3: tile<3>(part, w, column, to); break;
                    case 4: tile<4>(part, w, column, to); break;
                    case 5: tile<5>(part, w, column, to); break;
                    default: tile<6>(part, w, column, to); break;
                }
            }
            row += rows;
        }
    }

 private:
    int64_t k_;

    template <int ROWS>
    QFUSE_TARGET_AVX_VNNI __attribute__((noinline)) void tile(
        const Rows& x, const Panel& w, int64_t column, float* out) const {
        const uint8_t* a = x.data;
        const int8_t* b = w.data + 4 * column;
        int64_t k = k_, stride = x.stride;
        const Tail<ROWS> last(x, k);
        __m256i acc[ROWS][2];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
            acc[i][0] = acc[i][1] = _mm256_setzero_si256();
        for (; k >= 4; k -= 4, a += 4, b += 256)
            multiply<ROWS>(acc, Memory{a, stride}, b);
        if (k > 0)
            multiply<ROWS>(acc, last, b);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            const __m256 x_scale = _mm256_set1_ps(x.scale[i * x.scale_stride]);
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const int64_t at = column + 8 * j;
                const auto* compensation = reinterpret_cast<const __m256i*>(w.compensation + at);
                const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[i][j], _mm256_load_si256(compensation)));
                const __m256 y = _mm256_mul_ps(_mm256_mul_ps(sum, x_scale), _mm256_load_ps(w.scale + at));
                _mm256_storeu_ps(out + i * panel_columns + at, y);
            }
        }
    }

    template <int ROWS, typename Four>
    QFUSE_TARGET_AVX_VNNI __attribute__((always_inline)) static inline void multiply(
        __m256i (&acc)[ROWS][2], const Four& four, const int8_t* b) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32));
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            const __m256i row = _mm256_set1_epi32(four[i]);
            dpbusd(acc[i][0], row, first);
            dpbusd(acc[i][1], row, second);
        }
    }
};

#else // GCC 10 does not know AVX-VNNI

using AvxVnni = Portable;

#endif
} // namespace qfuse
#endif
