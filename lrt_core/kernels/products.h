// Products of activations with packed weights: out[r][n] = sum over k of a[r][k] w[n][k], to float32.
//
// Every output is one accumulator that takes k in rising order, in whole numbers exactly, whatever the number of rows: a row's
// result is bit-equal alone and in any batch. Included once per instruction set by `step.cpp`.

constexpr int kVectorsPerTile = kTile / LANES;
constexpr bool kHasPairs = PAIRS, kHasBytes = VNNI;

// Weights that other blocks of rows leave to this one to fetch, `step` bytes at every move of a cursor for each of its tiles,
// `tile` bytes apart: memory is then as busy while rows meet tiles that are there as while it is waited for.
struct Ahead {
    const char* at;
    int64_t step;
    int64_t tile;
};

// Four k of a tile in whole numbers of 12 bits; `plan.h` says how they lie.
struct Twelve {
    uint8_t bytes[96];
};

// Four k of a tile in int8, in pairs.
struct Eight {
    uint8_t bytes[64];
};

// What a cursor moves by: bytes of every tile, and numbers of each row. kIsNear: the tiles are in the nearest cache.
template <typename W>
struct Move {
    static constexpr int kBytes = 128, kNumbers = 128 / (kTile * static_cast<int>(sizeof(W)));
    static constexpr bool kIsNear = false;
};
template <>
struct Move<Twelve> {
    static constexpr int kBytes = 96, kNumbers = 4;
    static constexpr bool kIsNear = false;
};
template <>
struct Move<Eight> {
    static constexpr int kBytes = 64, kNumbers = 4;
    static constexpr bool kIsNear = false;
};
template <>
struct Move<int16_t> {
    static constexpr int kBytes = 128, kNumbers = 4;
    static constexpr bool kIsNear = true;
};

// Where a block of rows and tiles stands in k: it moves by kMove numbers of each row. Four rows go by one pointer, and it is kept
// from the compiler that the pointers could be computed from each other: by its own choice it adds so many numbers that these,
// and not the products, take the time.
template <int kRows, int kTiles, typename W, typename X>
struct Cursor {
    static constexpr int kMove = Move<W>::kNumbers;
    static constexpr int kFours = (kRows + 3) / 4;
    const X* fours[kFours];
    const W* tiles[kTiles];
    int64_t stride;
    Ahead ahead;

    // Row 0 at `x`, tile 0 at `w`.
    INLINE Cursor(const W* w, int64_t tile_size, const X* x, int64_t stride, const Ahead& ahead) : stride(stride), ahead(ahead) {
        for (int i = 0; i < kFours; ++i) fours[i] = x + 4 * i * stride;
        for (int i = 0; i < kTiles; ++i) tiles[i] = w + i * tile_size;
    }

    INLINE const X* row(int r) const { return fours[r / 4] + (r % 4) * stride; }

    // Vector c of all tiles, of the part of 64 bytes a tile.
    template <typename V>
    INLINE V weights(int c, int part) const {
        const char* const start = reinterpret_cast<const char*>(tiles[c / kVectorsPerTile]);
        return load<V>(start + 64 * part + c % kVectorsPerTile * 4 * LANES);
    }

    // numbers: of X in kMove of a row. With several rows arithmetic holds the loads back too long for the processor's own
    // prefetching.
    INLINE void move(int numbers) {
        if (kRows > 1) {
#pragma GCC unroll 16
            for (int i = 0; i < kTiles; ++i) {
                const char* const start = reinterpret_cast<const char*>(tiles[i]);
                if (!Move<W>::kIsNear) {
                    __builtin_prefetch(start + 2048);
                    __builtin_prefetch(start + 2048 + 64);
                }
                __builtin_prefetch(ahead.at + i * ahead.tile, 0, Move<W>::kIsNear ? 3 : 2);
            }
            ahead.at += ahead.step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kFours; ++i) {
            fours[i] += numbers;
            asm("" : "+r"(fours[i]));
        }
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) tiles[i] += Move<W>::kBytes / sizeof(W);
    }
};

