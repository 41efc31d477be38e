// Vectors of `LANES` numbers by the compiler's own extension, so that one source serves every instruction set. Included once
// per set by `step.cpp`, inside the set's namespace and target region; nothing of the standard library may be instantiated
// here, or the linker could keep one set's copy for all.

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

typedef float VF __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));


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
