// AMX: `tdpbusd`, or `tdpbssd` for signed rows, on tiles of 16 × 64 bytes. More than 16 rows take two tiles of rows by two
// of columns, fewer take one by four; one or two rows are left to AVX-512 VNNI, because then the weight's bandwidth decides.
#ifndef QFUSE_AMX
#define QFUSE_AMX
#define QFUSE_TARGET_AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
namespace qfuse {

template <bool SIGNED>
using WithoutAmx = std::conditional_t<SIGNED, Shifted<Avx512Vnni>, Avx512Vnni>;

#if !QFUSE_COMPILER_IS_OLD

// Tiles are numbered by literals.
#define QFUSE_TILE_MULTIPLY(sums, rows, columns)    \
    if constexpr (SIGNED)                           \
        _tile_dpbssd(sums, rows, columns);          \
    else                                            \
        _tile_dpbusd(sums, rows, columns)

template <bool SIGNED>
class Amx {
 public:
    static constexpr int64_t row_tile = 32;
    static constexpr int64_t max_rows = 32;

    Amx(int64_t k, bool stores_fast) : k_(k), waits_(stores_fast && k > 64), few_(k, stores_fast), granted_(may_use_amx()) {}
    Amx(const Amx&) = delete;
    Amx& operator=(const Amx&) = delete;
    QFUSE_TARGET_AMX ~Amx() {
        if (configured_ > 0)
            _tile_release();
    }

    template <typename Store>
    QFUSE_TARGET_AMX void operator()(const Rows& x, Panel& w, int32_t* block, Part& part, const Store& store) {
        if (x.count < fewest_rows || !granted_) {
            few_(x, w, block, part, store);
            return;
        }
        if (configured_ != x.count)
            configure(x.count);
        alignas(64) uint8_t tail[max_rows][64]; // the last k of the rows: past the end of the last one is not ours
        if (k_ % 64) {
            for (int64_t i = 0; i < x.count; ++i) {
                std::memset(tail[i], 0, 64);
                std::memcpy(tail[i], x.data + i * x.stride + k_ / 64 * 64, k_ % 64);
            }
        }
        if (x.count > 16) {
            for (int64_t column = 0; column < w.columns; column += 32) {
                two_by_two(x, w, column, tail[0], block, part, store);
                part = {x.first, w.first + column, x.count, std::min<int64_t>(32, w.columns - column)};
            }
        } else {
            one_by_four(x, w, tail[0], block, part, store);
            part = {x.first, w.first, x.count, w.columns};
        }
    }

 private:
    static constexpr int64_t fewest_rows = 3;

    int64_t k_;
    bool waits_; // for a step before more than 16 rows begin to store the part before: just stored by AMX, it cannot be loaded
    WithoutAmx<SIGNED> few_;
    bool granted_;
    int64_t configured_ = 0;

    // Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.
    QFUSE_TARGET_AMX void configure(int64_t rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        const auto first = static_cast<uint8_t>(rows < 16 ? rows : 16), second = static_cast<uint8_t>(rows - first);
        const uint8_t by_tile[2][8] = {
            {first, first, first, first, first, first, 16, 16},
            {first, first, second, second, first, second, 16, 16},
        };
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes[tile] = 64;
            config.rows[tile] = by_tile[second > 0][tile];
        }
        // GCC 12 believes that the next reads 8 of the 64 bytes, and may leave out what sets the others.
        __asm__ volatile("" : "+m"(config));
        _tile_loadconfig(&config);
        configured_ = rows;
    }

    // AMX multiplies by itself, but the window in which the CPU looks for something to do is shorter than a block: so
    // between its instructions are those that store rows of the part before, some at each step.
    template <typename Store>
    class Between {
     public:
        Between(const Part& part, const Store& store, int64_t steps)
            : store_(store), rows_(part.rows), rows_a_step_((max_rows + steps - 1) / steps) {
            for (int64_t column = stored_columns; column < part.columns; column += stored_columns)
                store(0, rows_, column); // of 16 rows or fewer, which have 64 columns
        }
        __attribute__((always_inline)) inline void step() { store_to(std::min(rows_, row_ + rows_a_step_)); }
        __attribute__((always_inline)) inline void rest() { store_to(rows_); }

