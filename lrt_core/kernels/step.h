// The layers of one step over the rows of all its sequences, by a team of threads that meets between phases. Included once
// per instruction set by `step.cpp`. The arithmetic is that of `model.py`; residual stream, latents and sums are float32.
// Neighbours: `forward.h` has what comes before, between and after the layers.

// Rows of a step on their way through the layers: some, in order. Row i of them is row rows[i] of the step, and so of what
// stands below; tokens, positions, slots and row_starts are those of the rows at hand.
struct Stream : Rows {
    const int32_t* rows;
    float *x, *x0;        // [T, D padded to 16] residual stream, and the same before layer 0
    const float* memory;  // [T, D], or null for a plain model
};

INLINE void inject_row(const Layer& layer, const float* memory, const float* x0, float* x, int64_t size) {
    const float own = layer.residual_scale, start = layer.embedding_scale, gamma = layer.memory_scale;
    if (memory != nullptr && gamma != 0.0f) {
        for (int64_t i = 0; i < size; ++i) x[i] = own * x[i] + start * x0[i] + gamma * memory[i];
    } else {
        for (int64_t i = 0; i < size; ++i) x[i] = own * x[i] + start * x0[i];
    }
}

INLINE float norm_scale(const float* x, int64_t size, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(size) + eps);
}

INLINE void set_row(const Activation& out, int64_t row, const float* x, float scale, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) out.set(row, i, load<VF>(x + i) * scale);
    for (; i < size; ++i) out.set(row, i, x[i] * scale);
}

template <typename T>
INLINE void embed_row(const T* embedding, float* x, int64_t size, float eps) {
    for (int64_t i = 0; i < size; ++i) x[i] = widen(embedding[i]);
    const float scale = norm_scale(x, size, eps);
    for (int64_t i = 0; i < size; ++i) x[i] *= scale;
}

