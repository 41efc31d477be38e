// Native sampling for CPUs: from rows of logits to drawn tokens and log-probabilities; `sampling.py` beside this file loads
// it and holds the torch twins, which define what is computed here.
//
// A draw inverts the cumulative distribution at a given uniform number, in float64. Every filter (top_k, top_p, min_p) keeps
// a prefix of the tokens in falling order, so no whole vocabulary is sorted: buckets by weight, or for a small top_k the
// largest of each block, say which few tokens lie at the borders, and only those are. A row is computed by one thread, in an
// order that depends on nothing but the row: alone, in any batch and with any number of threads it gives the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
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

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Tokens whose largest is kept, to pass over most of a row when its few largest are sought.
constexpr int64_t kBlock = 64;
// Weights that exist at once.
constexpr int64_t kChunk = 512;
constexpr int kBuckets = 2048;
// Filters ignore tokens of less than e^-60 of the likeliest's weight: a whole vocabulary of them is 1e-21, far below float64.
constexpr double kWeightless = -60.0;

struct Peak {
    float largest;
    bool has_nan;
};

// A row as its weights see it: weight = exp((logit - largest) / temperature), so the likeliest weighs 1.
struct Scale {
    double largest;
    double temperature;
    // Buckets per unit of scaled logit.
    double density;
};

// As the twin computes it, operation by operation: equal and unequal logits must be so here and there.
inline double scaled_logit(float x, const Scale& scale) { return (static_cast<double>(x) - scale.largest) / scale.temperature; }

// --- Passes over a row, made for several instruction sets: by the compiler's own vectors, of N float64 or the same number of
// bytes of another type. No function of the standard library may be instantiated in them, or the linker could keep one set's
// copy for all.

template <int N>
struct Vectors {
    typedef double Doubles __attribute__((vector_size(8 * N)));
    typedef int64_t Longs __attribute__((vector_size(8 * N)));
    typedef uint64_t Bits __attribute__((vector_size(8 * N)));
    typedef float Floats __attribute__((vector_size(8 * N)));
    typedef int32_t Ints __attribute__((vector_size(8 * N)));
    typedef uint16_t Shorts __attribute__((vector_size(8 * N)));
    typedef float HalfFloats __attribute__((vector_size(4 * N)));
    typedef int32_t HalfInts __attribute__((vector_size(4 * N)));
};

template <int N>
using Doubles = typename Vectors<N>::Doubles;
template <int N>
using Floats = typename Vectors<N>::Floats;

INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// The vector at p, of which the first `length` numbers are there; the others become -inf, which weighs nothing.
template <typename V>
INLINE void load(V& v, const float* p, int64_t length) {
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    if (length >= lanes) {
        __builtin_memcpy(&v, p, sizeof v);
        return;
    }
    for (int64_t i = 0; i < lanes; ++i) v[i] = i < length ? p[i] : -__builtin_inff();
}