// acc[r][c] += the product of row r's numbers with vector c of the tiles' outputs, over `depth` k.
template <int kRows, int kTiles>
INLINE void accumulate(Cursor<kRows, kTiles, float, float> at, int64_t depth, VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    for (int64_t k = 0; k < depth; k += at.kMove) {
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            VF weights[kVectors];
#pragma GCC unroll 16
            for (int c = 0; c < kVectors; ++c) weights[c] = at.template weights<VF>(c, part);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const VF x = splat(at.row(r)[part]);
#pragma GCC unroll 16
                for (int c = 0; c < kVectors; ++c) acc[r][c] += x * weights[c];
            }
        }
        at.move(at.kMove);
    }
}

template <int kRows, int kTiles>
INLINE void accumulate(Cursor<kRows, kTiles, uint16_t, float> at, int64_t depth, VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    for (int64_t k = 0; k < depth; k += at.kMove) {
#pragma GCC unroll 1
        for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 2
            for (int number = 0; number < 2; ++number) {
                VF weights[kVectors];
#pragma GCC unroll 16
                for (int c = 0; c < kVectors; ++c) {
                    const VU raw = at.template weights<VU>(c, part);
                    weights[c] = number == 0 ? (VF)(raw << 16) : (VF)(raw & 0xffff0000u);
                }
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const VF x = splat(at.row(r)[2 * part + number]);
#pragma GCC unroll 16
                    for (int c = 0; c < kVectors; ++c) acc[r][c] += x * weights[c];
                }
            }
        }
        at.move(at.kMove);
    }
}

// The weights count 2^24 times too much here; the scales make up for it.
template <int kRows, int kTiles>
INLINE void accumulate(Cursor<kRows, kTiles, int8_t, float> at, int64_t depth, VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    for (int64_t k = 0; k < depth; k += at.kMove) {
#pragma GCC unroll 1
        for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 4
            for (int number = 0; number < 4; ++number) {
                VF weights[kVectors];
#pragma GCC unroll 16
                for (int c = 0; c < kVectors; ++c) {
                    const VU raw = at.template weights<VU>(c, part);
                    const VU top = number == 3 ? raw & 0xff000000u : number == 0 ? raw << 24 : (raw << (24 - 8 * number)) & 0xff000000u;
                    weights[c] = __builtin_convertvector((VI)top, VF);
                }
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const VF x = splat(at.row(r)[4 * part + number]);
#pragma GCC unroll 16
                    for (int c = 0; c < kVectors; ++c) acc[r][c] += x * weights[c];
                }
            }
        }
        at.move(at.kMove);
    }
}

INLINE int32_t load_lane(const void* p) {
    int32_t lane;
    __builtin_memcpy(&lane, p, sizeof lane);
    return lane;
}

#if BF16_DOT
template <int kRows, int kTiles>
INLINE void accumulate(Cursor<kRows, kTiles, uint16_t, uint16_t> at, int64_t depth, VF (&acc)[kRows][kTiles * kVectorsPerTile]) {
    for (int64_t k = 0; k < depth; k += at.kMove) {
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            __m512bh weights[kTiles];
#pragma GCC unroll 16
            for (int c = 0; c < kTiles; ++c) weights[c] = (__m512bh)at.template weights<__m512i>(c, part);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const __m512bh x = (__m512bh)_mm512_set1_epi32(load_lane(at.row(r) + 2 * part));
#pragma GCC unroll 16
                for (int c = 0; c < kTiles; ++c) acc[r][c] = (VF)_mm512_dpbf16_ps((__m512)acc[r][c], x, weights[c]);
            }
        }
        at.move(at.kMove);
    }
}
#endif

// Weights of these kinds are multiplied in whole numbers.
INLINE bool is_whole(int32_t kind) { return (VNNI && kind == kInt8) || (PAIRS && (kind == kInt12 || kind == kInt8Pairs)); }

// Rows of activations [rows, stride], the numbers behind the last column zero: in float32, and where the processor multiplies
// pairs of bfloat16 in that type too, for bfloat16 weights; rows that meet weights in whole numbers become such by `quantize`.
struct Activation {
    float* wide;
    uint16_t* pairs;
    uint8_t* bytes;  // of 32768 + x / step: four numbers' upper ones, then their lower ones; or x / step; rows 2 * stride apart
    float* steps;    // one of each row
    int64_t stride;

