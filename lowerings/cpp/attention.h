// Attention: softmax(scale · q kᵀ + mask) v, without the matrix of scores in memory, as FlashAttention does it (Dao et
// al. 2022, arXiv:2205.14135) with the online softmax of Milakov and Gimelshein (2018, arXiv:1805.02867).
//
// This is the driver. A kernel is a class, one object for each thread, which holds keys and values of one head, mostly packed. It
// is in an unnamed namespace, as all of attention is: there are others of the same name, compiled for other instructions.
//
//     using Element = ...;                                // of q, k, v and the result
//     static constexpr int64_t rows;                      // that it takes at a time
//     static constexpr int64_t window;                    // the most keys that it holds packed, a multiple of `keys_at_once`
//     static constexpr int64_t padded_head;               // the distance of rows of sums
//     explicit Kernel(int64_t all_keys);
//     void pack(const Element* k, int64_t k_stride, const Element* v, int64_t v_stride, int64_t count);
//     void load(const Element* const* q, int64_t count);  // rows of queries
//     float* scores(int64_t first, int64_t count);        // of these rows and some packed keys, from the window's `first`
//     void weigh(const int64_t* seen, int64_t count, float factor, bool is_first, AttentionRows<rows>& known, float* sums);
//     void add(int64_t first, int64_t count, bool is_first, float* sums); // sums (+)= weights · values
//     void store(const float* sums, float factor, Element* out);          // one row
//
// `weigh` turns scores into weights, 2^(factor · (score − largest of the row)), of which those behind `seen` are 0, and
// scales down the sums until now where the largest score has grown. `is_first`: there are none, and nothing is known.
#ifndef QFUSE_ATTENTION
#define QFUSE_ATTENTION
namespace qfuse {
namespace {

// How many keys a kernel takes at a time, and the distance of rows of their scores, which is no power of two, so that rows are in
// different sets of the cache.
constexpr int64_t keys_at_once = 256, score_stride = keys_at_once + 16;

// [batch, head, row, element], elements of a row next to each other; strides in elements.
template <typename T>
struct Heads {
    T* data;
    int64_t batch, head, row;
    T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// mask: null if there is none; its strides are 0 where it is broadcast.
template <typename T, typename M>
struct Attention {
    Heads<const T> q, k, v;
    Heads<T> out;
    const M* mask;
    int64_t mask_batch, mask_head, mask_row, mask_key;
    int64_t batches, heads, kv_heads, queries, keys;
    float scale;
};

// What is known of a block of rows after some keys: the largest score, and the sum of the weights.
template <int64_t rows>
struct AttentionRows {
    alignas(64) float largest[(rows + 15) / 16 * 16];
    alignas(64) float sum[(rows + 15) / 16 * 16];
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that is not initialized.
template <typename T>
class Buffer {
 public:
    explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() const { return data_; }

 private:
    T* data_;
};

// The rows of all query heads that share keys and values are one sequence: so a few rows, as in decoding, fill a block.
// An item of work is a range of it, `blocks` blocks long. Objects are made by each thread.
template <typename Kernel, typename M, bool is_causal>
class AttentionThread {
    using T = typename Kernel::Element;
    static constexpr int64_t rows = Kernel::rows;

 public:
    // Large enough that packing is worth it, small enough for every thread to get some.
    static int64_t blocks(const Attention<T, M>& a, int64_t threads) {
        const int64_t most = std::max<int64_t>(1, (a.keys > Kernel::window ? 512 : 128) / rows);
        const int64_t wanted = ceil_div(threads, std::max<int64_t>(1, a.batches * a.kv_heads)); // items of a head
        return std::clamp<int64_t>(ceil_div(rows_of_head(a), rows * wanted), 1, most);
    }
    static int64_t items(const Attention<T, M>& a, int64_t blocks) {
        return a.batches * a.kv_heads * ceil_div(rows_of_head(a), blocks * rows);
    }

    AttentionThread(const Attention<T, M>& a, int64_t blocks)
        : a_(a), blocks_(blocks), kernel_(a.keys), sums_(blocks * rows * Kernel::padded_head), known_(blocks),
          plain_(ceil_div(rows_of_head(a), rows)) {}

    void operator()(int64_t item) {
        const int64_t of_head = ceil_div(rows_of_head(a_), blocks_ * rows), head = item / of_head;
        batch_ = head / a_.kv_heads, kv_head_ = head % a_.kv_heads;
        const int64_t first = item % of_head * blocks_ * rows, end = std::min(rows_of_head(a_), first + blocks_ * rows);
        for (int64_t window = 0; window < a_.keys; window += Kernel::window) {
            const int64_t window_end = std::min(a_.keys, window + Kernel::window);
            if (head != packed_head_ || window != packed_window_)
                kernel_.pack(
                    a_.k.at(batch_, kv_head_, window), a_.k.row, a_.v.at(batch_, kv_head_, window), a_.v.row,
                    window_end - window);
            packed_head_ = head, packed_window_ = window;
            for (int64_t row = first; row < end; row += rows)
                attend(row, std::min(rows, end - row), row - first, window, window_end);
        }
        if (a_.keys == 0) {
            std::fill_n(sums_.data(), blocks_ * rows * Kernel::padded_head, 0.0f);
            std::fill_n(known_.data(), blocks_, AttentionRows<rows>{});
        }
        Position position(*this, first);
        for (int64_t i = 0; i < end - first; ++i, position.next()) {
            const float sum = known_.data()[i / rows].sum[i % rows]; // 0: a row that sees no key is zero, as in ATen
            kernel_.store(sums_.data() + i * Kernel::padded_head, sum == 0 ? 0 : 1 / sum,
                          a_.out.at(batch_, position.head, position.query));
        }
    }

