// AVX2 without VNNI: `vpmaddwd` multiplies integers of 16 bits, 8 columns and 2 k at once. Not `vpmaddubsw`, which takes bytes:
// its sums of two products saturate. Rows are split into integers of 16 bits in each call, and so is the panel for many rows.
#ifndef QFUSE_AVX2
#define QFUSE_AVX2
#define QFUSE_TARGET_AVX2 __attribute__((target("avx2")))
namespace qfuse {

// Two k of a row or a column. Bytes 0 1 2 3 of each four are the pairs (0, 2) and (1, 3), which takes shifts and no shuffles; of
// 32 k there are 8 × (0, 2), and then 8 × (1, 3).
typedef int16_t Pair[2];

// SIGNED: whether rows are int8.
template <bool SIGNED>
class Avx2 {
 public:
    static constexpr int64_t row_tile = 6;
    static constexpr int64_t max_rows = 48;

    Avx2(int64_t k, bool) : k_(k) {}

    template <typename Store>
    void operator()(const Rows& x, Panel& w, int32_t* block, Part& part, const Store& store) {
        store_all(part, store);
        start_sums(x.count, w, block);
        for (int64_t k = 0; k < k_; k += most_k) {
            const int64_t length = std::min(most_k, k_ - k), pairs = (length + 63) / 64 * 32;
            const int8_t* const columns = w.data + panel_columns * k;
            for (int64_t i = 0; i < x.count; ++i)
                split_row(x.data + i * x.stride + k, length, rows_[i]);
            if (x.count > unsplit_rows) {
                split_columns(columns, pairs);
                add_split(x.count, pairs, block);
            } else {
                for (int64_t first = 0; first < pairs; first += few_pairs)
                    add(x.count, first, columns + 128 * first, std::min(few_pairs, pairs - first), block);
            }
        }
        part = {x.first, w.first, x.count, w.columns};
    }

 private:
    static constexpr int64_t most_k = 512, most_pairs = most_k / 2; // of a panel that is split: 64 KiB in the second-level cache
    static constexpr int64_t unsplit_rows = 18; // up to so many, splitting the panel is not worth while
    static constexpr int64_t few_pairs = 64; // that those are multiplied by at once: 8 KiB of the panel

    int64_t k_;
    alignas(64) Pair rows_[max_rows][most_pairs];
    alignas(64) Pair columns_[panel_columns / 16][most_pairs][16];
    const int8_t* columns_from_ = nullptr; // what is split there: all calls are for one weight

    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline __m256i first_of(__m256i bytes) {
        return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    }

    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline __m256i second_of(__m256i bytes) {
        return _mm256_srai_epi16(bytes, 8);
    }

    // Fills up with zeros to a multiple of 64 k.
    QFUSE_TARGET_AVX2 static void split_row(const uint8_t* from, int64_t length, Pair* to) {
        const __m256i low = _mm256_set1_epi16(0xff);
        for (int64_t k = 0; k < (length + 63) / 64 * 64; k += 32) {
            __m256i bytes = _mm256_setzero_si256();
            if (k + 32 <= length)
                bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
            else if (k < length)
                std::memcpy(&bytes, from + k, length - k);
            __m256i* const pairs = reinterpret_cast<__m256i*>(to + k / 2);
            _mm256_store_si256(pairs, SIGNED ? first_of(bytes) : _mm256_and_si256(bytes, low));
            _mm256_store_si256(pairs + 1, SIGNED ? second_of(bytes) : _mm256_srli_epi16(bytes, 8));
        }
    }