    INLINE int16_t* numbers() const { return reinterpret_cast<int16_t*>(bytes); }

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

    // A row that is complete, for weights of that kind. What is not finite makes the row's step so.
    INLINE void quantize(int64_t row, int32_t kind) const {
        if (kind == kInt8) return to_bytes(row);
        to_numbers(row, kind == kInt8Pairs ? 127 : kMostWeight);
    }

    // In 16 bits of the row's own scale: two products of bytes, exact in integers, then cost less than one in float32 and stray
    // from it by a hundred-thousandth.
    INLINE void to_bytes(int64_t row) const {
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

    // In as many bits as 16 have and as keep every sum over kSpan products with weights of at most that size within 32.
    INLINE void to_numbers(int64_t row, int64_t most_weight) const {
#if PAIRS
        const float* const x = wide + row * stride;
        VF most = {}, poison = {};
        float most_of_span = 0.0f;
        for (int64_t start = 0; start < stride; start += kSpan) {
            VF sum = {};
            for (int64_t i = start; i < stride && i < start + kSpan; i += LANES) {
                const VF v = load<VF>(x + i), size = v < 0 ? -v : v;
                most = vmax(most, size);
                sum += size;
                poison += v * 0.0f;
            }
            const float of_span = reduce_sum(sum);
            most_of_span = of_span > most_of_span ? of_span : most_of_span;
        }
        // Rounding adds half to each number at most; 100 for what float32 rounds here.
        const float most_sum = static_cast<float>(2147483647 / most_weight - kSpan / 2 - 100);
        const float largest = reduce_max(most);
        const float by_size = largest / 32767.0f, by_sum = most_of_span / most_sum;
        const float step = by_size > by_sum ? by_size : by_sum, inverse = step > 0.0f ? 1.0f / step : 0.0f;
        steps[row] = step + reduce_sum(poison);
        for (int64_t i = 0; i < stride; i += LANES) {
            // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the lowest bits.
            const VU number = (VU)(load<VF>(x + i) * inverse + 12582912.0f);
            store(numbers() + row * stride + i, __builtin_convertvector(number & 0xffffu, VH));
        }
#else
        (void)row, (void)most_weight;
#endif
    }
};

// Registers allow this many rows at once or `most_rows`, each with kMostTiles tiles' worth of outputs or fewer.
#if LANES == 16
constexpr int64_t kMostRows = 12;
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
INLINE int64_t most_rows(Kind kind) {
    if (VNNI && kind == kInt8) return 6;
    return LANES == 16 && !VNNI && is_whole(kind) ? 8 : kMostRows;  // its products need registers before they are sums
}

template <int kRows, int kTiles, typename W, typename A>
NOINLINE void multiply_block(const W* w, int64_t tile_size, const A* a, int64_t stride, int64_t depth, const Ahead& ahead, float* out) {
    VF acc[kRows][kTiles * kVectorsPerTile] = {};
    accumulate<kRows, kTiles>(Cursor<kRows, kTiles, W, A>(w, tile_size, a, stride, ahead), depth, acc);
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
NOINLINE void multiply_block(const int8_t* w, int64_t tile_size, const Bytes* a, int64_t stride, int64_t depth, const Ahead& ahead,
                             float* out) {
    __m512i high[kRows][kTiles], low[kRows][kTiles];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < kTiles; ++c) {
            high[r][c] = _mm512_loadu_si512(a->offsets + c * kTile);
            low[r][c] = _mm512_setzero_si512();
        }
    }
    Cursor<kRows, kTiles, int8_t, uint8_t> at(w, tile_size, a->bytes, 2 * stride, ahead);
    for (int64_t k = 0; k < depth; k += at.kMove) {
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            __m512i weights[kTiles];
#pragma GCC unroll 16
            for (int c = 0; c < kTiles; ++c) weights[c] = at.template weights<__m512i>(c, part);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const __m512i x = _mm512_set1_epi32(load_lane(at.row(r) + 8 * part));
                const __m512i y = _mm512_set1_epi32(load_lane(at.row(r) + 8 * part + 4));
#pragma GCC unroll 16
                for (int c = 0; c < kTiles; ++c) {
                    add_products(high[r][c], x, weights[c]);
                    add_products(low[r][c], y, weights[c]);
                }
            }
        }
        at.move(2 * at.kMove);
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

