// Attention over the blocks of a paged cache, without gathering them. Included once per instruction set by `step.cpp`.
//
// Keys come in pieces of 256 positions, counted from position 0, each with a softmax of its own over runs of 32; then the
// pieces are folded in order. So one row's pieces may go to several threads, and its result depends on its own keys alone:
// masked ones add exact zeros, and it is bit-equal whether it is read beside others of its window or decoded, whoever
// computes which piece.

constexpr int64_t kKeyRun = 32;
constexpr int64_t kPiece = 8 * kKeyRun;
constexpr int64_t kMostQueries = 16;  // query vectors that share a pass over the keys

// Some queries' softmax over some keys: weighted values [queries, H padded], largest score and sum of weights [queries].
struct Attended {
    float *sums, *largest, *total;

    static INLINE int64_t size(int64_t num_queries, int64_t padded) { return num_queries * (padded + 16); }

    INLINE Attended(float* memory, int64_t num_queries, int64_t padded)
        : sums(memory), largest(memory + num_queries * padded), total(largest + num_queries) {}

    INLINE void clear(int64_t num_queries, int64_t padded) const {
        for (int64_t i = 0; i < num_queries * padded; i += LANES) store(sums + i, VF{});
        for (int64_t q = 0; q < num_queries; ++q) largest[q] = -__builtin_inff(), total[q] = 0.0f;
    }
};

// Scratch of one thread.
struct AttentionScratch {
    float* queries;  // [kMostQueries, H padded]
    float* scores;   // [kMostQueries, kKeyRun]
    float* piece;    // an Attended of kMostQueries
    float* folded;   // another

    static INLINE int64_t size(int64_t padded) {
        return kMostQueries * (padded + kKeyRun) + 2 * Attended::size(kMostQueries, padded);
    }

    INLINE AttentionScratch(float* memory, int64_t padded)
        : queries(memory),
          scores(queries + kMostQueries * padded),
          piece(scores + kMostQueries * kKeyRun),
          folded(piece + Attended::size(kMostQueries, padded)) {}
};

// Keys or values of one head in a run: number j stands at first + offsets[j], and those behind the last are the last again.
// Beside them what will be read after them, or null.
template <typename T>
struct Run {
    const T* first;
    const int64_t* offsets;
    const T* next_first;
    const int64_t* next_offsets;

    INLINE const T* operator[](int64_t j) const { return first + offsets[j]; }

    // The same for those who come after the first: what follows is on its way.
    INLINE Run alone() const { return Run{first, offsets, nullptr, nullptr}; }

    // Bring what follows nearer: a step apart, heads lie too scattered for the processor's own prefetching.
    INLINE void fetch_next(int64_t j, int64_t padded) const {
        if (next_first == nullptr) return;
        const T* const start = next_first + next_offsets[j];
        for (int64_t i = 0; i < padded; i += 256 / static_cast<int64_t>(sizeof(T))) {
            const char* const line = reinterpret_cast<const char*>(start + i);
            __builtin_prefetch(line, 0, 2);
            __builtin_prefetch(line + 64, 0, 2);
            __builtin_prefetch(line + 128, 0, 2);
            __builtin_prefetch(line + 192, 0, 2);
        }
    }
};

// scores[r][j] = queries[r] . keys[j] for kQueries rows (padded apart) and all keys of the run.
template <int kQueries, typename T>
INLINE void score(const float* queries, int64_t padded, const Run<T>& keys, float* scores) {
    constexpr int kKeys = LANES / kQueries;
    for (int64_t j = 0; j < kKeyRun; j += kKeys) {
        VF acc[LANES] = {};
        for (int64_t i = 0; i < kKeys; ++i) keys.fetch_next(j + i, padded);
        for (int64_t h = 0; h < padded; h += 2 * LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < kKeys; ++i) {
                VF first, second;
                load_pair(keys[j + i] + h, first, second);
#pragma GCC unroll 4
                for (int r = 0; r < kQueries; ++r) {
                    acc[r * kKeys + i] += load<VF>(queries + r * padded + h) * first;
                    acc[r * kKeys + i] += load<VF>(queries + r * padded + h + LANES) * second;
                }
            }
        }
        float sums[LANES];
        store(sums, reduce_each(acc));
        for (int r = 0; r < kQueries; ++r) __builtin_memcpy(scores + r * kKeyRun + j, sums + r * kKeys, kKeys * sizeof(float));
    }
}

