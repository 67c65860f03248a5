// Signed rows for a microkernel that takes unsigned ones: shifted by 128, and kept while the same rows come again, which do not
// change as long as there is this object; and, for each panel, what sums start from, by its `column_sums`.
#ifndef QFUSE_SHIFTED
#define QFUSE_SHIFTED
namespace qfuse {

template <class Unsigned>
class Shifted : public Unsigned {
 public:
    Shifted(int64_t k, bool stores_fast) : Unsigned(k, stores_fast), k_(k) {}

    template <typename Store>
    void operator()(const Rows& x, Panel& w, int32_t* block, Part& part, const Store& store) {
        if (x.data != from_ || x.count * k_ != static_cast<int64_t>(rows_.size())) {
            rows_.resize(x.count * k_);
            for (int64_t i = 0; i < x.count; ++i)
                shift(x.data + i * x.stride, rows_.data() + i * k_);
            from_ = x.data;
        }
        Panel shifted = w;
        alignas(64) int32_t start[panel_columns];
        #pragma omp simd
        for (int64_t j = 0; j < panel_columns; ++j)
            start[j] = static_cast<int32_t>(
                static_cast<uint32_t>(w.start ? w.start[j] : 0) - 128u * static_cast<uint32_t>(w.column_sums[j]));
        shifted.start = start;
        Unsigned::operator()({rows_.data(), k_, x.first, x.count}, shifted, block, part, store);
        w.tiles = shifted.tiles;
    }

 private:
    int64_t k_;
    std::vector<uint8_t> rows_;
    const uint8_t* from_ = nullptr; // where these rows stand in int8

    // Eight bytes at once: Inductor forbids the compiler to vectorize loops.
    void shift(const uint8_t* from, uint8_t* to) const {
        int64_t k = 0;
        for (uint64_t eight; k + 8 <= k_; k += 8) {
            std::memcpy(&eight, from + k, 8);
            eight ^= 0x8080808080808080;
            std::memcpy(to + k, &eight, 8);
        }
        for (; k < k_; ++k)
            to[k] = from[k] ^ 0x80;
    }
};

} // namespace qfuse
#endif