#if PAIRS
// sum += the products of two numbers of 16 bits in every lane.
#if VNNI
INLINE void add_pairs(VI& sum, VI a, VI b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#elif LANES == 16
INLINE void add_pairs(VI& sum, VI a, VI b) { sum += (VI)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#else
INLINE void add_pairs(VI& sum, VI a, VI b) { sum += (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

// Weights and activations in whole numbers: sums over kSpan of them are exact. scales: of the first tile's first span, the next
// tile's `scale_stride` on and the next span's `scale_step`.
struct Numbers {
    const int16_t* numbers;
    const float* scales;
    int64_t scale_stride, scale_step;
};

// Bytes with and without a sign, as numbers of 16 bits.
#if LANES == 16
typedef __m512i VNumbers;
INLINE VNumbers signed_bytes(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE VNumbers bytes(const uint8_t* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE VNumbers times_16(VNumbers x) { return _mm512_slli_epi16(x, 4); }
INLINE VNumbers over_16(VNumbers x) { return _mm512_srli_epi16(x, 4); }
#else
typedef __m256i VNumbers;
INLINE VNumbers signed_bytes(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE VNumbers bytes(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE VNumbers times_16(VNumbers x) { return _mm256_slli_epi16(x, 4); }
INLINE VNumbers over_16(VNumbers x) { return _mm256_srli_epi16(x, 4); }
#endif

// Vector c of a tile's outputs in 16 bits: the first two k and the second two.
INLINE void unpack(const Twelve* w, int c, VI (&parts)[2]) {
    const uint8_t* const at = w->bytes + c * 2 * LANES;
    const VNumbers lower = bytes(at + 64);
    parts[0] = (VI)times_16(signed_bytes(at)) | ((VI)lower & 0x000f000f);
    parts[1] = (VI)times_16(signed_bytes(at + 32)) | (VI)over_16(lower);
}

INLINE void unpack(const Eight* w, int c, VI (&parts)[2]) {
    const uint8_t* const at = w->bytes + c * 2 * LANES;
    parts[0] = (VI)signed_bytes(at);
    parts[1] = (VI)signed_bytes(at + 32);
}

// Vector c of all tiles at the cursor.
template <int kRows, int kTiles, typename W>
INLINE void weights_at(const Cursor<kRows, kTiles, W, int16_t>& at, int c, VI (&parts)[2]) {
    unpack(at.tiles[c / kVectorsPerTile], c % kVectorsPerTile, parts);
}

template <int kRows, int kTiles>
INLINE void weights_at(const Cursor<kRows, kTiles, int16_t, int16_t>& at, int c, VI (&parts)[2]) {
    parts[0] = at.template weights<VI>(c, 0);
    parts[1] = at.template weights<VI>(c, 1);
}

// Adds to `out` the products with weights in whole numbers, packed or unpacked, of any number of spans, but for the rows' steps.
template <int kRows, int kTiles, typename W, typename A>
NOINLINE void multiply_block(const W* w, int64_t tile_size, const Numbers* a, int64_t stride, int64_t depth, const Ahead& ahead,
                             float* out) {
    constexpr int kVectors = kTiles * kVectorsPerTile;
    Cursor<kRows, kTiles, W, int16_t> at(w, tile_size, a->numbers, stride, ahead);
    const float* scales = a->scales;
    for (int64_t start = 0; start < depth; start += kSpan) {
        VI sums[kRows][kVectors];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
            for (int c = 0; c < kVectors; ++c) sums[r][c] = VI{};
        }
        for (int i = 0; i < kTiles; ++i) __builtin_prefetch(scales + i * a->scale_stride);
        const int64_t end = start + kSpan < depth ? start + kSpan : depth;
        for (int64_t k = start; k < end; k += at.kMove) {
            VI weights[kVectors][2];
#pragma GCC unroll 16
            for (int c = 0; c < kVectors; ++c) weights_at(at, c, weights[c]);
#pragma GCC unroll 2
            for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const VI x = load_lane(at.row(r) + 2 * part) - VI{};
#pragma GCC unroll 16
                    for (int c = 0; c < kVectors; ++c) add_pairs(sums[r][c], x, weights[c][part]);
                }
            }
            at.move(at.kMove);
        }
#pragma GCC unroll 16
        for (int c = 0; c < kVectors; ++c) {
            const VF scale = load<VF>(scales + c / kVectorsPerTile * a->scale_stride + c % kVectorsPerTile * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                float* const part = out + (r * kVectors + c) * LANES;
                store(part, load<VF>(part) + __builtin_convertvector(sums[r][c], VF) * scale);
            }
        }
        scales += a->scale_step;
    }
}

// The scales of a matrix from that tile on.
INLINE Numbers numbers_of(const Matrix& m, int64_t tile, const int16_t* activations) {
    const int64_t num_spans = m.kind == kInt12 ? (padded_size(m.k) + kSpan - 1) / kSpan : 1;
    return Numbers{activations, m.scales + tile * num_spans * kTile, num_spans * kTile, num_spans > 1 ? kTile : 0};
}
#endif

// out [rows, tiles * 16] = a [rows, depth] times `tiles` tiles; only the pairs of numbers that `tiles_at_once` names, and one tile.
template <typename W, typename A>
INLINE void multiply(const W* w, int64_t tiles, int64_t tile_size, const A* a, int64_t stride, int64_t rows, int64_t depth,
                     const Ahead& ahead, float* out) {
#define CASE(r, t)                                                                  \
    case (r) * 16 + (t):                                                            \
        return multiply_block<r, t, W, A>(w, tile_size, a, stride, depth, ahead, out);
    switch (rows * 16 + tiles) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
#if LANES == 16
        CASE(7, 1) CASE(8, 1) CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
        CASE(7, 2) CASE(8, 2) CASE(9, 2) CASE(10, 2) CASE(11, 2) CASE(12, 2) CASE(1, 8) CASE(2, 4) CASE(3, 4) CASE(4, 4)
#else
        CASE(1, 4) CASE(2, 2) CASE(3, 2)
#endif
    }
#undef CASE
    __builtin_unreachable();
}

// Each row of out [rows, tiles * 16] times its number: by itself and not on the way to whoever takes it, since with an addition
// there it would be rounded once in one of two kernels and twice in the other.
INLINE void scale_rows(float* out, int64_t rows, int64_t tiles, const float* by) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < tiles * kTile; c += LANES) {
            float* const part = out + r * tiles * kTile + c;
            store(part, load<VF>(part) * by[r]);
        }
    }
}

NOINLINE void multiply(const Matrix& m, int64_t tile, int64_t tiles, const Activation& a, int64_t row, int64_t rows, const Ahead& ahead,
                       float* out) {
    const int64_t depth = padded_size(m.k), size = depth * kTile, first = row * a.stride;
    if (m.kind == kFloat32) {
        multiply(static_cast<const float*>(m.data) + tile * size, tiles, size, a.wide + first, a.stride, rows, depth, ahead, out);
    } else if (m.kind == kBfloat16) {
        const uint16_t* w = static_cast<const uint16_t*>(m.data) + tile * size;
#if BF16_DOT
        multiply(w, tiles, size, a.pairs + first, a.stride, rows, depth, ahead, out);
#else
        multiply(w, tiles, size, a.wide + first, a.stride, rows, depth, ahead, out);
#endif
#if PAIRS
    } else if (m.kind == kInt12 || m.kind == kInt8Pairs) {
        const Numbers numbers = numbers_of(m, tile, a.numbers() + first);
        for (int64_t i = 0; i < rows * tiles * kTile; i += LANES) store(out + i, VF{});
        if (m.kind == kInt12) {
            const Twelve* w = static_cast<const Twelve*>(m.data) + tile * depth / 4;
            multiply(w, tiles, depth / 4, &numbers, a.stride, rows, depth, ahead, out);
        } else {
            const Eight* w = static_cast<const Eight*>(m.data) + tile * depth / 4;
            multiply(w, tiles, depth / 4, &numbers, a.stride, rows, depth, ahead, out);
        }
        scale_rows(out, rows, tiles, a.steps + row);
#endif
    } else if (m.kind == kInt8) {
        const int8_t* w = static_cast<const int8_t*>(m.data) + tile * size;
#if VNNI
        const Bytes bytes{a.bytes + 2 * first, a.steps + row, m.offsets + tile * kTile, m.scales + tile * kTile};
        multiply(w, tiles, size, &bytes, a.stride, rows, depth, ahead, out);
#else
        multiply(w, tiles, size, a.wide + first, a.stride, rows, depth, ahead, out);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < tiles * kTile; c += LANES) {
                float* part = out + r * tiles * kTile + c;
                store(part, load<VF>(part) * load<VF>(m.scales + tile * kTile + c));
            }
        }
#endif
    } else {
        __builtin_trap();  // packed for another instruction set
    }
}