// x to exp(x) for x <= 0 within 1 unit of the last place, 0 below -708: 2^n by the exponent, the rest by its series.
template <int N>
INLINE void exp_negative(Doubles<N>& x) {
    typedef Doubles<N> D;
    typedef typename Vectors<N>::Bits Bits;
    const D zero = {};
    const auto tiny = x < -708.0;
    const D bounded = tiny ? zero - 708.0 : x;
    // Adding 1.5 * 2^52 rounds to a whole number, which then stands in the low bits.
    const D shifted = bounded * 1.4426950408889634 + 0x1.8p52;
    const D n = shifted - 0x1.8p52;
    const D r = (bounded - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    D p = zero + 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const D result = (D)((Bits)p + ((Bits)shifted << 52));
    x = tiny ? zero : result;
}

// The same in float32 for log-probabilities, within 2 units of the last place, not below exp(-87) (Cephes' coefficients).
template <int N>
INLINE void exp_negative(Floats<N>& x) {
    typedef Floats<N> F;
    typedef typename Vectors<N>::Ints Ints;
    const F bounded = x > -87.0f ? x : F{} - 87.0f;
    const Ints n = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints);
    const F whole = __builtin_convertvector(n, F);
    const F r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    F p = F{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    x = p * (F)((n + 127) << 23);
}

// scaled_logit of the N numbers at x, of which `length` are there.
template <int N>
INLINE void load_scaled(Doubles<N>& scaled, const float* x, int64_t length, const Scale& scale) {
    typename Vectors<N>::HalfFloats narrow;
    load(narrow, x, length);
    scaled = (__builtin_convertvector(narrow, Doubles<N>) - scale.largest) / scale.temperature;
}

template <int N>
INLINE Peak scan(const float* x, int64_t size, float* block_max) {
    typedef Floats<N> F;
    constexpr int kLanes = 2 * N;
    const float lowest = -__builtin_inff();
    Peak peak = {lowest, false};
    typename Vectors<N>::Ints unordered = {};
    for (int64_t start = 0; start < size; start += kBlock) {
        F largest = F{} + lowest;
        for (int64_t i = start; i < lesser(start + kBlock, size); i += kLanes) {
            F value;
            load(value, x + i, size - i);
            largest = value > largest ? value : largest;
            unordered |= value != value;
        }
        float of_block = lowest;
        for (int i = 0; i < kLanes; ++i) of_block = largest[i] > of_block ? largest[i] : of_block;
        *block_max++ = of_block;
        peak.largest = of_block > peak.largest ? of_block : peak.largest;
    }
    for (int i = 0; i < kLanes; ++i) peak.has_nan |= unordered[i] != 0;
    return peak;
}

// The smallest logit that is at least `floor`.
template <int N>
INLINE float smallest_above(const float* x, int64_t size, float floor) {
    typedef Floats<N> F;
    constexpr int kLanes = 2 * N;
    const F highest = F{} + __builtin_inff();
    F smallest = highest;
    for (int64_t i = 0; i < size; i += kLanes) {
        F value;
        load(value, x + i, size - i);
        value = value >= floor ? value : highest;
        smallest = value < smallest ? value : smallest;
    }
    float result = smallest[0];
    for (int i = 1; i < kLanes; ++i) result = smallest[i] < result ? smallest[i] : result;
    return result;
}

// The weights of at most kChunk tokens; returns their sum. `weights` has room for whole vectors.
template <int N>
INLINE double weigh(const float* x, int64_t size, const Scale& scale, double* weights) {
    typedef Doubles<N> D;
    D total = {};
    for (int64_t i = 0; i < size; i += N) {
        D weight;
        load_scaled<N>(weight, x + i, size - i, scale);
        exp_negative<N>(weight);
        __builtin_memcpy(weights + i, &weight, sizeof weight);
        total += weight;
    }
    double sum = 0.0;
    for (int i = 0; i < N; ++i) sum += total[i];
    return sum;
}

// The weights and buckets of at most kChunk tokens; what is weightless goes to the bucket behind the last.
template <int N>
INLINE void spread(const float* x, int64_t size, const Scale& scale, double* weights, int32_t* buckets) {
    typedef Doubles<N> D;
    const D last = D{} + (kBuckets - 1), behind = D{} + kBuckets;
    for (int64_t i = 0; i < size; i += N) {
        D scaled;
        load_scaled<N>(scaled, x + i, size - i, scale);
        D place = -scaled * scale.density;
        place = place < last ? place : last;
        place = scaled < kWeightless ? behind : place;
        const auto bucket = __builtin_convertvector(place, typename Vectors<N>::HalfInts);
        __builtin_memcpy(buckets + i, &bucket, sizeof bucket);
        exp_negative<N>(scaled);
        __builtin_memcpy(weights + i, &scaled, sizeof scaled);
    }
}

// Writes where `wanted` stands in the row, in order; returns how often. `found` has room for `size` numbers.
template <int N>
INLINE int64_t find(const uint16_t* buckets, int64_t size, uint16_t wanted, int32_t* found) {
    typedef typename Vectors<N>::Shorts Shorts;
    typedef typename Vectors<N>::Longs Longs;
    int64_t count = 0;
    for (int64_t start = 0; start < size; start += kBlock) {
        const int64_t end = lesser(start + kBlock, size);
        int64_t any = end - start < kBlock;
        if (!any) {
            Longs equal = {};
            for (int64_t i = start; i < end; i += 4 * N) {
                Shorts bucket;
                __builtin_memcpy(&bucket, buckets + i, sizeof bucket);
                equal |= (Longs)(bucket == wanted);
            }
            for (int i = 0; i < N; ++i) any |= equal[i];
        }
        if (!any) continue;
        for (int64_t i = start; i < end; ++i) {
            found[count] = static_cast<int32_t>(i);
            count += buckets[i] == wanted;
        }
    }
    return count;
}

// Sum of exp(x - largest): float32 within a chunk's lanes, float64 beyond. What is -inf adds exp(-87), which the largest's 1
// swallows.
template <int N>
INLINE double sum_exp(const float* x, int64_t size, float largest) {
    typedef Floats<N> F;
    constexpr int kLanes = 2 * N;
    double total = 0.0;
    for (int64_t start = 0; start < size; start += kChunk) {
        F sum = {};
        for (int64_t i = start; i < lesser(start + kChunk, size); i += kLanes) {
            F value;
            load(value, x + i, size - i);
            value -= largest;
            exp_negative<N>(value);
            sum += value;
        }
        for (int i = 0; i < kLanes; ++i) total += static_cast<double>(sum[i]);
    }
    return total;
}

struct Passes {
    Peak (*scan)(const float*, int64_t, float*);
    float (*smallest_above)(const float*, int64_t, float);
    double (*weigh)(const float*, int64_t, const Scale&, double*);
    void (*spread)(const float*, int64_t, const Scale&, double*, int32_t*);
    int64_t (*find)(const uint16_t*, int64_t, uint16_t, int32_t*);
    double (*sum_exp)(const float*, int64_t, float);
};

#define PASSES(set, N, attributes)                                                                                         \
    attributes Peak scan_##set(const float* x, int64_t size, float* block_max) { return scan<N>(x, size, block_max); }     \
    attributes float smallest_above_##set(const float* x, int64_t size, float floor) {                                     \
        return smallest_above<N>(x, size, floor);                                                                          \
    }                                                                                                                      \
    attributes double weigh_##set(const float* x, int64_t size, const Scale& scale, double* weights) {                     \
        return weigh<N>(x, size, scale, weights);                                                                          \
    }                                                                                                                      \
    attributes void spread_##set(const float* x, int64_t size, const Scale& scale, double* weights, int32_t* buckets) {    \
        spread<N>(x, size, scale, weights, buckets);                                                                       \
    }                                                                                                                      \
    attributes int64_t find_##set(const uint16_t* buckets, int64_t size, uint16_t wanted, int32_t* found) {                \
        return find<N>(buckets, size, wanted, found);                                                                      \
    }                                                                                                                      \
    attributes double sum_exp_##set(const float* x, int64_t size, float largest) { return sum_exp<N>(x, size, largest); }  \
    const Passes passes_##set = {scan_##set, smallest_above_##set, weigh_##set, spread_##set, find_##set, sum_exp_##set};