     private:
        const Store& store_;
        int64_t row_ = 0, rows_, rows_a_step_;
        __attribute__((always_inline)) inline void store_to(int64_t row) {
            if (row_ < row)
                store_(row_, row, 0);
            row_ = row;
        }
    };

    // What the sums of 16 columns start from is the same in each row of a tile: a stride of 0. To load zeros would take longer.
    QFUSE_TARGET_AMX __attribute__((noinline)) static void load_start(
        const int32_t* of_0, const int32_t* of_1, const int32_t* of_2, const int32_t* of_3) {
        __asm__ volatile("" : : : "memory"); // GCC 12's `_tile_loadd` does not tell that it reads memory
        _tile_loadd(0, of_0, 0);
        _tile_loadd(1, of_1, 0);
        _tile_loadd(2, of_2, 0);
        _tile_loadd(3, of_3, 0);
    }

    // Neither does it here. The rows, the weight and `tail` were written before a function was called that is not inlined.
    QFUSE_TARGET_AMX __attribute__((always_inline)) static inline void multiply_two_by_two(
        const uint8_t* a, int64_t stride, const int8_t* b) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 256);
        _tile_loadd(7, b + 64, 256);
        QFUSE_TILE_MULTIPLY(0, 4, 6);
        _tile_loadd(5, a + 16 * stride, stride);
        QFUSE_TILE_MULTIPLY(1, 4, 7);
        QFUSE_TILE_MULTIPLY(2, 5, 6);
        QFUSE_TILE_MULTIPLY(3, 5, 7);
    }

    // 17 to 32 rows by 32 columns. Meanwhile the part before is stored, and some of the next panel fetched.
    template <typename Store>
    QFUSE_TARGET_AMX __attribute__((noinline)) void two_by_two(
        const Rows& x, Panel& w, int64_t column, const uint8_t* tail, int32_t* block, const Part& before,
        const Store& store) const {
        const int64_t steps = (k_ + 63) / 64;
        Between<Store> between(before, store, steps - waits_);
        const int64_t calls = (w.rows + 31) / 32 * 2, lines = std::max<int64_t>(4, (64 + calls - 1) / calls);
        const char* next = reinterpret_cast<const char*>(w.data) + 4096 * steps + 64 * lines * steps * w.tiles;
        const char* const next_end = reinterpret_cast<const char*>(w.data) + 2 * 4096 * steps;
        ++w.tiles;
        const int8_t* b = w.data + 4 * column;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (w.start)
            load_start(w.start + column, w.start + column + 16, w.start + column, w.start + column + 16);
        int64_t k = 0;
        for (; k + 64 <= k_; k += 64) {
            multiply_two_by_two(x.data + k, x.stride, b + 64 * k);
            for (const char* end = std::min(next_end, next + 64 * lines); next < end; next += 64)
                _mm_prefetch(next, _MM_HINT_T1);
            if (k > 0 || !waits_)
                between.step();
        }
        if (k < k_)
            multiply_two_by_two(tail, 64, b + 64 * k);
        between.rest();
        _tile_stored(0, block, 256);
        _tile_stored(1, block + 16, 256);
        _tile_stored(2, block + 16 * panel_columns, 256);
        _tile_stored(3, block + 16 * panel_columns + 16, 256);
    }

    QFUSE_TARGET_AMX __attribute__((always_inline)) static inline void multiply_one_by_four(
        const uint8_t* a, int64_t stride, const int8_t* b) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 256);
        QFUSE_TILE_MULTIPLY(0, 4, 6);
        _tile_loadd(7, b + 64, 256);
        QFUSE_TILE_MULTIPLY(1, 4, 7);
        _tile_loadd(6, b + 128, 256);
        QFUSE_TILE_MULTIPLY(2, 4, 6);
        _tile_loadd(7, b + 192, 256);
        QFUSE_TILE_MULTIPLY(3, 4, 7);
    }

    // Not the intrinsic: GCC 12 takes a function that does nothing but fetch for one without effects, and leaves it out.
    __attribute__((always_inline)) static inline void fetch_16_lines(const int8_t* b, const int8_t* c) {
#pragma GCC unroll 16
        for (int64_t line = 0; line < 16; ++line)
            __asm__ volatile("prefetcht0 %0\n\tprefetcht0 %1" : : "m"(b[64 * line]), "m"(c[64 * line]));
    }

    // The same at two places of K at once, a tile of each in turn, and so are the lines that are fetched: memory is read
    // faster in two places than in one (docs/cpu.md). 6 KiB ahead: with a multiple of 4 KiB, which is where a line lies
    // in the first-level cache, what is fetched would push out what is about to be read.
    QFUSE_TARGET_AMX __attribute__((always_inline)) static inline void multiply_one_by_four_twice(
        const uint8_t* a, int64_t stride, const int8_t* b, int64_t part) {
        const int8_t* const c = b + 64 * part;
        _tile_loadd(4, a, stride);
        _tile_loadd(5, a + part, stride);
        _tile_loadd(6, b, 256);
        QFUSE_TILE_MULTIPLY(0, 4, 6);
        _tile_loadd(7, c, 256);
        QFUSE_TILE_MULTIPLY(0, 5, 7);
        fetch_16_lines(b + 6144, c + 6144);
        _tile_loadd(6, b + 64, 256);
        QFUSE_TILE_MULTIPLY(1, 4, 6);
        _tile_loadd(7, c + 64, 256);
        QFUSE_TILE_MULTIPLY(1, 5, 7);
        fetch_16_lines(b + 6144 + 1024 * 1, c + 6144 + 1024 * 1);
        _tile_loadd(6, b + 128, 256);
        QFUSE_TILE_MULTIPLY(2, 4, 6);
        _tile_loadd(7, c + 128, 256);
        QFUSE_TILE_MULTIPLY(2, 5, 7);
        fetch_16_lines(b + 6144 + 1024 * 2, c + 6144 + 1024 * 2);
        _tile_loadd(6, b + 192, 256);
        QFUSE_TILE_MULTIPLY(3, 4, 6);
        _tile_loadd(7, c + 192, 256);
        QFUSE_TILE_MULTIPLY(3, 5, 7);
        fetch_16_lines(b + 6144 + 1024 * 3, c + 6144 + 1024 * 3);
    }

    // Up to 16 rows by 64 columns. Meanwhile the part before is stored.
    template <typename Store>
    QFUSE_TARGET_AMX __attribute__((noinline)) void one_by_four(
        const Rows& x, const Panel& w, const uint8_t* tail, int32_t* block, const Part& before,
        const Store& store) const {
        const int64_t part = k_ / 128 * 64;
        Between<Store> between(before, store, std::max<int64_t>(1, part / 64));
        const int8_t* b = w.data;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (w.start)
            load_start(w.start, w.start + 16, w.start + 32, w.start + 48);
        int64_t k = 0;
        for (; k < part; k += 64) {
            multiply_one_by_four_twice(x.data + k, x.stride, b + 64 * k, part);
            between.step();
        }
        for (k = 2 * part; k + 64 <= k_; k += 64)
            multiply_one_by_four(x.data + k, x.stride, b + 64 * k);
        if (k < k_)
            multiply_one_by_four(tail, 64, b + 64 * k);
        between.rest();
        _tile_stored(0, block, 256);
        _tile_stored(1, block + 16, 256);
        _tile_stored(2, block + 32, 256);
        _tile_stored(3, block + 48, 256);
    }
};

#else // GCC 10 does not know AMX

template <bool SIGNED>
class Amx : public WithoutAmx<SIGNED> {
 public:
    static constexpr int64_t max_rows = 32;
    using WithoutAmx<SIGNED>::WithoutAmx;
};

#endif
} // namespace qfuse
#endif
