// What Python hands to the native step: plain structs, mirrored field by field in `plan.py`.
//
// Shapes: T rows of a step (the tokens of all sequences, flat), S sequences, D hidden size, N query heads, G key/value heads,
// H head size, L layers, V vocabulary.

#pragma once

#include <cstdint>

namespace lrt {

enum Kind : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt12 = 3, kInt8Pairs = 4 };

// Outputs of one packed tile; `packing.py` lays weights out in tiles of this width.
constexpr int64_t kTile = 16;

// Weights of 12 bits have a scale for every kSpan of them, and products of so many are summed exactly in 32 bits: a row's
// activations are scaled so that with weights of at most this size no sum can come to more. `packing.py` has the same numbers.
constexpr int64_t kMostWeight = 2047, kSpan = 128;

// A weight [n, k] in tiles of 16 outputs, zero-padded to multiples of 16 both ways: float32 [n/16][k][16], bfloat16
// [n/16][k/2][16][2], int8 [n/16][k/4][16][4], whole numbers of 12 bits [n/16][k/4][96 bytes]: the upper 8 bits of [2][16][2] of
// them, then the lower 4 of [16][2], those of the second half in the upper half of a byte. Int8 has one scale per output, and
// -128 times the sum of an output's weights; 12 bits have scales [n/16][k/kSpan][16], those of the last k for fewer of them.
// Int8 in pairs lies as the upper 8 bits do, [n/16][k/4][2][16][2], and has one scale per output alone.
struct Matrix {
    const void* data;
    const float* scales;
    const int32_t* offsets;
    int64_t n, k;
    int32_t kind;
};

struct Layer {
    Matrix input;   // query, key, value and gates: D -> N*H + 2*G*H + num_gates*G
    Matrix memory;  // projected key and value of this layer's own pair: D -> 2*G*H; no data where there is none of its own
    Matrix output;  // N*H -> D
    Matrix up;      // D -> I
    Matrix down;    // I -> D
    const void* value_embedding;  // [V, G*H] in the embedding's type, or null
    float residual_scale, embedding_scale, memory_scale;
    int32_t num_gates;
    int64_t window;  // largest distance at which a query sees a key
};

struct Model {
    int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size;
    const void* embedding;  // [V, D]
    int32_t embedding_kind;
    int32_t shares_memory;  // one memory projection for all layers, `memory`
    Matrix memory;
    Matrix head;
    const Layer* layers;
    const float* cos;  // [positions, H/2]
    const float* sin;
    float softcap, eps;
};

struct Pool {
    void* keys;  // [L, slots, G, H]; may be read (not written) up to 64 numbers past the end
    void* values;
    int32_t kind;  // kFloat32 or kBfloat16
    int32_t block_size;
    int64_t layer_stride;  // in numbers
    float* latents;        // [slots + 1, D]
};

// Rows of sequences: sequence s owns rows row_starts[s]..row_starts[s+1], at positions that follow each other, and its blocks
// are tables[table_starts[s]...].
struct Rows {
    int64_t num_rows, num_sequences;
    int64_t capacity;          // rows that the workspace is cut for
    const int64_t* tokens;     // [T]
    const int64_t* positions;  // [T]
    const int64_t* slots;      // [T] where keys, values and latents go
    const int32_t* row_starts;
    const int32_t* table_starts;
    const int32_t* tables;
    float* partial;  // where pieces of attention wait for each other, `partial_size` numbers
    int64_t partial_size;
};

// One sequence's part of a step. Its rows follow the previous sequence's, and so do its blocks.
struct Sequence {
    int64_t start;  // position of its first row
    int64_t num_rows;
    int64_t num_touched;  // leading positions whose latents the pool holds
    int64_t num_blocks;
    int64_t num_wanted;  // settled rows with which its next token is due; 0 where none will be
    int64_t num_drawn;   // tokens drawn before
};

// How a sequence's tokens are drawn; `sampling.cpp` says what the parameters mean.
struct Draw {
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t seed;
};

struct Step {
    int64_t num_rows, num_sequences;
    int64_t capacity;           // rows that the workspace is cut for
    const int64_t* tokens;      // [T]
    const Sequence* sequences;  // [S]
    const int32_t* tables;
    const Draw* draws;  // [S], or null where no tokens are to be drawn
    int64_t zero_row;   // of the pool's latents: what has no memory yet; negative for a plain model
    float* partial;     // as in `Rows`
    int64_t partial_size;
    float tolerance;  // relative change up to which a memory has settled
};

// What comes of a step, sequence by sequence.
struct Outcome {
    int32_t* num_settled;  // [S] leading rows that are final
    float* residuals;      // [S] largest relative change of a memory; negative for a single row and for a plain model
    int32_t* is_finite;    // [S] whether the states of its settled rows are numbers
    float* hidden;         // [T, D] the settled rows' hidden states, one sequence's behind another's
    int64_t* ids;          // [S] the token drawn, negative where none was due
    float* logits;         // [S, V] room for those it was drawn from
};

}  // namespace lrt

extern "C" void lrt_sample(const float* logits, int64_t row_stride, int64_t rows, int64_t size, const double* temperature,
                           const int64_t* top_k, const double* top_p, const double* min_p, const double* uniform, int64_t* ids,
                           int num_threads);
