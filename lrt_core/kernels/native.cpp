// Native kernels for CPUs, one C function each; `__init__.py` beside this file loads them and holds their torch twins.
//
// Plain C++17 without any header of torch or Python, so that any compiler builds it. The vector code is the compiler's own,
// made for several instruction sets, of which the best is chosen at run time. Threads come from OpenMP: no library
// is linked for it, the loader brings the one that torch already uses, so that one pool of threads serves both.

#include <algorithm>
#include <cmath>
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

// RMS norm of one row, in float32 whatever the types.
template <typename In, typename Out>
inline __attribute__((always_inline)) void norm(const In* x, Out* out, int64_t size, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += widen(x[i]) * widen(x[i]);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) narrow(widen(x[i]) * scale, out + i);
}

// Rotation of one head (first half against second half), then its RMS norm; `rotated` is scratch of the head's size.
template <typename T>
inline __attribute__((always_inline)) void rope_norm(
    const T* x, const float* cos, const float* sin, T* out, int64_t half, float eps, float* rotated) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float first = widen(x[i]), second = widen(x[i + half]);
        rotated[i] = first * cos[i] + second * sin[i];
        rotated[i + half] = second * cos[i] - first * sin[i];
    }
    norm<float, T>(rotated, out, 2 * half, eps);
}

// Every kernel's inner function once per instruction set; templates are inlined into it and so compiled for that set.
#define INNER_FUNCTIONS(set, attributes)                                                                                   \
    template <typename In, typename Out>                                                                                   \
    attributes void norm_##set(const In* x, Out* out, int64_t size, float eps) {                                           \
        norm<In, Out>(x, out, size, eps);                                                                                  \
    }                                                                                                                      \
    template <typename T>                                                                                                  \
    attributes void rope_norm_##set(const T* x, const float* cos, const float* sin, T* out, int64_t half, float eps,       \
                                    float* rotated) {                                                                      \
        rope_norm<T>(x, cos, sin, out, half, eps, rotated);                                                                \
    }

INNER_FUNCTIONS(plain, )
#ifdef HAS_VARIANTS
INNER_FUNCTIONS(avx2, AVX2)
INNER_FUNCTIONS(avx512, AVX512)
#endif

enum class Set { plain, avx2, avx512 };

// The best instruction set that this processor has.
Set detect() {
#ifdef HAS_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return Set::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Set::avx2;
#endif
    return Set::plain;
}

const Set set = detect();

#ifdef HAS_VARIANTS
#define CHOOSE(name, ...) \
    (set == Set::avx512 ? name##_avx512<__VA_ARGS__> : set == Set::avx2 ? name##_avx2<__VA_ARGS__> : name##_plain<__VA_ARGS__>)
#else
#define CHOOSE(name, ...) (name##_plain<__VA_ARGS__>)
#endif

// Below this many numbers a second thread costs more than it saves.
constexpr int64_t kParallel = 1 << 15;

template <typename In, typename Out>
void norm_rows(const void* x, void* out, int64_t rows, int64_t size, float eps, int num_threads) {
    const auto one = CHOOSE(norm, In, Out);
#pragma omp parallel for num_threads(num_threads) if (rows * size >= kParallel)
    for (int64_t row = 0; row < rows; ++row) {
        one(static_cast<const In*>(x) + row * size, static_cast<Out*>(out) + row * size, size, eps);
    }
}

template <typename T>
void rope_norm_rows(const void* x, int64_t token_stride, const float* cos, const float* sin, void* out, int64_t num_tokens,
                    int64_t num_heads, int64_t head_dim, float eps, int num_threads) {
    const auto one = CHOOSE(rope_norm, T);
    const int64_t half = head_dim / 2;
#pragma omp parallel num_threads(num_threads) if (num_tokens * num_heads * head_dim >= kParallel)
    {
        std::vector<float> rotated(head_dim);
#pragma omp for
        for (int64_t token = 0; token < num_tokens; ++token) {
            for (int64_t head = 0; head < num_heads; ++head) {
                one(static_cast<const T*>(x) + token * token_stride + head * head_dim, cos + token * half, sin + token * half,
                    static_cast<T*>(out) + (token * num_heads + head) * head_dim, half, eps, rotated.data());
            }
        }
    }
}

}  // namespace

extern "C" {

// Changes with every change of a function below; `__init__.py` refuses a library of another version.
int lrt_version() { return 10; }

// RMS norm of the rows of x [rows, size]; bfloat16 in means bfloat16 out.
void lrt_norm(
    int in_is_bfloat16, int out_is_bfloat16, const void* x, void* out, int64_t rows, int64_t size, float eps, int num_threads) {
    if (in_is_bfloat16) {
        norm_rows<uint16_t, uint16_t>(x, out, rows, size, eps, num_threads);
    } else if (out_is_bfloat16) {
        norm_rows<float, uint16_t>(x, out, rows, size, eps, num_threads);
    } else {
        norm_rows<float, float>(x, out, rows, size, eps, num_threads);
    }
}

// Rope, then norm per head. x: heads [T, N, H] with tokens token_stride numbers apart; cos and sin [T, H/2]; out [T, N, H].
void lrt_rope_norm(
    int is_bfloat16, const void* x, int64_t token_stride, const float* cos, const float* sin, void* out, int64_t num_tokens,
    int64_t num_heads, int64_t head_dim, float eps, int num_threads) {
    const auto run = is_bfloat16 ? rope_norm_rows<uint16_t> : rope_norm_rows<float>;
    run(x, token_stride, cos, sin, out, num_tokens, num_heads, head_dim, eps, num_threads);
}
}
