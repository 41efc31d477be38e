// Vectors of `LANES` numbers by the compiler's own extension, so that one source serves every instruction set. Included once
// per set by `step.cpp`, inside the set's namespace and target region; nothing of the standard library may be instantiated
// here, or the linker could keep one set's copy for all.

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

typedef float VF __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));
typedef uint8_t VB __attribute__((vector_size(LANES)));


template <typename V, typename T>
INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <typename V, typename T>
INLINE void store(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

INLINE int64_t padded_size(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

INLINE VF splat(float x) { return x - VF{}; }

INLINE VF vmax(VF a, VF b) { return a > b ? a : b; }
INLINE VF vmin(VF a, VF b) { return a < b ? a : b; }

INLINE float reduce_sum(VF v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    }
    return part[0];
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VI){__VA_ARGS__})
#endif

// Two vectors as one row of numbers: its even ones and its odd ones; and the way back.
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ZIP_FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_SECOND 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define ZIP_FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_SECOND 4, 12, 5, 13, 6, 14, 7, 15
#endif

INLINE VF even(VF a, VF b) { return SHUFFLE(a, b, EVEN); }
INLINE VF odd(VF a, VF b) { return SHUFFLE(a, b, ODD); }

// reduce_sum of every vector, in the same order of additions: lane i is that of v[i].
INLINE VF reduce_each(const VF* v) {
#if LANES == 16
    VF eighths[8], quarters[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const VF a = v[2 * i], b = v[2 * i + 1];
        eighths[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                     SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const VF a = eighths[2 * i], b = eighths[2 * i + 1];
        quarters[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                      SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const VF a = quarters[2 * i], b = quarters[2 * i + 1];
        halves[i] = SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                    SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
#else
    VF quarters[4], halves[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const VF a = v[2 * i], b = v[2 * i + 1];
        quarters[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const VF a = quarters[2 * i], b = quarters[2 * i + 1];
        halves[i] = SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
    }
#endif
    return even(halves[0], halves[1]) + odd(halves[0], halves[1]);
}

INLINE float reduce_max(VF v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    }
    return part[0];
}

INLINE float widen(float x) { return x; }

INLINE float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, sizeof x);
    return x;
}

INLINE void narrow(float x, float* out) { *out = x; }

// To bfloat16, nearest even; the values here are finite.
INLINE void narrow(float x, uint16_t* out) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    *out = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE VH narrow(VF x) {
    const VU bits = (VU)x;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, VH);
}

// exp within 2 units of the last place: 2^n by the exponent, the rest by a polynomial (Cephes' coefficients). exp(0) is 1.
INLINE VF exp(VF x) {
    x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
    const VF shifted = x * 1.44269504f;
    const VI n = __builtin_convertvector(shifted + (shifted < 0 ? splat(-0.5f) : splat(0.5f)), VI);
    const VF whole = __builtin_convertvector(n, VF);
    const VF r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    VF p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (VF)((n + 127) << 23);
}

INLINE float exp(float x) { return exp(splat(x))[0]; }

// Two vectors of consecutive numbers, in an order of the type's own: as they lie for float32; the even ones, then the odd
// ones for bfloat16, because that takes two instructions. `paired_index` says which number stands where.
INLINE void load_pair(const float* p, VF& first, VF& second) {
    first = load<VF>(p);
    second = load<VF>(p + LANES);
}

INLINE void load_pair(const uint16_t* p, VF& first, VF& second) {
    const VU raw = load<VU>(p);
    first = (VF)(raw << 16);
    second = (VF)(raw & 0xffff0000u);
}

INLINE int64_t paired_index(const float*, int64_t i) { return i; }

INLINE int64_t paired_index(const uint16_t*, int64_t i) {
    const int64_t within = i % (2 * LANES);
    return i - within + (within < LANES ? 2 * within : 2 * (within - LANES) + 1);
}

// Two vectors of consecutive numbers into that order, and back.
INLINE void to_pair(const float*, VF&, VF&) {}
INLINE void to_natural(const float*, VF&, VF&) {}

INLINE void to_pair(const uint16_t*, VF& first, VF& second) {
    const VF a = first, b = second;
    first = even(a, b);
    second = odd(a, b);
}

INLINE void to_natural(const uint16_t*, VF& first, VF& second) {
    const VF a = first, b = second;
    first = SHUFFLE(a, b, ZIP_FIRST);
    second = SHUFFLE(a, b, ZIP_SECOND);
}

#undef EVEN
#undef ODD
#undef ZIP_FIRST
#undef ZIP_SECOND
#undef SHUFFLE
