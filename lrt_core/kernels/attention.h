// Attention over the blocks of a paged cache, without gathering them. Included once per instruction set by `step.cpp`.
//
// Keys come in runs of 64 positions, counted from position 0, with a running maximum and sum. A row's result depends on its
// own keys alone: masked ones add exact zeros, so it is bit-equal whether it is read beside others of its window or decoded.

constexpr int64_t kKeyRun = 64;
constexpr int64_t kMostQueries = 16;  // query vectors that share a pass over the keys

// Scratch of one thread.
struct AttentionScratch {
    float* queries;  // [kMostQueries, H padded]
    float* sums;     // [kMostQueries, H padded] of weighted values
    float* scores;   // [kMostQueries, kKeyRun]
};

// scores[r][j] = queries[r] . keys[j] for kQueries rows (padded apart) and kKeys keys.
template <int kQueries, int kKeys, typename T>
INLINE void score(const float* queries, int64_t padded, const T* const* keys, float* scores) {
    VF acc[kQueries][kKeys] = {};
    for (int64_t h = 0; h < padded; h += 2 * LANES) {
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) {
            VF first, second;
            load_pair(keys[j] + h, first, second);
#pragma GCC unroll 8
            for (int r = 0; r < kQueries; ++r) {
                acc[r][j] += load<VF>(queries + r * padded + h) * first;
                acc[r][j] += load<VF>(queries + r * padded + h + LANES) * second;
            }
        }
    }
    for (int r = 0; r < kQueries; ++r) {
        for (int j = 0; j < kKeys; ++j) scores[r * kKeyRun + j] = reduce_sum(acc[r][j]);
    }
}

template <int kQueries, int kKeys, typename T>
INLINE void score_all(const float* queries, int64_t padded, const T* const* keys, int64_t count, float* scores) {
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys) score<kQueries, kKeys>(queries, padded, keys + j, scores + j);
    for (; j < count; ++j) score<kQueries, 1>(queries, padded, keys + j, scores + j);
}