// sums[r] += sum over j of weights[r][j] values[j], for kPairs pairs of vectors from number h on.
template <int kQueries, int kPairs, typename T>
INLINE void add_values(const float* weights, const Run<T>& values, int64_t count, int64_t h, float* sums, int64_t padded) {
    VF acc[kQueries][2 * kPairs];
    for (int r = 0; r < kQueries; ++r) {
        for (int c = 0; c < 2 * kPairs; ++c) acc[r][c] = load<VF>(sums + r * padded + h + c * LANES);
    }
    for (int64_t j = 0; j < count; ++j) {
        if (h == 0) values.fetch_next(j, padded);
#pragma GCC unroll 8
        for (int c = 0; c < kPairs; ++c) {
            VF first, second;
            load_pair(values[j] + h + c * 2 * LANES, first, second);
#pragma GCC unroll 8
            for (int r = 0; r < kQueries; ++r) {
                const VF weight = splat(weights[r * kKeyRun + j]);
                acc[r][2 * c] += weight * first;
                acc[r][2 * c + 1] += weight * second;
            }
        }
    }
    for (int r = 0; r < kQueries; ++r) {
        for (int c = 0; c < 2 * kPairs; ++c) store(sums + r * padded + h + c * LANES, acc[r][c]);
    }
}

template <int kQueries, int kPairs, typename T>
INLINE void add_all_values(const float* weights, const Run<T>& values, int64_t count, float* sums, int64_t padded) {
    int64_t h = 0;
    for (; h + kPairs * 2 * LANES <= padded; h += kPairs * 2 * LANES) {
        add_values<kQueries, kPairs>(weights, values, count, h, sums, padded);
    }
    for (; h < padded; h += 2 * LANES) add_values<kQueries, 1>(weights, values, count, h, sums, padded);
}

// Take the run of scores of one query into its running maximum and sum: scores become weights. The query sees the run's keys
// from `first` up to and without `end`.
NOINLINE void take_run(float* scores, int64_t first, int64_t end, float* sums, int64_t padded, float& largest, float& total) {
    for (int64_t j = 0; j < first && j < kKeyRun; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = end < 0 ? 0 : end; j < kKeyRun; ++j) scores[j] = -__builtin_inff();
    VF most = load<VF>(scores);
    for (int64_t j = LANES; j < kKeyRun; j += LANES) most = vmax(most, load<VF>(scores + j));
    const float run_largest = reduce_max(most), before = largest;
    if (run_largest == -__builtin_inff()) {
        for (int64_t j = 0; j < kKeyRun; j += LANES) store(scores + j, VF{});
        return;
    }
    largest = before > run_largest ? before : run_largest;
    VF sum = {};
    for (int64_t j = 0; j < kKeyRun; j += LANES) {
        const VF x = load<VF>(scores + j);
        const VF weight = x == -__builtin_inff() ? VF{} : exp(x - largest);
        store(scores + j, weight);
        sum += weight;
    }
    const float factor = before == -__builtin_inff() ? 0.0f : exp(before - largest);
    total = total * factor + reduce_sum(sum);
    if (factor == 1.0f) return;
    for (int64_t h = 0; h < padded; h += LANES) store(sums + h, load<VF>(sums + h) * factor);
}

