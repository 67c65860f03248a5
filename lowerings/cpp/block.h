// What every microkernel computes. A microkernel is a class with
//
//     static constexpr int64_t row_tile;   // rows that it computes at a time, most efficiently
//     static constexpr int64_t max_rows;   // rows that it takes in one call
//     Microkernel(int64_t k, bool stores_fast); // one for each thread; whether `store` takes little time
//     void operator()(const Rows& x, Panel& w, int32_t* block, Part& part, const Store& store);
//
// which computes Σk x[i][k] · w[j][k] + start[j], modulo 2^32, in parts of the block: rows of 64 integers, max_rows of them.
// `part` is the last one that was computed, maybe by the call before. store(first, last, column) stores, of these rows of it,
// 32 columns from `column` on. Before another part takes its place, all of it has been stored, once: at once (`store_all`),
// or meanwhile. The caller stores the very last one.
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

constexpr int64_t panel_columns = 64, stored_columns = 32;

// Rows of the activation, from `first` on: K contiguous bytes each, unsigned or (`shifted.h`, `amx.h`) bits of signed ones,
// `stride` bytes apart.
struct Rows {
    const uint8_t* data;
    int64_t stride;
    int64_t first;
    int64_t count;
};

// 64 columns of the weight, from `first` on, of which the last panel may have fewer: packed [K / 4][64][4], K padded with
// zeros to a multiple of 64.
struct Panel {
    const int8_t* data;
    int64_t first;
    int64_t columns;
    int64_t rows;  // that it is multiplied by, in one call or several
    int64_t tiles; // of them, until now: the caller begins with 0
    const int32_t* start; // of each column: −zero point · column sum; or nullptr: 0
    alignas(64) int32_t column_sums[panel_columns];
};

// Sums of some rows and columns, counted in the whole result.
struct Part {
    int32_t* sums; // of its first row; the next one is 64 integers behind
    int64_t row, column;
    int64_t rows = 0, columns = 0;
};

template <typename Store>
static inline void store_all(const Part& part, const Store& store) {
    for (int64_t column = 0; column < part.columns; column += stored_columns)
        store(0, part.rows, column);
}

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
    Tail(const uint8_t* data, int64_t stride, int64_t k) {
        if (k % 4)
            for (int i = 0; i < ROWS; ++i)
                std::memcpy(&four[i], data + i * stride + k / 4 * 4, k % 4);
    }
    __attribute__((always_inline)) inline int32_t operator[](int64_t i) const { return four[i]; }
};

} // namespace qfuse
#endif