PASSES(plain, 2, )
#ifdef HAS_VARIANTS
PASSES(avx2, 4, AVX2)
PASSES(avx512, 8, AVX512)
#endif

// Those of the best instruction set that this processor has.
const Passes& choose() {
#ifdef HAS_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return passes_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return passes_avx2;
#endif
    return passes_plain;
}

const Passes& passes = choose();

// --- One row.

struct Token {
    double key;
    int32_t id;
};

// Falling, equals by their ids: the order of a stable sort.
inline bool comes_before(const Token& a, const Token& b) { return a.key != b.key ? a.key > b.key : a.id < b.id; }

// Sorts the first `count` tokens and drops the others.
void keep_largest(std::vector<Token>& tokens, size_t count) {
    if (tokens.size() > count) {
        std::nth_element(tokens.begin(), tokens.begin() + count, tokens.end(), comes_before);
        tokens.resize(count);
    }
    if (!std::is_sorted(tokens.begin(), tokens.end(), comes_before)) std::sort(tokens.begin(), tokens.end(), comes_before);
}

struct Filter {
    double temperature, top_p, min_p, uniform;
    int64_t top_k;
};

// A thread's work on one row after the other; buffers stay from row to row.
class Sampler {
public:
    explicit Sampler(int64_t size) : size_(size), block_max_((size + kBlock - 1) / kBlock) {}

    int64_t draw(const float* x, const Filter& filter);
    void top_logprobs(const float* x, int64_t id, int64_t count, float* own, float* values, int64_t* ids);

private:
    int64_t first_largest() const;
    int64_t draw_any(double uniform);
    int64_t draw_of_few(const Filter& filter);
    int64_t draw_of_ranked(const Filter& filter);
    float block_threshold(int64_t count);
    template <typename Key>
    void gather(double threshold, Key key);