    // Does nothing for a panel that is still there, as a short one is for the next rows.
    QFUSE_TARGET_AVX2 void split_columns(const int8_t* from, int64_t pairs) {
        if (from == columns_from_)
            return;
        columns_from_ = from;
        for (int64_t p = 0; p < pairs; p += 16)
            for (int64_t four = 0; four < 8; ++four, from += 256)
#pragma GCC unroll 8
                for (int64_t j = 0; j < 8; ++j) {
                    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * j));
                    Pair(*const to)[16] = &columns_[j / 2][p + four];
                    _mm256_store_si256(reinterpret_cast<__m256i*>(to[0] + j % 2 * 8), first_of(bytes));
                    _mm256_store_si256(reinterpret_cast<__m256i*>(to[8] + j % 2 * 8), second_of(bytes));
                }
    }

    // Add the products of rows and columns that are split.
    void add_split(int64_t count, int64_t pairs, int32_t* block) const {
        for (int64_t column = 0; column < panel_columns; column += 16)
            for_tiles_of_six(count, [&](int64_t row, auto rows) {
                split_tile<rows>(rows_[row], columns_[column / 16], pairs, block + row * panel_columns + column);
            });
    }

    // Rows by 16 columns, in 12 of the 16 registers.
    template <int ROWS>
    QFUSE_TARGET_AVX2 __attribute__((noinline)) static void split_tile(
        const Pair* rows, const Pair (*columns)[16], int64_t pairs, int32_t* out) {
        Sums<ROWS, 2> sums(out);
        for (int64_t p = 0; p < pairs; ++p) {
            const __m256i column[2] = {
                _mm256_load_si256(reinterpret_cast<const __m256i*>(columns[p])),
                _mm256_load_si256(reinterpret_cast<const __m256i*>(columns[p] + 8)),
            };
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i) {
                const __m256i row = broadcast(rows + i * most_pairs + p);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j)
                    sums.of[i][j] = add_products(sums.of[i][j], row, column[j]);
            }
        }
        sums.store(out);
    }

    // Add the products of few rows, by their pairs from `first` on, and of columns that are not split. One or two rows read
    // more columns at once.
    void add(int64_t count, int64_t first, const int8_t* columns, int64_t pairs, int32_t* block) const {
        if (count == 1)
            return tile<1, 8>(rows_[0] + first, columns, pairs, block);
        if (count == 2) {
            for (int64_t column = 0; column < panel_columns; column += 32)
                tile<2, 4>(rows_[0] + first, columns + 4 * column, pairs, block + column);
            return;
        }
        for (int64_t column = 0; column < panel_columns; column += 16)
            for_tiles_of_six(count, [&](int64_t row, auto rows) {
                tile<rows, 2>(rows_[row] + first, columns + 4 * column, pairs, block + row * panel_columns + column);
            });
    }

    // Rows by 8 · VECTORS columns, which fetches what comes behind them, in this panel or in the next.
    template <int ROWS, int VECTORS>
    QFUSE_TARGET_AVX2 __attribute__((noinline)) static void tile(
        const Pair* rows, const int8_t* columns, int64_t pairs, int32_t* out) {
        Sums<ROWS, VECTORS> sums(out);
        for (const Pair* const end = rows + pairs; rows < end; rows += 16)
            for (int64_t four = 0; four < 8; ++four, columns += 256) {
#pragma GCC unroll 4
                for (int line = 0; line < VECTORS / 2; ++line)
                    _mm_prefetch(reinterpret_cast<const char*>(columns) + 128 * few_pairs + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j) {
                    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + 32 * j));
                    const __m256i first = first_of(bytes), second = second_of(bytes);
#pragma GCC unroll 6
                    for (int i = 0; i < ROWS; ++i) {
                        const Pair* const row = rows + i * most_pairs + four;
                        sums.of[i][j] = add_products(sums.of[i][j], broadcast(row), first);
                        sums.of[i][j] = add_products(sums.of[i][j], broadcast(row + 8), second);
                    }
                }
            }
        sums.store(out);
    }

    template <int ROWS, int VECTORS>
    struct Sums {
        __m256i of[ROWS][VECTORS];

        QFUSE_TARGET_AVX2 __attribute__((always_inline)) inline explicit Sums(const int32_t* block) {
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j)
                    of[i][j] = _mm256_load_si256(reinterpret_cast<const __m256i*>(block + i * panel_columns + 8 * j));
        }

        QFUSE_TARGET_AVX2 __attribute__((always_inline)) inline void store(int32_t* block) const {
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j)
                    _mm256_store_si256(reinterpret_cast<__m256i*>(block + i * panel_columns + 8 * j), of[i][j]);
        }
    };

    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline __m256i broadcast(const Pair* pair) {
        int32_t bits;
        std::memcpy(&bits, pair, 4);
        return _mm256_set1_epi32(bits);
    }

    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline __m256i add_products(
        __m256i sums, __m256i row, __m256i column) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(row, column));
    }
};

} // namespace qfuse
#endif
