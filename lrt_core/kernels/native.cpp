// Native kernels for CPUs, one C function each; `__init__.py` beside this file loads them and holds their torch twins.
//
// Plain C++17 without any header of torch or Python, so that any compiler builds it. The vector code is the compiler's own, made
// for several instruction sets, of which the best is chosen at run time. Threads come from OpenMP: no library
// is linked for it, the loader brings the one that torch already uses, so that one pool of threads serves both.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_VARIANTS 1
#define AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

namespace {

inline float widen(float x) { return x; }

inline float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

inline void narrow(float x, float* out) { *out = x; }

// To bfloat16, nearest even; the values here are finite.
inline void narrow(float x, uint16_t* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *out = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) for x <= 0 within 2 units of the last place: 2^n by the exponent, the rest by a polynomial (Cephes' coefficients).
inline float exp_negative(float x) {
    x = std::max(x, -87.0f);
    const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f - 0.5f));
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// One sequence, one key/value head: `group` query heads [group, head_dim] over the keys at slots[first..end).
template <typename T>
inline __attribute__((always_inline)) void attend(
    const T* query, const T* keys, const T* values, T* out, const int64_t* slots, int64_t first, int64_t end, int64_t group,
    int64_t head_dim, int64_t slot_stride, float scale, float* scratch) {
    const int64_t length = end - first;
    float* wide_query = scratch;                  // [group, head_dim]
    float* accumulated = scratch + group * head_dim;  // [group, head_dim]
    float* scores = accumulated + group * head_dim;   // [group, length]
    for (int64_t i = 0; i < group * head_dim; ++i) {
        wide_query[i] = widen(query[i]) * scale;
        accumulated[i] = 0.0f;
    }
    for (int64_t j = 0; j < length; ++j) {
        const T* key = keys + slots[first + j] * slot_stride;
        for (int64_t r = 0; r < group; ++r) {
            const float* row = wide_query + r * head_dim;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t h = 0; h < head_dim; ++h) sum += row[h] * widen(key[h]);
            scores[r * length + j] = sum;
        }
    }
    for (int64_t r = 0; r < group; ++r) {
        float* row = scores + r * length;
        float largest = row[0];
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < length; ++j) largest = std::max(largest, row[j]);
        float total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < length; ++j) {
            row[j] = exp_negative(row[j] - largest);
            total += row[j];
        }
        const float inverse = 1.0f / total;
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) row[j] *= inverse;
    }
    for (int64_t j = 0; j < length; ++j) {
        const T* value = values + slots[first + j] * slot_stride;
        for (int64_t r = 0; r < group; ++r) {
            const float weight = scores[r * length + j];
            float* row = accumulated + r * head_dim;
#pragma omp simd
            for (int64_t h = 0; h < head_dim; ++h) row[h] += weight * widen(value[h]);
        }
    }
    for (int64_t i = 0; i < group * head_dim; ++i) narrow(accumulated[i], out + i);
}

template <typename T>
using Attend = void (*)(const T*, const T*, const T*, T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float*);

// The same function for an instruction set; templates are inlined into it and so compiled for that set.
#define DEFINE_ATTEND(name, attributes)                                                                                    \
    template <typename T>                                                                                                  \
    attributes void name(const T* query, const T* keys, const T* values, T* out, const int64_t* slots, int64_t first,      \
                         int64_t end, int64_t group, int64_t head_dim, int64_t slot_stride, float scale, float* scratch) { \
        attend<T>(query, keys, values, out, slots, first, end, group, head_dim, slot_stride, scale, scratch);              \
    }

DEFINE_ATTEND(attend_plain, )
#ifdef HAS_VARIANTS
DEFINE_ATTEND(attend_avx2, AVX2)
DEFINE_ATTEND(attend_avx512, AVX512)
#endif

// The best variant for this processor.
template <typename T>
Attend<T> choose_attend() {
#ifdef HAS_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return attend_avx512<T>;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return attend_avx2<T>;
#endif
    return attend_plain<T>;
}

template <typename T>
void decode_attention(
    const T* query, const T* keys, const T* values, T* out, const int64_t* slots, int64_t max_context,
    const int64_t* context_lens, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
    int64_t window, float scale, int num_threads) {
    static const Attend<T> attend_one = choose_attend<T>();
    const int64_t group = num_heads / num_kv_heads;
    const int64_t slot_stride = num_kv_heads * head_dim;
#pragma omp parallel num_threads(num_threads)
    {
        std::vector<float> scratch(group * (2 * head_dim + max_context));
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t s = 0; s < num_sequences; ++s) {
            for (int64_t g = 0; g < num_kv_heads; ++g) {
                const int64_t head = (s * num_heads + g * group) * head_dim;
                const int64_t end = context_lens[s];
                const int64_t first = std::max<int64_t>(0, end - 1 - window);
                attend_one(query + head, keys + g * head_dim, values + g * head_dim, out + head, slots + s * max_context,
                           first, end, group, head_dim, slot_stride, scale, scratch.data());
            }
        }
    }
}

}  // namespace

extern "C" {

// Attention of one query row per sequence over its slots of a paged cache. query and out [S, N, H]; keys and values
// [num_slots, G, H]; slots [S, C]; context_lens [S], each in 1..C; a query sees its last `window` + 1 tokens.
void lrt_decode_attention(
    int is_bfloat16, const void* query, const void* keys, const void* values, void* out, const int64_t* slots,
    int64_t max_context, const int64_t* context_lens, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads,
    int64_t head_dim, int64_t window, float scale, int num_threads) {
    if (is_bfloat16) {
        decode_attention(static_cast<const uint16_t*>(query), static_cast<const uint16_t*>(keys),
                         static_cast<const uint16_t*>(values), static_cast<uint16_t*>(out), slots, max_context, context_lens,
                         num_sequences, num_heads, num_kv_heads, head_dim, window, scale, num_threads);
    } else {
        decode_attention(static_cast<const float*>(query), static_cast<const float*>(keys),
                         static_cast<const float*>(values), static_cast<float*>(out), slots, max_context, context_lens,
                         num_sequences, num_heads, num_kv_heads, head_dim, window, scale, num_threads);
    }
}
}
