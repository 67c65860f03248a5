// What every microkernel computes. A microkernel is a class with
//
//     static constexpr int64_t row_tile;   // rows that it computes at a time, most efficiently
//     static constexpr int64_t max_rows;   // rows that it takes in one call
//     static constexpr int64_t blocks;     // places for results that it wants: 2 if it overlaps, else 1
//     explicit Microkernel(int64_t k);     // one for each thread
//     void operator()(const Rows& x, Panel& w, float* out, const Meanwhile& meanwhile);
//
// which computes out[i][j] = (Σk x[i][k] · w[j][k] − compensation[j]) · x_scale[i] · w_scale[j], row-major [rows][64]. It
// calls meanwhile(first, last) for 0 to at least max_rows, in order, to have these rows of the block before stored: that
// overlaps with what it computes, or comes first where both have the same place.
// The products are rounded in this order, like the reference's, so that no intermediate leaves float32 unless the
// reference's does.
#ifndef QFUSE_BLOCK
#define QFUSE_BLOCK
// The first compilers with AMX and AVX-VNNI are GCC 11 and Clang 12; Inductor takes older ones.
#ifndef QFUSE_COMPILER_IS_OLD
#ifdef __clang__
#define QFUSE_COMPILER_IS_OLD (__clang_major__ < 12)
#else
#define QFUSE_COMPILER_IS_OLD (__GNUC__ < 11)
#endif
#endif
namespace qfuse {

constexpr int64_t panel_columns = 64;

// Rows of the activation, K contiguous bytes each, unsigned or (`shifted.h`, `amx.h`) bits of signed ones, `stride` bytes apart; `scale_stride` is 0 for one scale for all.
struct Rows {
    const uint8_t* data;
    int64_t stride;
    const float* scale;
    int64_t scale_stride;
    int64_t count;
};

// 64 columns of the weight, packed [K / 4][64][4], K padded with zeros to a multiple of 64.
struct Panel {
    const int8_t* data;
    int64_t rows;  // that it is multiplied by, in one call or several
    int64_t tiles; // of them, until now: the caller begins with 0
    bool is_compensated; // false: all of `compensation` is zero
    alignas(64) int32_t compensation[panel_columns];
    alignas(64) float scale[panel_columns];
    alignas(64) int32_t column_sums[panel_columns];
};

// Four k of row i, as one integer: in memory, or, where K is not divisible by 4, the last ones filled up with zeros.
struct Memory {
    const uint8_t* data;
    int64_t stride;
    __attribute__((always_inline)) inline int32_t operator[](int64_t i) const {
        int32_t four;
        std::memcpy(&four, data + i * stride, 4);
        return four;
    }
};

template <int ROWS>
struct Tail {
    int32_t four[ROWS] = {};
    Tail(const Rows& x, int64_t k) {
        if (k % 4)
            for (int i = 0; i < ROWS; ++i)
                std::memcpy(&four[i], x.data + i * x.stride + k / 4 * 4, k % 4);
    }
    __attribute__((always_inline)) inline int32_t operator[](int64_t i) const { return four[i]; }
};

} // namespace qfuse
#endif