// The keys of one run into `state`; query q sees those from first[q] up to and without end[q], of which the run holds `count`.
template <typename T>
NOINLINE void attend_run(int64_t num_queries, const float* queries, float* scores, int64_t padded, const Run<T>& keys, const Run<T>& values,
                         int64_t count, const int64_t* first, const int64_t* end, const Attended& state) {
    int64_t r = 0;
    const auto of = [&](const Run<T>& run) __attribute__((always_inline)) { return r == 0 ? run : run.alone(); };
    for (; r + 4 <= num_queries; r += 4) score<4>(queries + r * padded, padded, of(keys), scores + r * kKeyRun);
    for (; r + 2 <= num_queries; r += 2) score<2>(queries + r * padded, padded, of(keys), scores + r * kKeyRun);
    for (; r < num_queries; ++r) score<1>(queries + r * padded, padded, of(keys), scores + r * kKeyRun);
    for (r = 0; r < num_queries; ++r) {
        const int64_t last = end[r] < count ? end[r] : count;
        take_run(scores + r * kKeyRun, first[r], last, state.sums + r * padded, padded, state.largest[r], state.total[r]);
    }
    r = 0;
    for (; r + 4 <= num_queries; r += 4) add_all_values<4, 1>(scores + r * kKeyRun, of(values), count, state.sums + r * padded, padded);
    for (; r + 2 <= num_queries; r += 2) add_all_values<2, 2>(scores + r * kKeyRun, of(values), count, state.sums + r * padded, padded);
    for (; r < num_queries; ++r) add_all_values<1, 4>(scores + r * kKeyRun, of(values), count, state.sums + r * padded, padded);
}

// Take the next piece of the same queries into `all`.
NOINLINE void fold(const Attended& piece, int64_t num_queries, int64_t padded, const Attended& all) {
    for (int64_t q = 0; q < num_queries; ++q) {
        const float before = all.largest[q], own = piece.largest[q];
        if (own == -__builtin_inff()) continue;
        const float largest = before > own ? before : own;
        const float factor = before == -__builtin_inff() ? 0.0f : exp(before - largest), own_factor = exp(own - largest);
        all.largest[q] = largest;
        all.total[q] = all.total[q] * factor + piece.total[q] * own_factor;
        for (int64_t i = q * padded; i < (q + 1) * padded; i += LANES) {
            store(all.sums + i, load<VF>(all.sums + i) * factor + load<VF>(piece.sums + i) * own_factor);
        }
    }
}

// Rows of one sequence that attend together, and what they see.
struct Chunk {
    int64_t sequence, first_row, num_rows;
    int64_t from, to;  // keys that any of the rows sees

    INLINE Chunk(const int32_t* numbers, const Rows& step, int64_t window)
        : sequence(numbers[0]), first_row(numbers[1]), num_rows(numbers[2]) {
        const int64_t position = step.positions[first_row];
        from = position > window ? position - window : 0;
        to = step.positions[first_row + num_rows - 1] + 1;
    }

    INLINE int64_t first_piece() const { return from / kPiece; }
    INLINE int64_t end_piece() const { return (to + kPiece - 1) / kPiece; }
};

// Where a run's keys and values lie, in numbers from the first slot's.
INLINE void find_run(const Pool& pool, const int32_t* table, int64_t slot_size, int64_t start, int64_t count, int64_t* offsets) {
    int64_t j = 0;
    for (int64_t block = start / pool.block_size, skipped = start % pool.block_size; j < count; ++block, skipped = 0) {
        const int64_t slot = static_cast<int64_t>(table[block]) * pool.block_size;
        for (int64_t i = skipped; i < pool.block_size && j < count; ++i, ++j) offsets[j] = (slot + i) * slot_size;
    }
    for (; j < kKeyRun; ++j) offsets[j] = offsets[count - 1];
}

