// Products of activations with packed weights: out[r][n] = sum over k of a[r][k] w[n][k], in float32.
//
// Every output is one accumulator that takes k in rising order, whatever the number of rows: a row's result is bit-equal alone
// and in any batch. Included once per instruction set by `step.cpp`.

constexpr int kVectorsPerTile = kTile / LANES;

// acc[r][c] += the product of rows a[r] with the tiles at w + t * tile_bytes, of which vector c is part c % kVectorsPerTile of
// tile c / kVectorsPerTile.
template <int kRows, int kTiles>
INLINE void accumulate(const float* w, int64_t tile_size, const float* a, int64_t stride, int64_t depth,
                       VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    for (int64_t k = 0; k < depth; ++k) {
        VF weights[kVectors];
#pragma GCC unroll 16
        for (int c = 0; c < kVectors; ++c) {
            weights[c] = load<VF>(w + (c / kVectorsPerTile) * tile_size + k * kTile + (c % kVectorsPerTile) * LANES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const VF x = splat(a[r * stride + k]);
#pragma GCC unroll 16
            for (int c = 0; c < kVectors; ++c) acc[r][c] += x * weights[c];
        }
    }
}

template <int kRows, int kTiles>
INLINE void accumulate(const uint16_t* w, int64_t tile_size, const float* a, int64_t stride, int64_t depth,
                       VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    for (int64_t k = 0; k < depth; k += 2) {
        // With several rows arithmetic holds the loads back too long for the processor's own prefetching (a seventh at 4 rows).
        for (int t = 0; t < (kRows > 1 ? kTiles : 0); ++t) __builtin_prefetch(w + t * tile_size + k * kTile + 64 * kTile);
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            VF weights[kVectors];
#pragma GCC unroll 16
            for (int c = 0; c < kVectors; ++c) {
                const VU raw =
                    load<VU>(w + (c / kVectorsPerTile) * tile_size + k * kTile + (c % kVectorsPerTile) * 2 * LANES);
                weights[c] = part == 0 ? (VF)(raw << 16) : (VF)(raw & 0xffff0000u);
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const VF x = splat(a[r * stride + k + part]);
#pragma GCC unroll 16
                for (int c = 0; c < kVectors; ++c) acc[r][c] += x * weights[c];
            }
        }
    }
}

// The weights count 2^24 times too much here; the scales make up for it.
template <int kRows, int kTiles>
INLINE void accumulate(const int8_t* w, int64_t tile_size, const float* a, int64_t stride, int64_t depth,
                       VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    for (int64_t k = 0; k < depth; k += 4) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            VF weights[kVectors];
#pragma GCC unroll 16
            for (int c = 0; c < kVectors; ++c) {
                const VU raw =
                    load<VU>(w + (c / kVectorsPerTile) * tile_size + k * kTile + (c % kVectorsPerTile) * 4 * LANES);
                const VU top = part == 3 ? raw & 0xff000000u : part == 0 ? raw << 24 : (raw << (24 - 8 * part)) & 0xff000000u;
                weights[c] = __builtin_convertvector((VI)top, VF);
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const VF x = splat(a[r * stride + k + part]);
#pragma GCC unroll 16
                for (int c = 0; c < kVectors; ++c) acc[r][c] += x * weights[c];
            }
        }
    }
}

#if BF16_DOT
template <int kRows, int kTiles>
INLINE void accumulate(const uint16_t* w, int64_t tile_size, const uint16_t* a, int64_t stride, int64_t depth,
                       VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh weights[kTiles];
#pragma GCC unroll 16
        for (int c = 0; c < kTiles; ++c) weights[c] = (__m512bh)_mm512_loadu_si512(w + c * tile_size + k * kTile);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, a + r * stride + k, sizeof pair);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
            for (int c = 0; c < kTiles; ++c) acc[r][c] = (VF)_mm512_dpbf16_ps((__m512)acc[r][c], x, weights[c]);
        }
    }
}
#endif

// Rows of activations [rows, stride], the numbers behind the last column zero: in float32, and where the processor multiplies
// pairs of bfloat16 in that type too, for bfloat16 weights; where it multiplies bytes, rows that meet int8 weights are taken
// apart by `quantize`.
struct Activation {
    float* wide;
    uint16_t* pairs;
    uint8_t* bytes;  // of 32768 + x / step: four numbers' upper ones, then their lower ones; rows 2 * stride apart
    float* steps;    // one of each row
    int64_t stride;

    INLINE void set(int64_t row, int64_t column, VF x) const {
        store(wide + row * stride + column, x);
#if BF16_DOT
        store(pairs + row * stride + column, narrow(x));
#endif
    }

