// AVX-512 VNNI: `vpdpbusd` on 16 columns and 4 k at once, a tile of up to 6 × 32 in 12 of the 32 registers. The others are for
// what stores the tile before meanwhile.
#ifndef QFUSE_AVX512_VNNI
#define QFUSE_AVX512_VNNI
#define QFUSE_TARGET_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
namespace qfuse {

// acc += four unsigned bytes of `row` times four signed ones of `column`, for 16 columns. Not the intrinsic: around that
// GCC moves code over the edges of the loop, and spills every accumulator inside it (GCC 12: a third of the speed).
QFUSE_TARGET_AVX512_VNNI __attribute__((always_inline)) static inline void dpbusd(
    __m512i& acc, __m512i row, __m512i column) {
    __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(row), "v"(column));
}

// The same in a register that is named, or GCC keeps sums in memory that are used on both sides of a call, or of much code. (The
// register is the instruction's only: what is called meanwhile may use it.)
template <int REGISTER>
static inline void dpbusd_in(__m512i& acc, __m512i row, __m512i column);

#define QFUSE_DPBUSD_IN(REGISTER)                                                                                 \
    template <>                                                                                                   \
    QFUSE_TARGET_AVX512_VNNI __attribute__((always_inline)) inline void dpbusd_in<REGISTER>(                       \
        __m512i& acc, __m512i row, __m512i column) {                                                              \
        register __m512i named __asm__("zmm" #REGISTER) = acc;                                                     \
        __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(named) : "v"(row), "v"(column));                             \
        acc = named;                                                                                              \
    }
QFUSE_DPBUSD_IN(20)
QFUSE_DPBUSD_IN(21)
QFUSE_DPBUSD_IN(22)
QFUSE_DPBUSD_IN(23)
QFUSE_DPBUSD_IN(24)
QFUSE_DPBUSD_IN(25)
QFUSE_DPBUSD_IN(26)
QFUSE_DPBUSD_IN(27)
QFUSE_DPBUSD_IN(28)
QFUSE_DPBUSD_IN(29)
QFUSE_DPBUSD_IN(30)
QFUSE_DPBUSD_IN(31)
#undef QFUSE_DPBUSD_IN

// How one or two rows, which read more weight than they compute, read it: K is cut into so many streams, which fetch so far
// ahead, in bytes. What is best is the memory's, not the instruction's: a Xeon with AMX reads memory faster in four places
// than in one, and Zen 4, which has no AMX, is slowed down by fetching into the first-level cache. (Inductor compiles for the
// CPU it runs on.)
#ifdef __AMX_TILE__
template <int ROWS>
constexpr int weight_streams = 4 / ROWS;
constexpr int64_t weight_ahead = 1024;
constexpr auto weight_hint = _MM_HINT_T0;
#else
template <int ROWS>
constexpr int weight_streams = 2;
constexpr int64_t weight_ahead = 2048;
constexpr auto weight_hint = _MM_HINT_T1;
#endif

class Avx512Vnni {
 public:
    static constexpr int64_t row_tile = 6;
    static constexpr int64_t max_rows = 48;

    Avx512Vnni(int64_t k, bool) : k_(k) {}

    template <typename Store>
    void operator()(const Rows& x, Panel& w, int32_t* block, Part& part, const Store& store) const {
        const bool wide = x.count <= 2 || is_wide(w.rows);
        if (wide || part.columns > stored_columns) {
            store_all(part, store);
            part = {};
        }
        if (wide) {
            for_tiles_of_six(x.count, [&](int64_t row, auto rows) {
                wide_tile<rows>(x.data + row * x.stride, x.stride, w, ahead(w), block + row * panel_columns);
            });
            part = {x.first, w.first, x.count, w.columns};
            return;
        }
        for (int64_t column = 0; column < w.columns; column += stored_columns) {
            int64_t number = w.tiles;
            for_tiles_of_six(x.count, [&](int64_t row, auto rows) {
                if constexpr (rows > 2)
                    tile<rows>(x.data + row * x.stride, x.stride, w, column, number++, block, part, store);
                part = {x.first + row, w.first + column, rows, std::min(stored_columns, w.columns - column)};
            });
        }
        w.tiles += (x.count + row_tile - 1) / row_tile;
    }

 private:
    int64_t k_;

    // Whether tiles have 64 columns, and store nothing meanwhile: where K is so long that storing takes little of the time, and
    // where few rows wait for the weight, which is read best in one piece. Two or three tiles that read it by halves fetch all
    // of the next panel between them.
    bool is_wide(int64_t rows) const { return rows <= 8 || (rows > 18 && k_ > 1024); }

    // Return how far ahead the next wide tile fetches. For each 256 bytes of its panel, it fetches one line of 64 of the panel
    // behind: the first four tiles another line each; of two or three, two every second line, and the hardware's own
    // prefetcher takes what is between. 0 is where the tile reads anyway.
    int64_t ahead(Panel& w) const {
        const int64_t tiles = (w.rows + row_tile - 1) / row_tile, shares = tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
        const int64_t tile = w.tiles++;
        return tile < shares ? panel_bytes() + tile * (256 / shares) : 0;
    }

    int64_t panel_bytes() const { return (k_ + 63) / 64 * 4096; }

