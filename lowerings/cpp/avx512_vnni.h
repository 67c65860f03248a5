// AVX-512 VNNI: `vpdpbusd` on 16 columns and 4 k at once, a tile of up to 6 × 64 in 24 of the 32 registers.
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
        store_all(part, store);
        for_tiles_of_six(x.count, [&](int64_t row, auto rows) {
            tile<rows>(x.data + row * x.stride, x.stride, w, ahead(w), block + row * panel_columns);
        });
        part = {x.first, w.first, x.count, w.columns};
    }

 private:
    int64_t k_;

    // Return how far ahead the next tile fetches. For each 256 bytes of its panel, it fetches one line of 64 of the panel
    // behind: the first four tiles another line each; of two or three, two every second line, and the hardware's own
    // prefetcher takes what is between. 0 is where the tile reads anyway.
    int64_t ahead(Panel& w) const {
        const int64_t tiles = (w.rows + row_tile - 1) / row_tile, shares = tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
        const int64_t tile = w.tiles++;
        return tile < shares ? (k_ + 63) / 64 * 4096 + tile * (256 / shares) : 0;
    }

    // ahead: from what is multiplied to what is fetched meanwhile, in bytes.
    template <int ROWS>
    QFUSE_TARGET_AVX512_VNNI __attribute__((noinline)) void tile(
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
                    multiply<ROWS>(acc[s], Memory{a + s * part, stride}, b + 64 * s * part, ahead);
            }
            if (STREAMS > 1)
                ahead += (k_ + 63) / 64 * 4096 - 64 * part;
        }
        a += (STREAMS - 1) * part, b += 64 * (STREAMS - 1) * part;
        for (; a < end; a += 4, b += 256)
            multiply<ROWS>(acc[0], Memory{a, stride}, b, ahead);
        if (k_ % 4)
            multiply<ROWS>(acc[0], last, b, ahead);
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
    QFUSE_TARGET_AVX512_VNNI __attribute__((always_inline)) static inline void multiply(
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
