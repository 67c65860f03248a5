// Attention of bfloat16 by AVX-512: `vdpbf16ps` on 16 columns and two of the depth at once, for 8 rows by 32 columns, half of the
// registers. Of a tile, rows behind the last are computed from whatever stands there, and not stored.
#ifndef QFUSE_ATTENTION_AVX512_BF16
#define QFUSE_ATTENTION_AVX512_BF16
namespace qfuse {
namespace {

template <typename T, int64_t D>
class Avx512Bf16Attention : public Bf16Attention<T, D> {
    using Base = Bf16Attention<T, D>;
    using Base::count_, Base::k_, Base::v_, Base::q_, Base::scores_;

 public:
    using Base::Base, Base::padded_head;
    static constexpr int64_t sums_rows = 8; // by 2 vectors: half of the registers

    float* scores(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += 32)
            for (int64_t row = 0; row < count_; row += sums_rows)
                multiply(
                    q_ + row * padded_head, padded_head, k_.data() + (first + key) * padded_head, padded_head * 16, 512,
                    padded_head, true, scores_ + row * score_stride + key, score_stride);
        return scores_;
    }

    // sums (+)= weights · values, [rows][padded_head]
    void add(int64_t first, int64_t count, bool is_first, float* sums) const {
        const auto* weights = reinterpret_cast<const uint16_t*>(scores_);
        for (int64_t d = 0; d < padded_head; d += 32)
            for (int64_t row = 0; row < count_; row += sums_rows)
                multiply(
                    weights + row * 2 * score_stride, 2 * score_stride, v_.data() + first * padded_head + d * 32, 512,
                    padded_head * 32, count, is_first, sums + row * padded_head + d, padded_head);
    }

 private:
    // out[8][32] (+)= a[8][depth] · b[depth][32]. b: tiles of 32 of the depth by 16 columns; `right` and `down` are the distances
    // of the tile of the next columns, and of the next 32 of the depth. Not added up in `out` one by one: shorter sums are more
    // exact.
    QFUSE_TARGET_BF16 __attribute__((noinline)) static void multiply(
        const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t right, int64_t down, int64_t depth, bool is_first,
        float* out, int64_t out_stride) {
        Sums<sums_rows> sums;
        clear<sums_rows>(sums);
        for (int64_t k = 0; k < depth; k += 32, b += down)
            for (int64_t pair = 0; pair < 32; pair += 2) {
                const __m512i columns[] = {_mm512_load_si512(b + 16 * pair), _mm512_load_si512(b + right + 16 * pair)};
#pragma GCC unroll 8
                for (int i = 0; i < sums_rows; ++i) {
                    int32_t two;
                    std::memcpy(&two, a + i * a_stride + k + pair, 4);
#pragma GCC unroll 2
                    for (int j = 0; j < 2; ++j)
                        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)_mm512_set1_epi32(two), (__m512bh)columns[j]);
                }
            }
        add_sums<sums_rows>(sums, is_first, out, out_stride);
    }
};

} // namespace
} // namespace qfuse
#endif