// sums[r] += sum over j of weights[r][j] values[j], for kPairs pairs of vectors from number h on.
template <int kQueries, int kPairs, typename T>
INLINE void add_values(const float* weights, const T* const* values, int64_t count, int64_t h, float* sums, int64_t padded) {
    VF acc[kQueries][2 * kPairs];
    for (int r = 0; r < kQueries; ++r) {
        for (int c = 0; c < 2 * kPairs; ++c) acc[r][c] = load<VF>(sums + r * padded + h + c * LANES);
    }
    for (int64_t j = 0; j < count; ++j) {
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
INLINE void add_all_values(const float* weights, const T* const* values, int64_t count, float* sums, int64_t padded) {
    int64_t h = 0;
    for (; h + kPairs * 2 * LANES <= padded; h += kPairs * 2 * LANES) {
        add_values<kQueries, kPairs>(weights, values, count, h, sums, padded);
    }
    for (; h < padded; h += 2 * LANES) add_values<kQueries, 1>(weights, values, count, h, sums, padded);
}

// Take the run of scores of one query into its running maximum and sum: scores become weights. Of the run's `count` keys the
// query sees those from `first` up to and without `end`.
NOINLINE void take_run(float* scores, int64_t first, int64_t end, int64_t count, float* sums, int64_t padded, float& largest, float& total) {
    for (int64_t j = 0; j < kKeyRun; ++j) {
        if (j < first || j >= end || j >= count) scores[j] = -__builtin_inff();
    }
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

template <typename T>
NOINLINE void attend_queries(int64_t num_queries, const AttentionScratch& s, int64_t padded, const T* const* keys, const T* const* values,
                           int64_t count, const int64_t* first, const int64_t* end, float* largest, float* total) {
    int64_t r = 0;
    for (; r + 4 <= num_queries; r += 4) score_all<4, 2>(s.queries + r * padded, padded, keys, count, s.scores + r * kKeyRun);
    for (; r + 2 <= num_queries; r += 2) score_all<2, 4>(s.queries + r * padded, padded, keys, count, s.scores + r * kKeyRun);
    for (; r < num_queries; ++r) score_all<1, 8>(s.queries + r * padded, padded, keys, count, s.scores + r * kKeyRun);
    for (r = 0; r < num_queries; ++r) {
        take_run(s.scores + r * kKeyRun, first[r], end[r], count, s.sums + r * padded, padded, largest[r], total[r]);
    }
    r = 0;
    for (; r + 4 <= num_queries; r += 4) add_all_values<4, 1>(s.scores + r * kKeyRun, values, count, s.sums + r * padded, padded);
    for (; r + 2 <= num_queries; r += 2) add_all_values<2, 2>(s.scores + r * kKeyRun, values, count, s.sums + r * padded, padded);
    for (; r < num_queries; ++r) add_all_values<1, 4>(s.scores + r * kKeyRun, values, count, s.sums + r * padded, padded);
}

// Rows first_row..first_row + num_rows of one sequence, key/value head g: queries as `place_query` lays them out.
template <typename T>
INLINE void attend_rows(const Model& m, const Pool& pool, const Step& step, int64_t layer, int64_t sequence, int64_t first_row,
                        int64_t num_rows, int64_t g, const float* queries, int64_t padded, const AttentionScratch& s, const Activation& out) {
    const int64_t group = m.num_heads / m.num_kv_heads, num_queries = num_rows * group;
    const int64_t slot_size = m.num_kv_heads * m.head_dim;
    const T* keys = static_cast<const T*>(pool.keys) + layer * pool.layer_stride + g * m.head_dim;
    const T* values = static_cast<const T*>(pool.values) + layer * pool.layer_stride + g * m.head_dim;
    const int32_t* table = step.tables + step.table_starts[sequence];
    const int64_t window = m.layers[layer].window;
    int64_t visible_from[kMostQueries], visible_to[kMostQueries];
    float largest[kMostQueries], total[kMostQueries];
    for (int64_t q = 0; q < num_queries; ++q) {
        const int64_t row = first_row + q / group, position = step.positions[row];
        const float* from = queries + (row * m.num_heads + g * group + q % group) * padded;
        for (int64_t h = 0; h < padded; h += LANES) {
            store(s.queries + q * padded + h, load<VF>(from + h));
            store(s.sums + q * padded + h, VF{});
        }
        visible_from[q] = position > window ? position - window : 0;
        visible_to[q] = position + 1;
        largest[q] = -__builtin_inff();
        total[q] = 0.0f;
    }
    for (int64_t run = visible_from[0] / kKeyRun * kKeyRun; run < visible_to[num_queries - 1]; run += kKeyRun) {
        const T *run_keys[kKeyRun], *run_values[kKeyRun];
        int64_t first[kMostQueries], end[kMostQueries];
        const int64_t left = visible_to[num_queries - 1] - run, count = left < kKeyRun ? left : kKeyRun;
        for (int64_t j = 0, block = run / pool.block_size, offset = run % pool.block_size; j < count; ++j) {
            const int64_t slot = (static_cast<int64_t>(table[block]) * pool.block_size + offset) * slot_size;
            run_keys[j] = keys + slot;
            run_values[j] = values + slot;
            if (++offset == pool.block_size) ++block, offset = 0;
        }
        for (int64_t q = 0; q < num_queries; ++q) first[q] = visible_from[q] - run, end[q] = visible_to[q] - run;
        attend_queries<T>(num_queries, s, padded, run_keys, run_values, count, first, end, largest, total);
    }
    for (int64_t q = 0; q < num_queries; ++q) {
        const float inverse = 1.0f / total[q];
        const int64_t column = (g * group + q % group) * m.head_dim;
        for (int64_t h = 0; h < padded; ++h) {
            const int64_t natural = paired_index(static_cast<const T*>(nullptr), h);
            if (natural < m.head_dim) out.set(first_row + q / group, column + natural, s.sums[q * padded + h] * inverse);
        }
    }
}
