// Plain C++, for compilers to vectorize: any CPU. Products are taken in 16 bits, where u8 · s8 fits, and summed in 32.
#ifndef QFUSE_PORTABLE
#define QFUSE_PORTABLE
namespace qfuse {

class Portable {
 public:
    static constexpr int64_t row_tile = 4;
    static constexpr int64_t max_rows = 48;

    explicit Portable(int64_t k) : k_(k) {}

    void operator()(const Rows& x, const Panel& w, float* out) const {
        for (int64_t i = 0; i < x.count; ++i) {
            const uint8_t* a = x.data + i * x.stride;
            int32_t acc[panel_columns] = {};
            for (int64_t k = 0; k < k_; k += 4) {
                int16_t four[4] = {};
                for (int64_t u = 0; u < 4 && k + u < k_; ++u)
                    four[u] = a[k + u];
                const int8_t* b = w.data + 64 * k;
                for (int64_t j = 0; j < panel_columns; ++j)
                    for (int64_t u = 0; u < 4; ++u)
                        acc[j] += four[u] * b[4 * j + u];
            }
            for (int64_t j = 0; j < panel_columns; ++j)
                out[i * panel_columns + j] =
                    static_cast<float>(acc[j] - w.compensation[j]) * x.scale[i * x.scale_stride] * w.scale[j];
        }
    }

 private:
    int64_t k_;
};

} // namespace qfuse
#endif
