// Any CPU: vectors of float, by the extension that GCC and Clang share. The sum of 256 products of a uint8 and an int8 is
// below 2^24, and exact in float32; such parts are summed in int32.
#ifndef QFUSE_PORTABLE
#define QFUSE_PORTABLE
namespace qfuse {

class Portable {
 public:
    static constexpr int64_t row_tile = 4;
    static constexpr int64_t max_rows = 48;

    Portable(int64_t k, bool) : k_(k) {}

    template <typename Store>
    void operator()(const Rows& x, const Panel& w, int32_t* block, Part& part, const Store& store) const {
        store_all(part, store);
        start_sums(x.count, w, block);
        for (int64_t k = 0; k < k_; k += exact_length) {
            const int64_t length = std::min(exact_length, k_ - k);
            alignas(64) float columns[exact_length][panel_columns];
            for (int64_t i = 0; i < length; ++i)
                for (int64_t j = 0; j < panel_columns; ++j)
                    columns[i][j] = w.data[panel_columns * ((k + i) / 4 * 4) + 4 * j + i % 4];
            for (int64_t row = 0; row < x.count; row += row_tile)
                add(x, row, k, length, columns, block);
        }
        part = {x.first, w.first, x.count, w.columns};
    }

 private:
    static constexpr int64_t exact_length = 256;
    typedef float Floats __attribute__((vector_size(64), aligned(64), may_alias));
    typedef int32_t Ints __attribute__((vector_size(64), aligned(64), may_alias));
    typedef uint32_t Unsigned __attribute__((vector_size(64), aligned(64), may_alias)); // sums are modulo 2^32

    int64_t k_;

    // Add the products of `length` k, from k on, of four rows from `row` on.
    static void add(const Rows& x, int64_t row, int64_t k, int64_t length, const float (*columns)[panel_columns],
                    int32_t* block) {
        float activation[row_tile][exact_length] = {};
        const int64_t rows = std::min(row_tile, x.count - row);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t u = 0; u < length; ++u)
                activation[i][u] = x.data[(row + i) * x.stride + k + u];
        for (int64_t j = 0; j < panel_columns; j += 16) {
            Floats acc[row_tile] = {};
            for (int64_t u = 0; u < length; ++u) {
                const Floats column = *reinterpret_cast<const Floats*>(columns[u] + j);
#pragma GCC unroll 4
                for (int64_t i = 0; i < row_tile; ++i)
                    acc[i] += activation[i][u] * column;
            }
            for (int64_t i = 0; i < rows; ++i)
                *reinterpret_cast<Unsigned*>(block + (row + i) * panel_columns + j) +=
                    reinterpret_cast<Unsigned>(__builtin_convertvector(acc[i], Ints));
        }
    }
};

} // namespace qfuse
#endif