 private:
    const Attention<T, M>& a_;
    const int64_t blocks_;
    Kernel kernel_;
    Buffer<float> sums_;
    Buffer<AttentionRows<rows>> known_;
    Buffer<int8_t> plain_; // of each block of rows of a head, -1: not known yet
    int64_t batch_ = 0, kv_head_ = 0, packed_head_ = -1, packed_window_ = -1, plain_mask_ = -1;

    static int64_t rows_of_head(const Attention<T, M>& a) { return a.heads / a.kv_heads * a.queries; }

    // Which query of which head a row is.
    struct Position {
        int64_t queries, head, query;
        Position(const AttentionThread& t, int64_t row)
            : queries(t.a_.queries), head(t.kv_head_ * (t.a_.heads / t.a_.kv_heads) + row / queries), query(row % queries) {}
        void next() {
            if (++query == queries)
                query = 0, ++head;
        }
    };

    // A block of rows and the packed keys.
    void attend(int64_t row, int64_t count, int64_t in_item, int64_t window, int64_t window_end) {
        const T* q[rows];
        int64_t limits[rows], end = 0; // how many keys a row sees: like ATen, the first query sees the first key
        Position position(*this, row);
        for (int64_t i = 0; i < count; ++i, position.next()) {
            q[i] = a_.q.at(batch_, position.head, position.query);
            limits[i] = is_causal ? std::min(window_end, position.query + 1) : window_end;
            end = std::max(end, limits[i]);
        }
        if (end > window)
            kernel_.load(q, count);
        constexpr float log2_e = 1.44269504f;
        const bool is_plain = are_known_plain(row, count);
        float* sums = sums_.data() + in_item * Kernel::padded_head;
        for (int64_t key = window; key < end; key += keys_at_once) {
            const int64_t keys = std::min(keys_at_once, end - key);
            float* scores = kernel_.scores(key - window, keys);
            int64_t seen[rows];
            for (int64_t i = 0; i < count; ++i)
                seen[i] = is_causal ? std::clamp<int64_t>(limits[i] - key, 0, keys) : keys;
            if (!is_plain)
                scale(scores, row, seen, count, key);
            kernel_.weigh(seen, keys, is_plain ? a_.scale * log2_e : log2_e, key == 0, known_.data()[in_item / rows], sums);
            kernel_.add(key - window, keys, key == 0, sums);
        }
    }

    // `are_plain`, found out once for all heads that share a mask.
    bool are_known_plain(int64_t row, int64_t count) {
        const int64_t mask = a_.mask_head == 0 ? batch_ : batch_ * a_.kv_heads + kv_head_;
        if (mask != plain_mask_)
            std::fill_n(plain_.data(), ceil_div(rows_of_head(a_), rows), int8_t{-1});
        plain_mask_ = mask;
        int8_t& is_plain = plain_.data()[row / rows];
        if (is_plain < 0)
            is_plain = are_plain(row, count);
        return is_plain;
    }

    // Tell whether the scores of these rows can be compared as they are: the scale is positive, and no mask adds to them, not
    // for any key, for a row's largest score is compared with those of other keys. A mask is all zeros where no key is padding.
    bool are_plain(int64_t row, int64_t count) const {
        if (!(a_.scale > 0))
            return false;
        if (a_.mask == nullptr)
            return true;
        Position position(*this, row);
        for (int64_t i = 0; i < count; ++i, position.next())
            if (!adds_nothing(mask_of(position), a_.mask_key, a_.keys))
                return false;
        return true;
    }

    void scale(float* scores, int64_t row, const int64_t* seen, int64_t count, int64_t key) const {
        Position position(*this, row);
        for (int64_t i = 0; i < count; ++i, position.next()) {
            const M* mask = a_.mask == nullptr ? nullptr : mask_of(position) + key * a_.mask_key;
            scale_scores(scores + i * score_stride, a_.scale, mask, a_.mask_key, seen[i]);
        }
    }

    const M* mask_of(const Position& position) const {
        return a_.mask + batch_ * a_.mask_batch + position.head * a_.mask_head + position.query * a_.mask_row;
    }
};

// Threads share the items of work.
template <typename Kernel, bool is_causal, typename T, typename M>
void attend(const Attention<T, M>& attention, int64_t threads) {
    using Thread = AttentionThread<Kernel, M, is_causal>;
    const int64_t blocks = Thread::blocks(attention, threads), items = Thread::items(attention, blocks);
#pragma omp parallel num_threads(threads) if(threads > 1)
    {
        Thread thread(attention, blocks);
#pragma omp for
        for (int64_t item = 0; item < items; ++item)
            thread(item);
    }
}

} // namespace
} // namespace qfuse
#endif
