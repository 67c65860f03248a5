// What every microkernel computes. A microkernel is a class with
//
//     static constexpr int64_t row_tile;   // rows that it computes at a time, most efficiently
//     static constexpr int64_t max_rows;   // rows that it takes in one call
//     Microkernel(int64_t k, bool stores_fast); // of one thread; whether `store` takes little time
//     void operator()(const Rows& x, Panel& w, int32_t* block, Part& part, const Store& store);
//
// which computes Σk x[i][k] · w[j][k] + start[j], modulo 2^32, into the block: max_rows rows of 64 integers. `part` says what
// of the result stands there: what was computed last, maybe by the call before. store(first, last, column) stores its rows
// from `first` to before `last`, and 32 of its columns, from `column` on, as far as there are any. Each part is stored once before
// the next one is written over it, and named: at one time (`store_all`), or bit by bit. The caller stores the very last one.
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

// Rows of the activation, from `first` on: K contiguous bytes each, unsigned, or, where the microkernel takes them, signed ones,
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
    alignas(64) int32_t column_sums[panel_columns] = {}; // of columns that there are; behind them anything
};

// Some rows and columns, counted in the whole result.
struct Part {
    int64_t row = 0, column = 0, rows = 0, columns = 0;
};

// What the threads have taken of a share of the work, in a cache line of its own.
struct alignas(64) Share {
    std::atomic<int64_t> taken{0};

    // Return the number of a piece that nobody else has, or −1 where all of the `count` are taken.
    int64_t take(int64_t count) {
        if (taken.load(std::memory_order_relaxed) >= count)
            return -1;
        const int64_t piece = taken.fetch_add(1, std::memory_order_relaxed);
        return piece < count ? piece : -1;
    }
};

template <typename Store>
static inline void store_all(const Part& part, const Store& store) {
    for (int64_t column = 0; column < part.columns; column += stored_columns)
        store(0, part.rows, column);
}

// Writes what the sums of so many rows start from, for a microkernel that cuts K.
static inline void start_sums(int64_t rows, const Panel& w, int32_t* block) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < panel_columns; ++j)
            block[i * panel_columns + j] = w.start ? w.start[j] : 0;
}

// Calls tile(row, its number of rows as a constant) for tiles of up to six rows. 16 rows are 6 + 5 + 5, not 6 + 6 + 4: small
// tiles wait for the weight.
template <typename Tile>
static inline void for_tiles_of_six(int64_t count, const Tile& tile) {
    for (int64_t row = 0, tiles = (count + 5) / 6; tiles > 0; --tiles) {
        const int64_t rows = (count - row + tiles - 1) / tiles;
        switch (rows) {
            case 1: tile(row, std::integral_constant<int, 1>()); break;
            case 2: tile(row, std::integral_constant<int, 2>()); break;
            case 3: tile(row, std::integral_constant<int, 3>()); break;
            case 4: tile(row, std::integral_constant<int, 4>()); break;
            case 5: tile(row, std::integral_constant<int, 5>()); break;
            default: tile(row, std::integral_constant<int, 6>()); break;
        }
        row += rows;
    }
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