    // A place in the falling order: before token `offset` of a bucket's, with the weight of all tokens before it.
    struct Place {
        int bucket;
        size_t offset;
        double mass;
    };
    void fill_buckets();
    void sort_bucket(int bucket);
    Place cut_by_count(int64_t count);
    Place cut_by_mass(double share, double total);
    Place cut_by_weight(double weight, const Place& all);
    int64_t pick(double target, const Place& end);

    const int64_t size_;
    const float* x_ = nullptr;
    Peak peak_ = {};
    Scale scale_ = {};
    std::vector<float> block_max_, order_;
    std::vector<double> weights_, masses_;
    std::vector<int64_t> counts_;
    std::vector<uint16_t> buckets_;
    std::vector<int32_t> found_;
    std::vector<Token> tokens_;
    int sorted_ = -1;
};

int64_t Sampler::first_largest() const {
    if (peak_.has_nan) {
        int64_t i = 0;
        while (x_[i] == x_[i]) ++i;
        return i;
    }
    size_t block = 0;
    while (block_max_[block] != peak_.largest) ++block;
    int64_t i = static_cast<int64_t>(block) * kBlock;
    while (x_[i] != peak_.largest) ++i;
    return i;
}

int64_t Sampler::draw(const float* x, const Filter& filter) {
    x_ = x;
    peak_ = passes.scan(x, size_, block_max_.data());
    // Without a distribution (a NaN, or an infinite largest) there is nothing to draw from.
    if (filter.temperature == 0.0 || peak_.has_nan || std::isinf(peak_.largest)) return first_largest();
    scale_ = {static_cast<double>(peak_.largest), filter.temperature, 0.0};
    weights_.resize(kChunk);
    if (filter.top_k > 0 && filter.top_k <= static_cast<int64_t>(block_max_.size())) return draw_of_few(filter);
    if (filter.top_k > 0 || filter.top_p < 1.0 || filter.min_p > 0.0) return draw_of_ranked(filter);
    return draw_any(filter.uniform);
}

// Without a filter, in the vocabulary's order: the weight of every chunk, then the one chunk that holds the target.
int64_t Sampler::draw_any(double uniform) {
    masses_.clear();
    double total = 0.0;
    for (int64_t start = 0; start < size_; start += kChunk) {
        masses_.push_back(passes.weigh(x_ + start, std::min(kChunk, size_ - start), scale_, weights_.data()));
        total += masses_.back();
    }
    const double target = uniform * total;
    double before = 0.0;
    for (size_t chunk = 0; chunk < masses_.size(); before += masses_[chunk++]) {
        if (before + masses_[chunk] <= target) continue;
        const int64_t start = static_cast<int64_t>(chunk) * kChunk, length = std::min(kChunk, size_ - start);
        passes.weigh(x_ + start, length, scale_, weights_.data());
        double reached = before;
        for (int64_t i = 0; i < length; ++i) {
            reached += weights_[i];
            if (reached > target) return start + i;
        }
        // Summed one by one the chunk may fall short by rounding: then the next token with a weight has it.
    }
    return first_largest();
}

// A bound that at least `count` logits reach, count at most the number of blocks.
float Sampler::block_threshold(int64_t count) {
    order_ = block_max_;
    std::nth_element(order_.begin(), order_.begin() + (count - 1), order_.end(), std::greater<float>());
    return order_[count - 1];
}

// The tokens whose key reaches the threshold, by ids; key(logit) does not fall with the logit.
template <typename Key>
void Sampler::gather(double threshold, Key key) {
    tokens_.clear();
    for (size_t block = 0; block < block_max_.size(); ++block) {
        if (!(key(block_max_[block]) >= threshold)) continue;
        const int64_t start = static_cast<int64_t>(block) * kBlock, end = std::min(start + kBlock, size_);
        for (int64_t i = start; i < end; ++i) {
            const double value = key(x_[i]);
            if (value >= threshold) tokens_.push_back({value, static_cast<int32_t>(i)});
        }
    }
}

