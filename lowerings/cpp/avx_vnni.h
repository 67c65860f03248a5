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

    AvxVnni(int64_t k, bool) : k_(k) {}

    template <typename Store>
    void operator()(const Rows& x, const Panel& w, int32_t* block, Part& part, const Store& store) const {
        store_all(part, store);
        for_tiles_of_six(x.count, [&](int64_t row, auto rows) {
            for (int64_t column = 0; column < panel_columns; column += 16)
                tile<rows>(x.data + row * x.stride, x.stride, w, column, block + row * panel_columns + column);
        });
        part = {x.first, w.first, x.count, w.columns};
    }

 private:
    int64_t k_;

    template <int ROWS>
    QFUSE_TARGET_AVX_VNNI __attribute__((noinline)) void tile(
        const uint8_t* a, int64_t stride, const Panel& w, int64_t column, int32_t* out) const {
        const int8_t* b = w.data + 4 * column;
        int64_t k = k_;
        const Tail<ROWS> last(a, stride, k);
        __m256i acc[ROWS][2];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j)
                acc[i][j] = w.start ? _mm256_load_si256(reinterpret_cast<const __m256i*>(w.start + column + 8 * j))
                                    : _mm256_setzero_si256();
        for (; k >= 4; k -= 4, a += 4, b += 256)
            multiply<ROWS>(acc, Memory{a, stride}, b);
        if (k > 0)
            multiply<ROWS>(acc, last, b);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * panel_columns + 8 * j), acc[i][j]);
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
