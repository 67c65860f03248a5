// Attention of bfloat16 by AMX: `tdpbf16ps` on tiles of 16 × 32.
#ifndef QFUSE_ATTENTION_AMX
#define QFUSE_ATTENTION_AMX
#define QFUSE_TARGET_AMX_BF16 \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
namespace qfuse {
namespace {

template <typename T, int64_t D>
class AmxAttention : public Bf16Attention<T, D> {
    using Base = Bf16Attention<T, D>;
    using Base::count_, Base::k_, Base::v_, Base::q_, Base::scores_;

 public:
    using Base::padded_head;

    QFUSE_TARGET_AMX_BF16 explicit AmxAttention(int64_t all_keys) : Base(all_keys) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        // GCC 12 believes that the next reads 8 of the 64 bytes, and may leave out what sets the others.
        __asm__ volatile("" : "+m"(config));
        _tile_loadconfig(&config);
    }
    AmxAttention(const AmxAttention&) = delete;
    AmxAttention& operator=(const AmxAttention&) = delete;
    QFUSE_TARGET_AMX_BF16 ~AmxAttention() { _tile_release(); }

    QFUSE_TARGET_AMX_BF16 __attribute__((noinline)) float* scores(int64_t first, int64_t count) {
        __asm__ volatile("" : : : "memory"); // GCC 12's `_tile_loadd` does not tell that it reads memory
        const uint16_t* k = k_.data() + first * padded_head;
        for (int64_t key = 0; key < count; key += 32) {
            if (count_ > 16)
                scores_of<true>(k + key * padded_head, scores_ + key);
            else
                scores_of<false>(k + key * padded_head, scores_ + key);
        }
        return scores_;
    }

    // sums (+)= weights · values, [rows][padded_head]
    QFUSE_TARGET_AMX_BF16 __attribute__((noinline)) void add(
        int64_t first, int64_t count, bool is_first, float* sums) const {
        __asm__ volatile("" : : : "memory");
        const uint16_t* v = v_.data() + first * padded_head;
        for (int64_t d = 0; d < padded_head; d += 32) {
            if (count_ > 16)
                add_to<true>(v + 32 * d, count, is_first, sums + d);
            else
                add_to<false>(v + 32 * d, count, is_first, sums + d);
        }
    }

 private:
    // Up to 32 rows by 32 keys.
    template <bool has_two>
    QFUSE_TARGET_AMX_BF16 __attribute__((always_inline)) inline void scores_of(const uint16_t* k, float* out) const {
        _tile_zero(0);
        _tile_zero(1);
        if (has_two) {
            _tile_zero(2);
            _tile_zero(3);
        }
#pragma GCC unroll 8
        for (int64_t d = 0; d < padded_head; d += 32) {
            _tile_loadd(4, q_ + d, 2 * padded_head);
            _tile_loadd(6, k + 16 * d, 64);
            _tile_loadd(7, k + 16 * (d + padded_head), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (has_two) {
                _tile_loadd(5, q_ + 16 * padded_head + d, 2 * padded_head);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out, 4 * score_stride);
        _tile_stored(1, out + 16, 4 * score_stride);
        if (has_two) {
            _tile_stored(2, out + 16 * score_stride, 4 * score_stride);
            _tile_stored(3, out + 16 * score_stride + 16, 4 * score_stride);
        }
    }

    // Up to 32 rows by 32 columns.
    template <bool has_two>
    QFUSE_TARGET_AMX_BF16 __attribute__((always_inline)) inline void add_to(
        const uint16_t* v, int64_t count, bool is_first, float* sums) const {
        constexpr int64_t stride = 4 * padded_head;
        if (is_first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, stride);
            _tile_loadd(1, sums + 16, stride);
            if (has_two) {
                _tile_loadd(2, sums + 16 * padded_head, stride);
                _tile_loadd(3, sums + 16 * padded_head + 16, stride);
            }
        }
        const auto* weights = reinterpret_cast<const uint16_t*>(scores_);
        for (int64_t key = 0; key < count; key += 32) {
            _tile_loadd(4, weights + key, 4 * score_stride);
            _tile_loadd(6, v + key * padded_head, 64);
            _tile_loadd(7, v + key * padded_head + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (has_two) {
                _tile_loadd(5, weights + key + 32 * score_stride, 4 * score_stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums, stride);
        _tile_stored(1, sums + 16, stride);
        if (has_two) {
            _tile_stored(2, sums + 16 * padded_head, stride);
            _tile_stored(3, sums + 16 * padded_head + 16, stride);
        }
    }
};

} // namespace
} // namespace qfuse
#endif