    // Rows by 32 columns. The rows of the part before are stored between as many shares of the steps and one more: the CPU looks
    // only some hundred instructions ahead, and would multiply nothing while it stores a whole block. Nor does it at once: what
    // was just stored cannot be loaded for a while, and what waits for it takes the places of what could go on. `number` counts
    // the tiles that pass by these columns: of the next panel, each of the first two fetches a line for each step.
    template <int ROWS, typename Store>
    QFUSE_TARGET_AVX512_VNNI __attribute__((noinline)) void tile(
        const uint8_t* a, int64_t stride, const Panel& w, int64_t column, int64_t number, int32_t* out, const Part& before,
        const Store& store) const {
        const int8_t* b = w.data + 4 * column;
        const uint8_t* const end = a + k_ / 4 * 4;
        const int64_t share = k_ / 4 / (before.rows + 1) * 4, ahead = number < 2 ? panel_bytes() + 64 * number : 0;
        const Tail<ROWS> last(a, stride, k_); // before there are sums, which calls would spill
        __m512i sums[ROWS][2];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j)
                sums[i][j] = w.start ? _mm512_loadu_si512(w.start + column + 16 * j) : _mm512_setzero_si512();
        for (int64_t row = 0;; ++row) {
            const uint8_t* const until = row < before.rows ? a + share : end;
            for (; a < until; a += 4, b += 256)
                multiply(sums, Memory{a, stride}, b, ahead, std::make_integer_sequence<int, ROWS>());
            if (row >= before.rows)
                break;
            store_row(store, row);
        }
        if (k_ % 4)
            multiply(sums, last, b, ahead, std::make_integer_sequence<int, ROWS>());
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j)
                _mm512_storeu_si512(out + i * panel_columns + 16 * j, sums[i][j]);
    }

    // A function of its own, which leaves most registers to the sums (GCC sees which it needs): inlined, its constants would
    // take their places.
    template <typename Store>
    __attribute__((noinline, flatten)) static void store_row(const Store& store, int64_t row) {
        store(row, row + 1, 0);
    }

    // Four k of each row, times 32 columns.
    template <int ROWS, typename Four, int... I>
    QFUSE_TARGET_AVX512_VNNI __attribute__((always_inline)) static inline void multiply(
        __m512i (&sums)[ROWS][2], const Four& four, const int8_t* b, int64_t ahead, std::integer_sequence<int, I...>) {
        const __m512i columns[2] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 64)};
        _mm_prefetch(reinterpret_cast<const char*>(b) + ahead, _MM_HINT_T1);
        (multiply_row<I>(sums[I], _mm512_set1_epi32(four[I]), columns), ...);
    }

    template <int I>
    QFUSE_TARGET_AVX512_VNNI __attribute__((always_inline)) static inline void multiply_row(
        __m512i (&sums)[2], __m512i row, const __m512i (&columns)[2]) {
        dpbusd_in<20 + 2 * I>(sums[0], row, columns[0]);
        dpbusd_in<21 + 2 * I>(sums[1], row, columns[1]);
    }

    // Rows by 64 columns. ahead: from what is multiplied to what is fetched meanwhile, in bytes.
    template <int ROWS>
    QFUSE_TARGET_AVX512_VNNI __attribute__((noinline)) void wide_tile(
        const uint8_t* a, int64_t stride, const Panel& w, int64_t ahead, int32_t* out) const {
        // Each stream has sums of its own. At its end it fetches where it will begin in the panel behind.
        constexpr int STREAMS = ROWS <= 2 ? weight_streams<ROWS> : 1;
        if (STREAMS > 1)
            ahead = weight_ahead;
        const int8_t* b = w.data;
        const int64_t part = k_ / 4 / STREAMS * 4, usual = STREAMS > 1 ? std::max<int64_t>(0, part - weight_ahead / 64) : part;
        const uint8_t* const end = a + k_ / 4 * 4;
        const Tail<ROWS> last(a, stride, k_); // before there are accumulators, which calls would spill
        __m512i acc[STREAMS][ROWS][4];
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; ++s)
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    acc[s][i][j] = w.start && s == 0 ? _mm512_load_si512(w.start + 16 * j) : _mm512_setzero_si512();
        for (const int64_t count : {usual, part - usual}) {
            for (const uint8_t* end = a + count; a < end; a += 4, b += 256) {
#pragma GCC unroll 4
                for (int s = 0; s < STREAMS; ++s)
                    multiply_wide<ROWS>(acc[s], Memory{a + s * part, stride}, b + 64 * s * part, ahead);
            }
            if (STREAMS > 1)
                ahead += panel_bytes() - 64 * part;
        }
        a += (STREAMS - 1) * part, b += 64 * (STREAMS - 1) * part;
        for (; a < end; a += 4, b += 256)
            multiply_wide<ROWS>(acc[0], Memory{a, stride}, b, ahead);
        if (k_ % 4)
            multiply_wide<ROWS>(acc[0], last, b, ahead);
#pragma GCC unroll 4
        for (int s = 1; s < STREAMS; ++s)
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    acc[0][i][j] = _mm512_add_epi32(acc[0][i][j], acc[s][i][j]);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                _mm512_storeu_si512(out + i * panel_columns + 16 * j, acc[0][i][j]);
    }

    // Four k of each row, times 64 columns.
    template <int ROWS, typename Four>
    QFUSE_TARGET_AVX512_VNNI __attribute__((always_inline)) static inline void multiply_wide(
        __m512i (&acc)[ROWS][4], const Four& four, const int8_t* b, int64_t ahead) {
        constexpr int LINES = ROWS <= 2 ? 4 : 1;
        __m512i column[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            column[j] = _mm512_loadu_si512(b + 64 * j);
            if (j < LINES)
                _mm_prefetch(
                    reinterpret_cast<const char*>(b) + 64 * j + ahead, ROWS <= 2 ? weight_hint : _MM_HINT_T1);
        }
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            const __m512i row = _mm512_set1_epi32(four[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                dpbusd(acc[i][j], row, column[j]);
        }
    }
};

} // namespace qfuse
#endif