// Bytes of a tile.
INLINE int64_t tile_bytes(const Matrix& m) {
    const int64_t size = padded_size(m.k) * kTile;
    return m.kind == kFloat32 ? 4 * size : m.kind == kInt8 || m.kind == kInt8Pairs ? size : m.kind == kInt12 ? size / 2 * 3 : 2 * size;
}

#if PAIRS
// `product` of weights in whole numbers, packed as W, with more rows than a block has. Weights are unpacked once for several
// blocks, a span of a few tiles at a time, which stays in the nearest cache; meanwhile the next span is fetched.
template <typename W, typename Take>
INLINE void product_of_spans(const Matrix& m, const Activation& a, int64_t rows, Team& team, Take take) {
    constexpr int64_t kMostBlocks = 11;
    const Kind kind = static_cast<Kind>(m.kind);
    const int64_t num_tiles = (m.n + kTile - 1) / kTile, size = tile_bytes(m), depth = padded_size(m.k);
    const int64_t num_parts = (rows + kMostBlocks * most_rows(kind) - 1) / (kMostBlocks * most_rows(kind));
    const int64_t group = tiles_at_once((rows + 1) / 2, kind);
    const bool looks_ahead = num_tiles > 4 * group * team.num_threads;
    constexpr int64_t kGroup = 2;
    if (group > kGroup) __builtin_trap();
    alignas(64) int16_t unpacked[kGroup * kSpan * kTile];
    alignas(64) float out[kMostBlocks * kMostRows * kGroup * kTile];
    int64_t* counter = team.next_counter();
    const auto where = [&](int64_t tile) __attribute__((always_inline)) { return static_cast<const char*>(m.data) + tile * size; };
    int64_t start = team.take(counter, group);
    while (start < num_tiles) {
        const int64_t then = looks_ahead ? team.take(counter, group) : num_tiles;
        const int64_t width = start + group <= num_tiles ? group : num_tiles - start;
        for (int64_t part = 0, row = 0; part < num_parts; ++part) {
            const int64_t count = rows / num_parts + (part < rows % num_parts);
            const int64_t num_blocks = (count + most_rows(kind) - 1) / most_rows(kind);
            for (int64_t i = 0; i < count * width * kTile; i += LANES) store(out + i, VF{});
            for (int64_t k = 0; k < depth; k += kSpan) {
                const int64_t span = k + kSpan < depth ? kSpan : depth - k;
                for (int64_t t = 0; t < width; ++t) {
                    const W* const w = reinterpret_cast<const W*>(where(start + t)) + k / 4;
                    int16_t* const to = unpacked + t * kSpan * kTile;
                    for (int64_t i = 0; i < span / 4; ++i) {
#pragma GCC unroll 2
                        for (int c = 0; c < kVectorsPerTile; ++c) {
                            VI parts[2];
                            unpack(w + i, c, parts);
                            store(to + 4 * i * kTile + c * 2 * LANES, parts[0]);
                            store(to + (4 * i + 2) * kTile + c * 2 * LANES, parts[1]);
                        }
                    }
                }
                const bool is_last = k + kSpan >= depth;
                constexpr int64_t kDepthBytes = sizeof(W) / 4;
                const char* const next =
                    is_last ? where(part + 1 == num_parts && then < num_tiles ? then : start) : where(start) + (k + kSpan) * kDepthBytes;
                const int64_t share = kSpan * kDepthBytes / num_blocks;
                Numbers numbers = numbers_of(m, start, nullptr);
                numbers.scales += k / kSpan * numbers.scale_step;
                for (int64_t block = 0, r = 0; block < num_blocks; ++block) {
                    const int64_t height = count / num_blocks + (block < count % num_blocks);
                    numbers.numbers = a.numbers() + (row + r) * a.stride + k;
                    const Ahead ahead{next + block * share, share * 4 / kSpan, size};
                    const int16_t* const w = unpacked;
                    multiply(w, width, kSpan * kTile, &numbers, a.stride, height, span, ahead, out + r * width * kTile);
                    r += height;
                }
            }
            scale_rows(out, count, width, a.steps + row);
            for (int64_t r = 0; r < count; ++r) {
                for (int64_t c = 0; c < width * kTile; c += LANES) {
                    take(row + r, start * kTile + c, load<VF>(out + r * width * kTile + c));
                }
            }
            row += count;
        }
        start = looks_ahead ? then : team.take(counter, group);
    }
}
#endif

