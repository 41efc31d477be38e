// A whole step: memories out of the pool, embedding, the layers up to the source, latents into the pool, which positions have
// settled, and the layers above the source on those. Included once per instruction set by `step.cpp`.
// Neighbours: `step.h` has the layers; `lrt_core/step.py` is the same in torch.

template <typename T>
INLINE void embed_token(const Model& m, const T* embedding, int64_t token, float* x, float* x0) {
    embed_row(embedding + token * m.hidden_size, x, m.hidden_size, m.eps);
    for (int64_t i = 0; i < padded_size(m.hidden_size); ++i) x0[i] = x[i];
}

// The row's memory as an operand of the coming products.
INLINE void set_memory(const Matrix& projection, const Workspace& w, int64_t row, const float* memory, int64_t size) {
    set_row(w.memory, row, memory, 1.0f, size);
    if (is_whole(projection.kind)) w.memory.quantize(row, projection.kind);
}

// Where every row's keys, values and latent go, and where its memory comes from: its predecessor's latent, if that has been
// computed since the sequence was placed.
INLINE void lay_out(const Pool& pool, const Step& step, const Workspace& w) {
    const int64_t block_size = pool.block_size;
    int64_t row = 0, table = 0;
    for (int64_t s = 0; s < step.num_sequences; ++s) {
        const Sequence& sequence = step.sequences[s];
        const int32_t* const blocks = step.tables + table;
        w.row_starts[s] = static_cast<int32_t>(row);
        w.table_starts[s] = static_cast<int32_t>(table);
        for (int64_t i = 0; i < sequence.num_rows; ++i, ++row) {
            const int64_t position = sequence.start + i, before = position - 1;
            w.rows[row] = static_cast<int32_t>(row);
            w.is_finite[row] = 1;
            w.tokens[row] = step.tokens[row];
            w.positions[row] = position;
            w.slots[row] = blocks[position / block_size] * block_size + position % block_size;
            const bool is_known = position > 0 && position <= sequence.num_touched;
            w.memory_rows[row] = is_known ? blocks[before / block_size] * block_size + before % block_size : step.zero_row;
        }
        table += sequence.num_blocks;
    }
    w.row_starts[step.num_sequences] = static_cast<int32_t>(row);
}

// The stream before layer 0, and the memories of its rows.
INLINE void begin(const Model& m, const Pool& pool, const Stream& stream, const Workspace& w, Team& team) {
    const int64_t size = m.hidden_size, stride = padded_size(size);
    const Matrix& projection = m.shares_memory ? m.memory : m.layers[0].memory;
    each_row(stream.num_rows, team, [&](int64_t row) __attribute__((always_inline)) {
        float *x = stream.x + row * stride, *x0 = stream.x0 + row * stride;
        if (m.embedding_kind == kBfloat16) {
            embed_token(m, static_cast<const uint16_t*>(m.embedding), stream.tokens[row], x, x0);
        } else {
            embed_token(m, static_cast<const float*>(m.embedding), stream.tokens[row], x, x0);
        }
        if (stream.memory == nullptr) return;
        const float* const latent = pool.latents + w.memory_rows[row] * size;
        for (int64_t i = 0; i < size; ++i) w.recalled[row * size + i] = latent[i];
        set_memory(projection, w, row, latent, size);
    });
    team.barrier();
    if (stream.memory == nullptr || !m.shares_memory) return;
    product(m.memory, w.memory, stream.num_rows, team, [&](int64_t row, int64_t column, VF sum) __attribute__((always_inline)) {
        store(w.projected + row * w.projected_stride + column, sum);
    });
}

INLINE bool is_finite(const float* x, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i] * 0.0f;
    return sum == 0.0f;
}

// out [rows, D] = norm of the stream, and whether that is numbers.
INLINE void read_stream(const Model& m, const Stream& stream, const Workspace& w, float* out, Team& team) {
    const int64_t size = m.hidden_size;
    each_row(stream.num_rows, team, [&](int64_t row) __attribute__((always_inline)) {
        const int64_t own = stream.rows[row];
        const float* const x = stream.x + own * padded_size(size);
        const float scale = norm_scale(x, size, m.eps);
        for (int64_t i = 0; i < size; ++i) out[row * size + i] = x[i] * scale;
        w.is_finite[own] &= is_finite(out + row * size, size);
    });
    team.barrier();
}

// |now - before| / |now|
INLINE float relative_change(const float* now, const float* before, int64_t size) {
    float difference = 0.0f, whole = 0.0f;
#pragma omp simd reduction(+ : difference, whole)
    for (int64_t i = 0; i < size; ++i) {
        difference += (now[i] - before[i]) * (now[i] - before[i]);
        whole += now[i] * now[i];
    }
    const float length = __builtin_sqrtf(whole);
    return __builtin_sqrtf(difference) / (length < 1e-30f ? 1e-30f : length);  // no number where a state is none
}