int64_t Sampler::draw_of_few(const Filter& filter) {
    const Scale scale = scale_;
    const auto key = [scale](float x) { return scaled_logit(x, scale); };
    gather(std::max(key(block_threshold(filter.top_k)), kWeightless), key);
    keep_largest(tokens_, static_cast<size_t>(filter.top_k));
    weights_.resize(std::max<size_t>(kChunk, tokens_.size()));
    double total = 0.0;
    for (size_t i = 0; i < tokens_.size(); ++i) total += weights_[i] = std::exp(tokens_[i].key);
    size_t count = 0;
    double share = 0.0, mass = 0.0;
    for (; count < tokens_.size() && weights_[count] >= filter.min_p; ++count) {
        if (filter.top_p < 1.0 && share >= filter.top_p) break;
        share += weights_[count] / total;
        mass += weights_[count];
    }
    const double target = filter.uniform * mass;
    double reached = 0.0;
    size_t i = 0;
    while (i + 1 < count && (reached += weights_[i]) <= target) ++i;
    return tokens_[i].id;
}

// Counts and weights of buckets of equal width in the scaled logit, the likeliest first.
void Sampler::fill_buckets() {
    const double floor = scale_.largest + kWeightless * scale_.temperature;
    const float smallest = passes.smallest_above(x_, size_, static_cast<float>(std::max(floor, -3e38)));
    const double range = std::max(-scaled_logit(smallest, scale_), 1e-290);
    scale_.density = kBuckets / std::min(range, -kWeightless);
    masses_.assign(kBuckets + 1, 0.0);
    counts_.assign(kBuckets + 1, 0);
    buckets_.resize(size_);
    found_.resize(size_);
    sorted_ = -1;
    for (int64_t start = 0; start < size_; start += kChunk) {
        const int64_t length = std::min(kChunk, size_ - start);
        int32_t buckets[kChunk];
        passes.spread(x_ + start, length, scale_, weights_.data(), buckets);
        for (int64_t i = 0; i < length; ++i) {
            masses_[buckets[i]] += weights_[i];
            ++counts_[buckets[i]];
            buckets_[start + i] = static_cast<uint16_t>(buckets[i]);
        }
    }
}

// Its tokens in order and their weights, unless they lie there already.
void Sampler::sort_bucket(int bucket) {
    if (sorted_ == bucket) return;
    sorted_ = bucket;
    const int64_t count = passes.find(buckets_.data(), size_, static_cast<uint16_t>(bucket), found_.data());
    tokens_.clear();
    for (int64_t i = 0; i < count; ++i) tokens_.push_back({scaled_logit(x_[found_[i]], scale_), found_[i]});
    keep_largest(tokens_, tokens_.size());
    weights_.resize(std::max<size_t>(kChunk, tokens_.size()));
    for (size_t i = 0; i < tokens_.size(); ++i) weights_[i] = std::exp(tokens_[i].key);
}

// Behind the first `count` tokens.
Sampler::Place Sampler::cut_by_count(int64_t count) {
    Place place = {0, 0, 0.0};
    for (; place.bucket < kBuckets && count > 0; ++place.bucket) {
        if (counts_[place.bucket] > count) {
            sort_bucket(place.bucket);
            while (place.offset < static_cast<size_t>(count)) place.mass += weights_[place.offset++];
            break;
        }
        count -= counts_[place.bucket];
        place.mass += masses_[place.bucket];
    }
    return place;
}

// Before the first token that has at least `share` of the total before it.
Sampler::Place Sampler::cut_by_mass(double share, double total) {
    Place place = {0, 0, 0.0};
    for (; place.bucket < kBuckets && place.mass / total < share; place.mass += masses_[place.bucket++]) {
        if ((place.mass + masses_[place.bucket]) / total < share) continue;
        sort_bucket(place.bucket);
        Place within = place;
        for (; within.offset < tokens_.size(); within.mass += weights_[within.offset++]) {
            if (within.mass / total >= share) return within;
        }
    }
    return place;
}

// Before the first token of less weight, `all` where even the weightless ones have more.
Sampler::Place Sampler::cut_by_weight(double weight, const Place& all) {
    // A little lower, so that rounding cannot leave out a bucket whose tokens still have the weight.
    const double key = std::log(weight) - 1e-14;
    if (key < kWeightless) return all;
    const int last = static_cast<int>(std::min(-key * scale_.density, kBuckets - 1.0));
    Place place = {0, 0, 0.0};
    while (place.bucket < last) place.mass += masses_[place.bucket++];
    sort_bucket(last);
    while (place.offset < tokens_.size() && weights_[place.offset] >= weight) place.mass += weights_[place.offset++];
    return place;
}