    INLINE void set(int64_t row, int64_t column, float x) const {
        wide[row * stride + column] = x;
#if BF16_DOT
        narrow(x, pairs + row * stride + column);
#endif
    }

    // A row that is complete in 16 bits of its own scale: two products of bytes, exact in integers, then cost less than one in
    // float32 and stray from it by a hundred-thousandth. What is not finite makes the step so.
    INLINE void quantize(int64_t row) const {
#if VNNI
        const float* const x = wide + row * stride;
        VF most = {}, poison = {};
        for (int64_t i = 0; i < stride; i += LANES) {
            const VF v = load<VF>(x + i);
            most = vmax(most, v < 0 ? -v : v);
            poison += v * 0.0f;
        }
        const float largest = reduce_max(most), inverse = largest > 0.0f ? 32512.0f / largest : 0.0f;
        steps[row] = largest / 32512.0f + reduce_sum(poison);
        for (int64_t i = 0; i < stride; i += LANES) {
            // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the lowest bits.
            const VU number = (VU)(load<VF>(x + i) * inverse + 12582912.0f) + 32768u;
            uint32_t upper[LANES / 4], lower[LANES / 4];
            store(upper, __builtin_convertvector((number >> 8) & 255u, VB));
            store(lower, __builtin_convertvector(number & 255u, VB));
            uint32_t* const out = reinterpret_cast<uint32_t*>(bytes + 2 * (row * stride + i));
            for (int j = 0; j < LANES / 4; ++j) out[2 * j] = upper[j], out[2 * j + 1] = lower[j];
        }
#else
        (void)row;
#endif
    }
};

// Registers allow this many rows at once, each with kMostTiles tiles' worth of outputs or fewer.
#if LANES == 16
constexpr int64_t kMostRows = 8;
INLINE int64_t tiles_at_once(int64_t rows, Kind kind) {
#if VNNI
    if (kind == kInt8) return rows == 1 ? 8 : rows <= 3 ? 4 : 2;  // two sums each
#endif
    return rows == 1 ? 8 : rows <= 4 ? 4 : 2;
}
#else
constexpr int64_t kMostRows = 6;
INLINE int64_t tiles_at_once(int64_t rows, Kind) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif
constexpr int64_t kMostTiles = 8;
INLINE int64_t most_rows(Kind kind) { return VNNI && kind == kInt8 ? 6 : kMostRows; }

template <int kRows, int kTiles, typename W, typename A>
NOINLINE void multiply_block(const W* w, int64_t tile_size, const A* a, int64_t stride, int64_t depth, float* out) {
    VF acc[kRows][kTiles * kVectorsPerTile] = {};
    accumulate<kRows, kTiles>(w, tile_size, a, stride, depth, acc);
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kTiles * kVectorsPerTile; ++c) store(out + (r * kTiles * kVectorsPerTile + c) * LANES, acc[r][c]);
    }
}

#if VNNI
// sum += the products of four bytes without sign and four with. GCC 12 copies every sum twice around its own function for it.
INLINE void add_products(__m512i& sum, __m512i a, __m512i b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// The same for int8 weights and the bytes of activations; `offsets` [tiles, 16] is what the bytes' own offset adds, negated.
struct Bytes {
    const uint8_t* bytes;
    const float* steps;
    const int32_t* offsets;
    const float* scales;
};

// Every loop over sums is unrolled, or they would lie in memory.
template <int kRows, int kTiles, typename W, typename A>
NOINLINE void multiply_block(const int8_t* w, int64_t tile_size, const Bytes* a, int64_t stride, int64_t depth, float* out) {
    __m512i high[kRows][kTiles], low[kRows][kTiles];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < kTiles; ++c) {
            high[r][c] = _mm512_loadu_si512(a->offsets + c * kTile);
            low[r][c] = _mm512_setzero_si512();
        }
    }
    for (int64_t k = 0; k < depth; k += 4) {
        __m512i weights[kTiles];
#pragma GCC unroll 16
        for (int c = 0; c < kTiles; ++c) {
            weights[c] = _mm512_loadu_si512(w + c * tile_size + k * kTile);
            if (kRows > 1) __builtin_prefetch(w + c * tile_size + k * kTile + 64 * kTile);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            int32_t upper, lower;
            __builtin_memcpy(&upper, a->bytes + 2 * (r * stride + k), sizeof upper);
            __builtin_memcpy(&lower, a->bytes + 2 * (r * stride + k) + 4, sizeof lower);
            const __m512i x = _mm512_set1_epi32(upper), y = _mm512_set1_epi32(lower);
#pragma GCC unroll 16
            for (int c = 0; c < kTiles; ++c) {
                add_products(high[r][c], x, weights[c]);
                add_products(low[r][c], y, weights[c]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < kTiles; ++c) {
            const VF upper = __builtin_convertvector((VI)high[r][c], VF), lower = __builtin_convertvector((VI)low[r][c], VF);
            const VF sum = upper * 256.0f + lower;
            // The scales are meant for weights 2^24 times too large.
            store(out + (r * kTiles + c) * LANES, (sum * (a->steps[r] * 16777216.0f)) * load<VF>(a->scales + c * kTile));
        }
    }
}
#endif

// out [rows, tiles * 16] = a [rows, depth] times `tiles` tiles; only the pairs of numbers that `tiles_at_once` names, and one tile.
template <typename W, typename A>
INLINE void multiply(const W* w, int64_t tiles, int64_t tile_size, const A* a, int64_t stride, int64_t rows, int64_t depth, float* out) {
#define CASE(r, t)                                                                  \
    case (r) * 16 + (t):                                                            \
        return multiply_block<r, t, W, A>(w, tile_size, a, stride, depth, out);
    switch (rows * 16 + tiles) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
#if LANES == 16
        CASE(7, 1) CASE(8, 1) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2) CASE(7, 2) CASE(8, 2)
        CASE(1, 8) CASE(2, 4) CASE(3, 4) CASE(4, 4)
#else
        CASE(1, 4) CASE(2, 2) CASE(3, 2)
#endif
    }