// Latents to the pool; by how much each row's memory has changed, which is the latent before it.
INLINE void keep_latents(const Model& m, const Pool& pool, const Stream& stream, const Workspace& w, Team& team) {
    const int64_t size = m.hidden_size;
    each_row(stream.num_rows, team, [&](int64_t row) __attribute__((always_inline)) {
        const float* const latent = w.latents + row * size;
        float* const kept = pool.latents + stream.slots[row] * size;
        for (int64_t i = 0; i < size; ++i) kept[i] = latent[i];
        const bool has_memory = row > 0 && stream.memory != nullptr;
        w.changes[row] = has_memory ? relative_change(latent - size, w.recalled + row * size, size) : 0.0f;
    });
    team.barrier();
}

// What settled: a sequence's first row, whose memory was final, and each next one while what entered it was within tolerance.
// The settled rows take the place of all.
INLINE void settle(const Step& step, const Workspace& w, const Outcome& outcome) {
    const bool has_memory = step.zero_row >= 0;
    int32_t count = 0, start = 0;
    for (int64_t s = 0; s < step.num_sequences; ++s) {
        const int32_t end = w.row_starts[s + 1];
        float residual = -1.0f;
        for (int32_t row = start + 1; row < end && has_memory; ++row) {
            if (residual == residual && !(w.changes[row] <= residual)) residual = w.changes[row];  // no number stays so
        }
        int32_t last = start + 1;
        while (last < end && (!has_memory || w.changes[last] <= step.tolerance)) ++last;
        outcome.residuals[s] = residual;
        outcome.num_settled[s] = last - start;
        w.row_starts[s] = count;
        for (int32_t row = start; row < last; ++row, ++count) {
            w.rows[count] = row;
            w.tokens[count] = w.tokens[row];
            w.positions[count] = w.positions[row];
            w.slots[count] = w.slots[row];
        }
        start = end;
    }
    w.row_starts[step.num_sequences] = count;
}

// Whose settled rows' states are numbers, all of them.
INLINE void check(const Workspace& w, int64_t num_sequences, const Outcome& outcome) {
    for (int64_t s = 0; s < num_sequences; ++s) {
        outcome.is_finite[s] = 1;
        for (int64_t row = w.row_starts[s]; row < w.row_starts[s + 1]; ++row) outcome.is_finite[s] &= w.is_finite[w.rows[row]];
    }
}

template <typename T>
INLINE void run_step(const Model& m, const Pool& pool, const Step& step, int64_t end_of_source, char* memory, const Outcome& outcome,
                     Team& team) {
    Workspace w;
    w.cut(m, step.capacity, team.num_threads, memory);
    float* const scratch = w.scratch + team.thread * ((w.scratch_size + 15) / 16 * 16);
    const int64_t size = m.hidden_size;
    if (team.thread == 0) lay_out(pool, step, w);
    team.barrier();
    const Rows all{step.num_rows, step.num_sequences, step.capacity, w.tokens, w.positions, w.slots, w.row_starts,
                   w.table_starts, step.tables, step.partial, step.partial_size};
    Stream stream{all, w.rows, w.x, w.x0, step.zero_row < 0 ? nullptr : w.recalled};
    begin(m, pool, stream, w, team);
    if (team.thread == 0) cut_chunks(m, stream, w.chunks);
    const int64_t all_chunks = count_chunks(m, stream);
    for (int64_t index = 0; index < end_of_source; ++index) run_layer<T>(m, pool, stream, index, all_chunks, w, scratch, team);
    read_stream(m, stream, w, w.latents, team);
    keep_latents(m, pool, stream, w, team);
    if (team.thread == 0) settle(step, w, outcome);
    team.barrier();
    stream.num_rows = w.row_starts[step.num_sequences];
    if (end_of_source == m.num_layers) {
        each_row(stream.num_rows, team, [&](int64_t row) __attribute__((always_inline)) {
            const float* const latent = w.latents + w.rows[row] * size;
            for (int64_t i = 0; i < size; ++i) outcome.hidden[row * size + i] = latent[i];
        });
    } else {
        if (team.thread == 0) cut_chunks(m, stream, w.chunks);
        const int64_t num_chunks = count_chunks(m, stream);
        if (stream.memory != nullptr && !m.shares_memory && stream.num_rows < step.num_rows) {
            each_row(stream.num_rows, team, [&](int64_t row) __attribute__((always_inline)) {
                set_memory(m.layers[0].memory, w, row, stream.memory + w.rows[row] * size, size);
            });
        }
        for (int64_t index = end_of_source; index < m.num_layers; ++index) {
            run_layer<T>(m, pool, stream, index, num_chunks, w, scratch, team);
        }
        read_stream(m, stream, w, outcome.hidden, team);
    }
    if (team.thread == 0) check(w, step.num_sequences, outcome);
}

// All layers over a step's rows; end_of_source: layers up to and with the source.
void forward(const Model& m, const Pool& pool, const Step& step, int64_t end_of_source, char* memory, const Outcome& outcome,
             Team& team) {
    if (pool.kind == kBfloat16) return run_step<uint16_t>(m, pool, step, end_of_source, memory, outcome, team);
    run_step<float>(m, pool, step, end_of_source, memory, outcome, team);
}