// One piece of the keys for the chunk's rows and key/value heads first_head..end_head - 1, head g into the Attended at
// states + (g - first_head) * state_stride. Heads take turns within a run, so that memory is read nearly as it lies.
template <typename T>
INLINE void attend_piece(const Model& m, const Pool& pool, const Rows& step, int64_t layer, const Chunk& chunk, int64_t first_head,
                         int64_t end_head, int64_t piece, const float* queries, int64_t padded, const AttentionScratch& s,
                         float* states, int64_t state_stride) {
    const int64_t group = m.num_heads / m.num_kv_heads, num_queries = chunk.num_rows * group;
    const int64_t slot_size = m.num_kv_heads * m.head_dim, window = m.layers[layer].window;
    const int64_t start = layer * pool.layer_stride + first_head * m.head_dim;
    const T *const keys = static_cast<const T*>(pool.keys) + start, *const values = static_cast<const T*>(pool.values) + start;
    const int32_t* const table = step.tables + step.table_starts[chunk.sequence];
    for (int64_t g = first_head; g < end_head; ++g) {
        Attended(states + (g - first_head) * state_stride, num_queries, padded).clear(num_queries, padded);
    }
    const int64_t end = chunk.to < (piece + 1) * kPiece ? chunk.to : (piece + 1) * kPiece;
    int64_t run = (chunk.from > piece * kPiece ? chunk.from : piece * kPiece) / kKeyRun * kKeyRun;
    int64_t offsets[2][kKeyRun];
    if (run < end) find_run(pool, table, slot_size, run, end - run < kKeyRun ? end - run : kKeyRun, offsets[run / kKeyRun % 2]);
    for (; run < end; run += kKeyRun) {
        const int64_t count = end - run < kKeyRun ? end - run : kKeyRun, left = end - run - count;
        const int64_t *const own = offsets[run / kKeyRun % 2], *const following = offsets[(run / kKeyRun + 1) % 2];
        if (left > 0) find_run(pool, table, slot_size, run + count, left < kKeyRun ? left : kKeyRun, offsets[(run / kKeyRun + 1) % 2]);
        int64_t first[kMostQueries], last[kMostQueries];
        for (int64_t q = 0; q < num_queries; ++q) {
            const int64_t position = step.positions[chunk.first_row + q / group];
            first[q] = position > window ? position - window - run : 0;
            last[q] = position + 1 - run;
        }
        for (int64_t g = first_head; g < end_head; ++g) {
            const float* const from = queries + (chunk.first_row * m.num_heads + g * group) * padded;
            for (int64_t row = 0; row < (chunk.num_rows > 1 ? chunk.num_rows : 0); ++row) {
                const float* const own = from + row * m.num_heads * padded;
                for (int64_t i = 0; i < group * padded; i += LANES) store(s.queries + row * group * padded + i, load<VF>(own + i));
            }
            const int64_t head = (g - first_head) * m.head_dim;
            const bool is_last = g + 1 == end_head;
            const T* const next = !is_last ? keys + head + m.head_dim : left > 0 ? keys : nullptr;
            const Run<T> own_keys{keys + head, own, values + head, own};
            const Run<T> own_values{values + head, own, next, is_last ? following : own};
            const Attended state(states + (g - first_head) * state_stride, num_queries, padded);
            attend_run<T>(num_queries, chunk.num_rows > 1 ? s.queries : from, s.scores, padded, own_keys, own_values, count, first,
                          last, state);
        }
    }
}

// The result of the chunk's rows and key/value head g.
template <typename T>
INLINE void finish(const Model& m, const Chunk& chunk, int64_t g, const Attended& state, int64_t padded, const Activation& out) {
    const int64_t group = m.num_heads / m.num_kv_heads;
    for (int64_t q = 0; q < chunk.num_rows * group; ++q) {
        const float inverse = 1.0f / state.total[q];
        const int64_t row = chunk.first_row + q / group, column = (g * group + q % group) * m.head_dim;
        const float* const sums = state.sums + q * padded;
        int64_t h = 0;
        for (; h + 2 * LANES <= m.head_dim; h += 2 * LANES) {
            VF first = load<VF>(sums + h) * inverse, second = load<VF>(sums + h + LANES) * inverse;
            to_natural(static_cast<const T*>(nullptr), first, second);
            out.set(row, column + h, first);
            out.set(row, column + h + LANES, second);
        }
        for (; h < padded; ++h) {
            const int64_t natural = paired_index(static_cast<const T*>(nullptr), h);
            if (natural < m.head_dim) out.set(row, column + natural, sums[h] * inverse);
        }
    }
}