#undef CASE
    __builtin_unreachable();
}

NOINLINE void multiply(const Matrix& m, int64_t tile, int64_t tiles, const Activation& a, int64_t row, int64_t rows, float* out) {
    const int64_t depth = (m.k + kTile - 1) / kTile * kTile, size = depth * kTile, first = row * a.stride;
    if (m.kind == kFloat32) {
        multiply(static_cast<const float*>(m.data) + tile * size, tiles, size, a.wide + first, a.stride, rows, depth, out);
    } else if (m.kind == kBfloat16) {
        const uint16_t* w = static_cast<const uint16_t*>(m.data) + tile * size;
#if BF16_DOT
        multiply(w, tiles, size, a.pairs + first, a.stride, rows, depth, out);
#else
        multiply(w, tiles, size, a.wide + first, a.stride, rows, depth, out);
#endif
    } else {
        const int8_t* w = static_cast<const int8_t*>(m.data) + tile * size;
#if VNNI
        const Bytes bytes{a.bytes + 2 * first, a.steps + row, m.offsets + tile * kTile, m.scales + tile * kTile};
        multiply(w, tiles, size, &bytes, a.stride, rows, depth, out);
#else
        multiply(w, tiles, size, a.wide + first, a.stride, rows, depth, out);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < tiles * kTile; c += LANES) {
                float* part = out + r * tiles * kTile + c;
                store(part, load<VF>(part) * load<VF>(m.scales + tile * kTile + c));
            }
        }
#endif
    }
}

// a [rows, k] times all of `m`; every vector of the result goes to take(row, column, vector). Threads share the tiles.
template <typename Take>
INLINE void product(const Matrix& m, const Activation& a, int64_t rows, Team& team, Take take) {
    const int64_t num_tiles = (m.n + kTile - 1) / kTile;
    const Kind kind = static_cast<Kind>(m.kind);
    const int64_t num_blocks = (rows + most_rows(kind) - 1) / most_rows(kind);
    const int64_t group = tiles_at_once((rows + num_blocks - 1) / num_blocks, kind);
    const int64_t grab = num_blocks == 1 && group < 4 ? 4 : group;
    alignas(64) float out[kMostRows * kMostTiles * kTile];
    int64_t* counter = team.next_counter();
    for (int64_t start; (start = team.take(counter, grab)) < num_tiles;) {
        const int64_t end = start + grab < num_tiles ? start + grab : num_tiles;
        for (int64_t tile = start; tile < end;) {
            const int64_t tiles = tile + group <= end ? group : 1;
            for (int64_t block = 0, row = 0; block < num_blocks; ++block) {
                const int64_t count = rows / num_blocks + (block < rows % num_blocks);
                multiply(m, tile, tiles, a, row, count, out);
                for (int64_t r = 0; r < count; ++r) {
                    for (int64_t c = 0; c < tiles * kTile; c += LANES) {
                        take(row + r, tile * kTile + c, load<VF>(out + r * tiles * kTile + c));
                    }
                }
                row += count;
            }
            tile += tiles;
        }
    }
}