INLINE int64_t padded_head(int64_t size) { return (size + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// Rotation of a head (first half against second half), then its norm.
INLINE void rope_norm(const float* x, const float* cos, const float* sin, int64_t size, float eps, float* out) {
    const int64_t half = size / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        out[i] = x[i] * cos[i] + x[i + half] * sin[i];
        out[i + half] = x[i + half] * cos[i] - x[i] * sin[i];
    }
    const float scale = norm_scale(out, size, eps);
    for (int64_t i = 0; i < size; ++i) out[i] *= scale;
}

// out = local * gate + memory * memory_gate, without memory `local` itself.
INLINE void mix(const float* local, float gate, const float* memory, float memory_gate, int64_t size, float* out) {
    if (memory == nullptr) {
        for (int64_t i = 0; i < size; ++i) out[i] = local[i];
    } else {
        for (int64_t i = 0; i < size; ++i) out[i] = gate * local[i] + memory_gate * memory[i];
    }
}

template <typename E>
INLINE void add_scaled(const E* x, float factor, int64_t size, float* out) {
    for (int64_t i = 0; i < size; ++i) out[i] += factor * widen(x[i]);
}

// A head's query in the order in which keys of type T are read, scaled for the softmax; padding stays zero.
template <typename T>
INLINE void place_query(const float* head, int64_t size, int64_t padded, float scale, float* out) {
    int64_t h = 0;
    for (; h + 2 * LANES <= size; h += 2 * LANES) {
        VF first = load<VF>(head + h) * scale, second = load<VF>(head + h + LANES) * scale;
        to_pair(static_cast<const T*>(nullptr), first, second);
        store(out + h, first);
        store(out + h + LANES, second);
    }
    for (; h < padded; ++h) {
        const int64_t natural = paired_index(static_cast<const T*>(nullptr), h);
        out[h] = natural < size ? head[natural] * scale : 0.0f;
    }
}

// Everything a layer's product left for key/value head g of a row: gates, memory, value embedding, rope and norm; keys and
// values go to the pool, queries to `queries`. product: the row of the input product; projected: of the memory's, or null.
template <typename T>
NOINLINE void place_heads(const Model& m, const Layer& layer, const Stream& step, int64_t row, int64_t g, const float* product,
                        const float* projected, T* keys, T* values, float* queries, float* head) {
    const int64_t size = m.head_dim, kv_size = m.num_kv_heads * size, group = m.num_heads / m.num_kv_heads;
    const float* gates = product + m.num_heads * size + 2 * kv_size + g;
    const float* const key = product + m.num_heads * size + g * size;
    const float *cos = m.cos + step.positions[row] * (size / 2), *sin = m.sin + step.positions[row] * (size / 2);
    float local_gate = 1.0f, memory_gate = 0.0f;
    int64_t next_gate = 0;
    if (projected != nullptr) {
        local_gate = 2.0f / (1.0f + exp(-gates[0]));
        memory_gate = 2.0f / (1.0f + exp(-gates[m.num_kv_heads]));
        next_gate = 2 * m.num_kv_heads;
    }
    const float* const memory_key = projected == nullptr ? nullptr : projected + g * size;
    const float* const memory_value = projected == nullptr ? nullptr : projected + kv_size + g * size;
    const int64_t slot = (step.slots[row] * m.num_kv_heads + g) * size;
    float* const mixed = head + size;
    mix(key, local_gate, memory_key, memory_gate, size, mixed);
    rope_norm(mixed, cos, sin, size, m.eps, head);
    for (int64_t i = 0; i < size; ++i) narrow(head[i], keys + slot + i);
    mix(key + kv_size, local_gate, memory_value, memory_gate, size, mixed);
    if (layer.value_embedding != nullptr) {
        const int64_t start = step.tokens[row] * kv_size + g * size;
        const float gate = 2.0f / (1.0f + exp(-gates[next_gate]));
        if (m.embedding_kind == kBfloat16) {
            add_scaled(static_cast<const uint16_t*>(layer.value_embedding) + start, gate, size, mixed);
        } else {
            add_scaled(static_cast<const float*>(layer.value_embedding) + start, gate, size, mixed);
        }
    }
    for (int64_t i = 0; i < size; ++i) narrow(mixed[i], values + slot + i);
    const int64_t padded = padded_head(size);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    for (int64_t n = g * group; n < (g + 1) * group; ++n) {
        rope_norm(product + n * size, cos, sin, size, m.eps, head);
        place_query<T>(head, size, padded, scale, queries + (row * m.num_heads + n) * padded);
    }
}

// Where a step's intermediate results lie, cut from one zeroed piece of memory.
struct Workspace {
    Activation normed, memory, attended, hidden;
    float *product, *projected, *queries, *scratch;
    int64_t product_stride, projected_stride, scratch_size;
    int32_t* chunks;  // (sequence, first row, rows) of every group of rows that attends together
    float *x, *x0, *recalled, *latents, *changes;
    int32_t *rows, *is_finite, *row_starts, *table_starts;
    int64_t *tokens, *positions, *slots, *memory_rows;

    // Cuts for `rows` rows; with base null it only counts. Returns the bytes needed.
    INLINE int64_t cut(const Model& m, int64_t rows, int64_t num_threads, char* base) {
        int64_t used = 0;
        const auto take = [&](int64_t bytes) __attribute__((always_inline)) {
            char* start = base == nullptr ? nullptr : base + used;
            used += (bytes + 63) / 64 * 64;
            return start;
        };
        const auto activation = [&](int64_t size) __attribute__((always_inline)) {
            const int64_t stride = padded_size(size);
            Activation a{reinterpret_cast<float*>(take(rows * stride * 4)), nullptr, nullptr, nullptr, stride};
#if BF16_DOT
            a.pairs = reinterpret_cast<uint16_t*>(take(rows * stride * 2));
#endif
#if VNNI || PAIRS
            a.bytes = reinterpret_cast<uint8_t*>(take(rows * stride * 2));
            a.steps = reinterpret_cast<float*>(take(rows * 4));
#endif
            return a;
        };
        const int64_t kv_size = m.num_kv_heads * m.head_dim, padded = padded_head(m.head_dim);
        int64_t widest = 0;
        for (int64_t i = 0; i < m.num_layers; ++i) widest = widest > m.layers[i].input.n ? widest : m.layers[i].input.n;
        normed = activation(m.hidden_size);
        memory = activation(m.hidden_size);
        attended = activation(m.num_heads * m.head_dim);
        hidden = activation(m.intermediate_size);
        product_stride = padded_size(widest);
        product = reinterpret_cast<float*>(take(rows * product_stride * 4));
        projected_stride = padded_size(2 * kv_size);
        projected = reinterpret_cast<float*>(take(rows * projected_stride * 4));
        queries = reinterpret_cast<float*>(take(rows * m.num_heads * padded * 4));
        chunks = reinterpret_cast<int32_t*>(take(rows * 3 * 4));
        scratch_size = AttentionScratch::size(padded) + 2 * m.head_dim;
        scratch = reinterpret_cast<float*>(take(num_threads * ((scratch_size + 15) / 16 * 16) * 4));
        float** const streams[] = {&x, &x0};
        float** const states[] = {&recalled, &latents};
        int32_t** const counts[] = {&this->rows, &is_finite, &row_starts, &table_starts};
        int64_t** const places[] = {&tokens, &positions, &slots, &memory_rows};
        for (float** part : streams) *part = reinterpret_cast<float*>(take(rows * padded_size(m.hidden_size) * 4));
        for (float** part : states) *part = reinterpret_cast<float*>(take(rows * m.hidden_size * 4));
        for (int32_t** part : counts) *part = reinterpret_cast<int32_t*>(take((rows + 1) * 4));
        for (int64_t** part : places) *part = reinterpret_cast<int64_t*>(take(rows * 8));
        changes = reinterpret_cast<float*>(take(rows * 4));
        return used;
    }
};

// Attention is cut into this many tasks for each thread, or as many as there can be.
constexpr int64_t kTasksPerThread = 4;

// Rows of one sequence whose queries share passes over the keys, at most.
INLINE int64_t rows_of_chunk(const Model& m) {
    const int64_t group = m.num_heads / m.num_kv_heads;
    return group >= kMostQueries ? 1 : kMostQueries / group;
}

INLINE int64_t count_chunks(const Model& m, const Rows& step) {
    const int64_t most = rows_of_chunk(m);
    int64_t count = 0;
    for (int64_t s = 0; s < step.num_sequences; ++s) count += (step.row_starts[s + 1] - step.row_starts[s] + most - 1) / most;
    return count;
}

// Writes the groups down.
INLINE void cut_chunks(const Model& m, const Rows& step, int32_t* chunks) {
    const int64_t most = rows_of_chunk(m);
    int64_t count = 0;
    for (int64_t s = 0; s < step.num_sequences; ++s) {
        for (int64_t row = step.row_starts[s]; row < step.row_starts[s + 1]; row += most, ++count) {
            const int64_t left = step.row_starts[s + 1] - row;
            chunks[3 * count] = static_cast<int32_t>(s);
            chunks[3 * count + 1] = static_cast<int32_t>(row);
            chunks[3 * count + 2] = static_cast<int32_t>(left < most ? left : most);
        }
    }
}

// Each piece of the keys by whichever thread is free, then each chunk's pieces folded. num_pieces: the most of any chunk.
template <typename T>
INLINE void attend_pieces(const Model& m, const Pool& pool, const Rows& step, int64_t layer, int64_t num_chunks, int64_t num_pieces,
                          const Workspace& w, const AttentionScratch& s, Team& team) {
    const int64_t padded = padded_head(m.head_dim), group = m.num_heads / m.num_kv_heads, window = m.layers[layer].window;
    const int64_t most = num_chunks * num_pieces * m.num_kv_heads / (kTasksPerThread * team.num_threads);
    const int64_t heads = most < 1 ? 1 : most < m.num_kv_heads ? most : m.num_kv_heads;
    const int64_t num_parts = (m.num_kv_heads + heads - 1) / heads;
    const auto place = [&](const Chunk& chunk, int64_t g, int64_t piece) __attribute__((always_inline)) {
        const int64_t first = chunk.first_row * m.num_heads * num_pieces + (g * num_pieces + piece) * chunk.num_rows * group;
        return step.partial + Attended::size(first, padded);
    };
    int64_t* counter = team.next_counter();
    for (int64_t task; (task = team.take(counter, 1)) < num_chunks * num_pieces * num_parts;) {
        const Chunk chunk(w.chunks + task / (num_pieces * num_parts) * 3, step, window);
        const int64_t piece = chunk.first_piece() + task / num_parts % num_pieces, first_head = task % num_parts * heads;
        if (piece >= chunk.end_piece()) continue;
        const int64_t end_head = first_head + heads < m.num_kv_heads ? first_head + heads : m.num_kv_heads;
        const int64_t stride = Attended::size(num_pieces * chunk.num_rows * group, padded);
        attend_piece<T>(m, pool, step, layer, chunk, first_head, end_head, piece, w.queries, padded, s,
                        place(chunk, first_head, piece - chunk.first_piece()), stride);
    }
    team.barrier();
    counter = team.next_counter();
    for (int64_t task; (task = team.take(counter, 1)) < num_chunks * m.num_kv_heads;) {
        const Chunk chunk(w.chunks + task / m.num_kv_heads * 3, step, window);
        const int64_t g = task % m.num_kv_heads, num_queries = chunk.num_rows * group;
        const Attended all(place(chunk, g, 0), num_queries, padded);
        for (int64_t piece = 1; piece < chunk.end_piece() - chunk.first_piece(); ++piece) {
            fold(Attended(place(chunk, g, piece), num_queries, padded), num_queries, padded, all);
        }
        finish<T>(m, chunk, g, all, padded, w.attended);
    }
}

// The same where pieces would need more room than there is: all of a chunk's pieces by one thread, a key/value head at a time.
template <typename T>
INLINE void attend_chunks(const Model& m, const Pool& pool, const Rows& step, int64_t layer, int64_t num_chunks, const Workspace& w,
                          const AttentionScratch& s, Team& team) {
    const int64_t padded = padded_head(m.head_dim), group = m.num_heads / m.num_kv_heads;
    int64_t* counter = team.next_counter();
    for (int64_t task; (task = team.take(counter, 1)) < num_chunks * m.num_kv_heads;) {
        const Chunk chunk(w.chunks + task / m.num_kv_heads * 3, step, m.layers[layer].window);
        const int64_t g = task % m.num_kv_heads, num_queries = chunk.num_rows * group;
        const Attended all(s.folded, num_queries, padded), own(s.piece, num_queries, padded);
        for (int64_t piece = chunk.first_piece(); piece < chunk.end_piece(); ++piece) {
            float* const states = piece == chunk.first_piece() ? s.folded : s.piece;
            attend_piece<T>(m, pool, step, layer, chunk, g, g + 1, piece, w.queries, padded, s, states, 0);
            if (piece > chunk.first_piece()) fold(own, num_queries, padded, all);
        }
        finish<T>(m, chunk, g, all, padded, w.attended);
    }
}

template <typename T>
INLINE void attend_all(const Model& m, const Pool& pool, const Rows& step, int64_t layer, int64_t num_chunks, const Workspace& w,
                       float* scratch, Team& team) {
    const AttentionScratch s(scratch, padded_head(m.head_dim));
    int64_t num_pieces = 0;
    for (int64_t i = 0; i < num_chunks; ++i) {
        const Chunk chunk(w.chunks + 3 * i, step, m.layers[layer].window);
        const int64_t own = chunk.end_piece() - chunk.first_piece();
        num_pieces = own > num_pieces ? own : num_pieces;
    }
    if (Attended::size(step.num_rows * m.num_heads * num_pieces, padded_head(m.head_dim)) <= step.partial_size) {
        attend_pieces<T>(m, pool, step, layer, num_chunks, num_pieces, w, s, team);
    } else {
        attend_chunks<T>(m, pool, step, layer, num_chunks, w, s, team);
    }
}

// Rows that the threads share out for work that is done row by row.
template <typename Work>
INLINE void each_row(int64_t rows, Team& team, Work work) {
    int64_t* counter = team.next_counter();
    for (int64_t row; (row = team.take(counter, 1)) < rows;) work(row);
}

// Between barriers: what the coming product with `m` needs of rows that several threads have written.
INLINE void prepare(const Matrix& m, const Activation& a, int64_t rows, Team& team) {
    if (!is_whole(m.kind)) return;
    each_row(rows, team, [&](int64_t row) __attribute__((always_inline)) { a.quantize(row, m.kind); });
    team.barrier();
}

template <typename T>
NOINLINE void run_layer(const Model& m, const Pool& pool, const Stream& step, int64_t index, int64_t num_chunks, const Workspace& w,
                      float* scratch, Team& team) {
    const Layer& layer = m.layers[index];
    const int64_t rows = step.num_rows, size = m.hidden_size, stride = padded_size(size);
    each_row(rows, team, [&](int64_t row) __attribute__((always_inline)) {
        const int64_t own = step.rows[row];
        float* x = step.x + own * stride;
        inject_row(layer, step.memory == nullptr ? nullptr : step.memory + own * size, step.x0 + own * stride, x, size);
        set_row(w.normed, row, x, norm_scale(x, size, m.eps), size);
        if (is_whole(layer.input.kind)) w.normed.quantize(row, layer.input.kind);
    });
    team.barrier();
    product(layer.input, w.normed, rows, team, [&](int64_t row, int64_t column, VF sum) __attribute__((always_inline)) {
        store(w.product + row * w.product_stride + column, sum);
    });
    const auto keep_projected = [&](int64_t row, int64_t column, VF sum) __attribute__((always_inline)) {
        store(w.projected + row * w.projected_stride + column, sum);
    };
    if (layer.memory.data != nullptr) product(layer.memory, w.memory, rows, team, keep_projected);
    team.barrier();
    T* keys = static_cast<T*>(pool.keys) + index * pool.layer_stride;
    T* values = static_cast<T*>(pool.values) + index * pool.layer_stride;
    const bool has_projected = layer.memory.data != nullptr || m.shares_memory;
    each_row(rows * m.num_kv_heads, team, [&](int64_t task) __attribute__((always_inline)) {
        const int64_t row = task / m.num_kv_heads;
        const int64_t own = layer.memory.data != nullptr ? row : step.rows[row];
        const float* projected = has_projected ? w.projected + own * w.projected_stride : nullptr;
        float* head = scratch + AttentionScratch::size(padded_head(m.head_dim));
        place_heads<T>(m, layer, step, row, task % m.num_kv_heads, w.product + row * w.product_stride, projected, keys, values,
                          w.queries, head);
    });
    team.barrier();
    attend_all<T>(m, pool, step, index, num_chunks, w, scratch, team);
    team.barrier();
    const auto add_to_stream = [&](int64_t row, int64_t column, VF sum) __attribute__((always_inline)) {
        float* x = step.x + step.rows[row] * stride + column;
        store(x, load<VF>(x) + sum);
    };
    prepare(layer.output, w.attended, rows, team);
    product(layer.output, w.attended, rows, team, add_to_stream);
    team.barrier();
    each_row(rows, team, [&](int64_t row) __attribute__((always_inline)) {
        const float* x = step.x + step.rows[row] * stride;
        set_row(w.normed, row, x, norm_scale(x, size, m.eps), size);
        if (is_whole(layer.up.kind)) w.normed.quantize(row, layer.up.kind);
    });
    team.barrier();
    product(layer.up, w.normed, rows, team, [&](int64_t row, int64_t column, VF sum) __attribute__((always_inline)) {
        const VF positive = sum < 0 ? VF{} : sum;  // what is no number stays so
        w.hidden.set(row, column, positive * positive);
    });
    team.barrier();
    prepare(layer.down, w.hidden, rows, team);
    product(layer.down, w.hidden, rows, team, add_to_stream);
    team.barrier();
}

// Attention alone: queries float32 [T, N, H], after rope and norm, over one layer of the pool -> out [T, N * H].
template <typename T>
INLINE void attend_only(const Model& m, const Pool& pool, const Rows& step, const float* queries, char* memory, float* out, Team& team) {
    Workspace w;
    w.cut(m, step.capacity, team.num_threads, memory);
    float* scratch = w.scratch + team.thread * ((w.scratch_size + 15) / 16 * 16);
    const int64_t size = m.head_dim, padded = padded_head(size), width = m.num_heads * size;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    each_row(step.num_rows * m.num_heads, team, [&](int64_t task) __attribute__((always_inline)) {
        place_query<T>(queries + task * size, size, padded, scale, w.queries + task * padded);
    });
    if (team.thread == 0) cut_chunks(m, step, w.chunks);
    team.barrier();
    attend_all<T>(m, pool, step, 0, count_chunks(m, step), w, scratch, team);
    team.barrier();
    each_row(step.num_rows, team, [&](int64_t row) __attribute__((always_inline)) {
        for (int64_t i = 0; i < width; ++i) out[row * width + i] = w.attended.wide[row * w.attended.stride + i];
    });
}

void attend(const Model& m, const Pool& pool, const Rows& step, const float* queries, char* memory, float* out, Team& team) {
    if (pool.kind == kBfloat16) return attend_only<uint16_t>(m, pool, step, queries, memory, out, team);
    attend_only<float>(m, pool, step, queries, memory, out, team);
}

int64_t workspace_size(const Model& m, int64_t rows, int64_t num_threads) {
    Workspace w;
    return w.cut(m, rows, num_threads, nullptr);
}

// out [rows, n] = input [rows, k] times the matrix; softcap > 0: softcap * tanh(. / softcap) of it.
void apply(const Matrix& m, const float* input, int64_t rows, float softcap, char* memory, float* out, Team& team) {
    const int64_t stride = padded_size(m.k);
    const int64_t size = rows * stride;
    const Activation a{reinterpret_cast<float*>(memory),
                       reinterpret_cast<uint16_t*>(memory + 4 * size),
                       reinterpret_cast<uint8_t*>(memory + 6 * size),
                       reinterpret_cast<float*>(memory + 8 * size),
                       stride};
    each_row(rows, team, [&](int64_t row) __attribute__((always_inline)) {
        set_row(a, row, input + row * m.k, 1.0f, m.k);
        if (is_whole(m.kind)) a.quantize(row, m.kind);
    });
    team.barrier();
    product(m, a, rows, team, [&](int64_t row, int64_t column, VF sum) __attribute__((always_inline)) {
        if (softcap > 0.0f) {
            const VF magnitude = sum < 0 ? -sum : sum, decay = exp(magnitude * (-2.0f / softcap));
            const VF bent = softcap * (1.0f - decay) / (1.0f + decay);
            sum = sum < 0 ? -bent : sum >= 0 ? bent : sum;  // what is no number stays so
        }
        float* to = out + row * m.n + column;
        if (column + LANES <= m.n) {
            store(to, sum);
        } else {
            for (int64_t i = 0; column + i < m.n; ++i) to[i] = sum[i];
        }
    });
}