// a [rows, k] times all of `m`; every vector of the result goes to take(row, column, vector). Threads share the tiles. Where there
// are several blocks of rows and tiles enough, each knows its next ones while it is at some: all blocks but the first fetch a share
// of these, and the first one the last share of its own.
template <typename Take>
INLINE void product(const Matrix& m, const Activation& a, int64_t rows, Team& team, Take take) {
    const int64_t num_tiles = (m.n + kTile - 1) / kTile, size = tile_bytes(m);
    const Kind kind = static_cast<Kind>(m.kind);
    const int64_t num_blocks = (rows + most_rows(kind) - 1) / most_rows(kind);
#if PAIRS
    if (kind == kInt12 && num_blocks > 1) return product_of_spans<Twelve>(m, a, rows, team, take);
    if (kind == kInt8Pairs && num_blocks > 1) return product_of_spans<Eight>(m, a, rows, team, take);
#endif
    const int64_t group = tiles_at_once((rows + num_blocks - 1) / num_blocks, kind);
    const int64_t grab = num_blocks == 1 && group < 4 ? 4 : group;
    const bool looks_ahead = num_blocks > 1 && num_tiles > 4 * grab * team.num_threads;
    alignas(64) float out[kMostRows * kMostTiles * kTile];
    int64_t* counter = team.next_counter();
    const auto where = [&](int64_t tile) __attribute__((always_inline)) { return static_cast<const char*>(m.data) + tile * size; };
    int64_t start = team.take(counter, grab);
    while (start < num_tiles) {
        const int64_t end = start + grab < num_tiles ? start + grab : num_tiles;
        const int64_t then = looks_ahead ? team.take(counter, grab) : num_tiles;
        for (int64_t tile = start; tile < end;) {
            const int64_t tiles = tile + group <= end ? group : 1;
            const char* const next = where(tile + tiles < end ? tile + tiles : then < num_tiles ? then : tile);
            const int64_t share = tiles * size / num_blocks;
            for (int64_t block = 0, row = 0; block < num_blocks; ++block) {
                const int64_t count = rows / num_blocks + (block < rows % num_blocks);
                const char* const at = block == 0 ? where(tile) + (num_blocks - 1) * share : next + (block - 1) * share;
                multiply(m, tile, tiles, a, row, count, Ahead{at, num_blocks == 1 ? 0 : 128 * tiles / num_blocks, 64}, out);
                for (int64_t r = 0; r < count; ++r) {
                    for (int64_t c = 0; c < tiles * kTile; c += LANES) {
                        take(row + r, tile * kTile + c, load<VF>(out + r * tiles * kTile + c));
                    }
                }
                row += count;
            }
            tile += tiles;
        }
        start = looks_ahead ? then : team.take(counter, grab);
    }
}