// The token in whose weight the target falls, of those before `end`.
int64_t Sampler::pick(double target, const Place& end) {
    double before = 0.0;
    int64_t last = first_largest();
    for (int bucket = 0; bucket < kBuckets && bucket <= end.bucket; before += masses_[bucket++]) {
        if (bucket < end.bucket && before + masses_[bucket] <= target) continue;
        sort_bucket(bucket);
        const size_t count = bucket < end.bucket ? tokens_.size() : end.offset;
        double reached = before;
        for (size_t i = 0; i < count; ++i) {
            reached += weights_[i];
            last = tokens_[i].id;
            if (reached > target) return last;
        }
    }
    return last;
}

int64_t Sampler::draw_of_ranked(const Filter& filter) {
    fill_buckets();
    const auto earlier = [](const Place& a, const Place& b) {
        return a.bucket != b.bucket ? a.bucket < b.bucket : a.offset < b.offset;
    };
    Place end = cut_by_count(filter.top_k > 0 ? filter.top_k : size_);
    const Place counted = end;
    if (filter.top_p < 1.0) end = std::min(end, cut_by_mass(filter.top_p, counted.mass), earlier);
    if (filter.min_p > 0.0) end = std::min(end, cut_by_weight(filter.min_p, counted), earlier);
    return pick(filter.uniform * end.mass, end);
}

void Sampler::top_logprobs(const float* x, int64_t id, int64_t count, float* own, float* values, int64_t* ids) {
    x_ = x;
    peak_ = passes.scan(x, size_, block_max_.data());
    if (peak_.has_nan || std::isinf(peak_.largest)) {
        *own = std::numeric_limits<float>::quiet_NaN();
        for (int64_t i = 0; i < count; ++i) values[i] = *own, ids[i] = i;
        return;
    }
    const double log_sum = static_cast<double>(peak_.largest) + std::log(passes.sum_exp(x, size_, peak_.largest));
    *own = static_cast<float>(static_cast<double>(x[id]) - log_sum);
    if (count == 0) return;
    const bool is_few = count <= static_cast<int64_t>(block_max_.size());
    gather(is_few ? block_threshold(count) : -kInfinity, [](float logit) { return static_cast<double>(logit); });
    keep_largest(tokens_, static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        values[i] = static_cast<float>(tokens_[i].key - log_sum);
        ids[i] = tokens_[i].id;
    }
}

// Below this many numbers a second thread costs more than it saves.
constexpr int64_t kParallel = 1 << 15;

template <typename Work>
void for_rows(int64_t rows, int64_t size, int num_threads, Work work) {
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, rows));
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * size >= kParallel)
    {
        Sampler sampler(size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t row = 0; row < rows; ++row) work(sampler, row);
    }
}

}  // namespace

extern "C" {

// Changes with every change of a function below; `sampling.py` calls no library of another version.
int lrt_sampling_version() { return 1; }

// Draws one token per row of logits [rows, size], rows row_stride numbers apart, into ids [rows]; the parameters are [rows]
// each: temperature 0 takes the largest, top_k 0 or less keeps all, uniform lies in [0, 1 - 2^-32].
void lrt_sample(
    const float* logits, int64_t row_stride, int64_t rows, int64_t size, const double* temperature, const int64_t* top_k,
    const double* top_p, const double* min_p, const double* uniform, int64_t* ids, int num_threads) {
    for_rows(rows, size, num_threads, [=](Sampler& sampler, int64_t row) {
        const Filter filter = {temperature[row], top_p[row], min_p[row], uniform[row], top_k[row]};
        ids[row] = sampler.draw(logits + row * row_stride, filter);
    });
}

// Log-probabilities of logits [rows, size]: of ids [rows] into own [rows], the `count` largest and their ids into values and
// top_ids [rows, count], falling, equals by their ids.
void lrt_top_logprobs(
    const float* logits, int64_t row_stride, int64_t rows, int64_t size, const int64_t* ids, int64_t count, float* own,
    float* values, int64_t* top_ids, int num_threads) {
    for_rows(rows, size, num_threads, [=](Sampler& sampler, int64_t row) {
        sampler.top_logprobs(logits + row * row_stride, ids[row], count, own + row, values + row * count, top_ids + row * count);
    });
}
}
