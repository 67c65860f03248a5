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
        const int64_t most = x.count == 1 ? max_rows * most_k : most_k; // as many as `rows_` holds
        for (int64_t k = 0; k < k_; k += most) {
            const int64_t length = std::min(most, k_ - k), pairs = (length + 63) / 64 * 32;
            const int8_t* const columns = w.data + panel_columns * k;
            for (int64_t i = 0; i < x.count; ++i)
                split_row(x.data + i * x.stride + k, length, row(i));
            if (x.count == 1) {
                one_row(rows_, columns, pairs, block);
            } else if (x.count > unsplit_rows) {
                split_columns(columns, pairs);
                add_split(x.count, pairs, block);
            } else {
                for (int64_t pair = 0; pair < pairs; pair += few_pairs)
                    add(x.count, pair, columns + pair_bytes * pair, std::min(few_pairs, pairs - pair), block);
            }
        }
        part = {x.first, w.first, x.count, w.columns};
    }

 private:
    static constexpr int64_t most_k = 512, most_pairs = most_k / 2; // of a panel that is split: 64 KiB in the second-level cache
    static constexpr int64_t unsplit_rows = 30; // up to so many, splitting the panel is not worth while
    static constexpr int64_t few_pairs = 64; // that those are multiplied by at once: 8 KiB of the panel
    static constexpr int64_t pair_bytes = 2 * panel_columns; // of the panel

    int64_t k_;
    alignas(64) Pair rows_[max_rows * most_pairs]; // or one row, longer
    alignas(64) Pair columns_[panel_columns / 16][most_pairs][16];
    const int8_t* columns_from_ = nullptr; // what is split there: all calls are for one weight

    Pair* row(int64_t i) { return rows_ + i * most_pairs; }

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

    // Add the products of rows and columns that are split.
    void add_split(int64_t count, int64_t pairs, int32_t* block) {
        for (int64_t column = 0; column < panel_columns; column += 16)
            for_tiles_of_six(count, [&](int64_t first, auto rows) {
                split_tile<rows>(row(first), columns_[column / 16], pairs, block + first * panel_columns + column);
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
                    add_products(sums.of[i][j], row, column[j]);
            }
        }
        sums.store(out);
    }

    // Add the products of one row, and of columns that are not split: of four quarters of K in turn, because Zen 3 reads memory
    // faster in four places than in one. Each place fetches so many bytes ahead, and at its end what it will read first in the
    // next panel, which lies as far behind that quarter as the other three are long.
    QFUSE_TARGET_AVX2 __attribute__((noinline)) static void one_row(
        const Pair* row, const int8_t* columns, int64_t pairs, int32_t* out) {
        constexpr int64_t ahead = 8192;
        const int64_t quarter = pairs / 64 * 16;
        Sums<1, 8> sums(out);
        for (int64_t p = 0; p < quarter; p += 16) {
            const bool is_near_end = pair_bytes * (quarter - p) <= ahead;
            const int64_t fetched = is_near_end ? ahead + pair_bytes * (pairs - quarter) : ahead;
            for (int64_t four = 0; four < 8; ++four)
#pragma GCC unroll 4
                for (int place = 0; place < 4; ++place) {
                    const int64_t at = place * quarter + p;
                    multiply(sums, row + at + four, columns + pair_bytes * (at + 2 * four), fetched);
                }
        }
        for (int64_t p = 4 * quarter; p < pairs; p += 16)
            for (int64_t four = 0; four < 8; ++four)
                multiply(sums, row + p + four, columns + pair_bytes * (p + 2 * four), ahead);
        sums.store(out);
    }

    // Add the products of few rows, by their pairs from `pair` on, and of columns that are not split. Two rows read more
    // columns at once.
    void add(int64_t count, int64_t pair, const int8_t* columns, int64_t pairs, int32_t* block) {
        if (count == 2) {
            for (int64_t column = 0; column < panel_columns; column += 32)
                tile<2, 4>(rows_ + pair, columns + 4 * column, pairs, block + column);
            return;
        }
        for (int64_t column = 0; column < panel_columns; column += 16)
            for_tiles_of_six(count, [&](int64_t first, auto rows) {
                tile<rows, 2>(row(first) + pair, columns + 4 * column, pairs, block + first * panel_columns + column);
            });
    }

    // Rows by 8 · VECTORS columns, which fetches what comes behind them, in this panel or in the next.
    template <int ROWS, int VECTORS>
    QFUSE_TARGET_AVX2 __attribute__((noinline)) static void tile(
        const Pair* rows, const int8_t* columns, int64_t pairs, int32_t* out) {
        Sums<ROWS, VECTORS> sums(out);
        for (const Pair* const end = rows + pairs; rows < end; rows += 16)
            for (int64_t four = 0; four < 8; ++four, columns += 2 * pair_bytes)
                multiply(sums, rows + four, columns, pair_bytes * few_pairs);
        sums.store(out);
    }

    // Add the products of four k, and fetch so many bytes ahead.
    template <int ROWS, int VECTORS>
    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline void multiply(
        Sums<ROWS, VECTORS>& sums, const Pair* rows, const int8_t* columns, int64_t ahead) {
#pragma GCC unroll 4
        for (int line = 0; line < VECTORS / 2; ++line)
            _mm_prefetch(reinterpret_cast<const char*>(columns) + ahead + 64 * line, ROWS == 1 ? _MM_HINT_T1 : _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j += 2) { // of two, as many as registers are left
                const __m256i* const bytes = reinterpret_cast<const __m256i*>(columns + 32 * j);
                const __m256i left = _mm256_loadu_si256(bytes), right = _mm256_loadu_si256(bytes + 1);
                const __m256i column[2] = {
                    half ? second_of(left) : first_of(left), half ? second_of(right) : first_of(right)};
#pragma GCC unroll 6
                for (int i = 0; i < ROWS; ++i) {
                    const __m256i row = broadcast(rows + i * most_pairs + 8 * half);
                    add_products(sums.of[i][j], row, column[0]);
                    add_products(sums.of[i][j + 1], row, column[1]);
                }
            }
    }

    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline __m256i broadcast(const Pair* pair) {
        int32_t bits;
        std::memcpy(&bits, pair, 4);
        return _mm256_set1_epi32(bits);
    }

    // sums += products of 8 pairs. Not the intrinsic: GCC adds products to each other first, and spills them and the sums.
    QFUSE_TARGET_AVX2 __attribute__((always_inline)) static inline void add_products(
        __m256i& sums, __m256i row, __m256i column) {
        __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sums) : "x"(_mm256_madd_epi16(row, column)));
    }
};

} // namespace qfuse
#endif
