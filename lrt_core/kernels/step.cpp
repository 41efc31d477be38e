// The native step: all layers over a step's rows in one call, for every instruction set, chosen at run time.
//
// Plain C++17 without any header of torch or Python, so that any compiler builds it. Threads come from OpenMP: no library is
// linked for it, the loader brings the one that torch already uses, so that one pool of threads serves both.
// Neighbours: `plan.h` has the structs, `products.h`, `attention.h`, `step.h` and `forward.h` the work, `plan.py` the Python side.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "plan.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_VARIANTS 1
#include <immintrin.h>
#if defined(__clang__)
#define HAS_BF16_DOT (__clang_major__ >= 16)
#else
#define HAS_BF16_DOT (__GNUC__ >= 10)
#endif
#endif

namespace lrt {

// A counter on a cache line of its own: threads take work from it in order.
struct alignas(64) Counter {
    int64_t next;
};

// Where threads meet.
struct Meeting {
    alignas(64) int64_t arrived;
    alignas(64) int64_t phase;
};

inline void pause_thread() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    asm volatile("yield");
#endif
}

// Looks at a phase before the processor is offered to others: up to fifty microseconds.
constexpr int64_t kPatience = 1024;

// One thread's view of the team that runs a call. Every thread goes through the same phases in the same order.
struct Team {
    int64_t thread, num_threads;
    Counter* counters;
    Meeting* meeting;
    int64_t phase = 0;

    inline __attribute__((always_inline)) int64_t* next_counter() { return &(counters++)->next; }

    inline __attribute__((always_inline)) int64_t take(int64_t* counter, int64_t count) {
        return __atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
    }

    // Waits for all threads. OpenMP's own barrier would let a thread sleep after microseconds wherever the process has more
    // threads than processors, as a server has: a step meets a hundred times, and to be woken takes longer than to wait.
    void barrier() {
        if (num_threads == 1) return;
        ++phase;
        if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == num_threads) {
            __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&meeting->phase, phase, __ATOMIC_RELEASE);
            return;
        }
        for (int64_t looks = 0; __atomic_load_n(&meeting->phase, __ATOMIC_ACQUIRE) != phase; ++looks) {
            if (looks < kPatience) {
                pause_thread();
            } else {
                std::this_thread::yield();
            }
        }
    }
};

#define LANES 8
#define BF16_DOT 0
#define VNNI 0
#define PAIRS 0
namespace plain {
namespace {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "step.h"
#include "forward.h"
}  // namespace
}  // namespace plain
#undef LANES

#if HAS_VARIANTS
#ifdef __clang__
#define BEGIN_TARGET(features) _Pragma(features)
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#undef PAIRS
#define PAIRS 1
#define LANES 8
namespace avx2 {
namespace {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "step.h"
#include "forward.h"
}  // namespace
}  // namespace avx2
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define LANES 16
namespace avx512 {
namespace {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "step.h"
#include "forward.h"
}  // namespace
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef VNNI
#define VNNI 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,prefer-vector-width=512")
#endif
namespace avx512_vnni {
namespace {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "step.h"
#include "forward.h"
}  // namespace
}  // namespace avx512_vnni
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if HAS_BF16_DOT
#undef BF16_DOT
#undef PAIRS
#define BF16_DOT 1
#define PAIRS 0
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,prefer-vector-width=512")
#endif
namespace avx512_bf16 {
namespace {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "step.h"
#include "forward.h"
}  // namespace
}  // namespace avx512_bf16
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef LANES
#endif

namespace {

struct Set {
    const char* name;
    bool has_pairs, has_bytes;
    void (*forward)(const Model&, const Pool&, const Step&, int64_t, char*, const Outcome&, Team&);
    void (*apply)(const Matrix&, const float*, int64_t, float, char*, float*, Team&);
    void (*attend)(const Model&, const Pool&, const Rows&, const float*, char*, float*, Team&);
    int64_t (*workspace_size)(const Model&, int64_t, int64_t);
};

#define SET(name) Set{#name, name::kHasPairs, name::kHasBytes, name::forward, name::apply, name::attend, name::workspace_size}

// What this processor has, the best first.
const std::vector<Set>& available() {
    static const std::vector<Set> sets = [] {
        std::vector<Set> found;
#if HAS_VARIANTS
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
#if HAS_BF16_DOT
        if (has_vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(SET(avx512_bf16));
#endif
        if (has_vnni) found.push_back(SET(avx512_vnni));
        if (has_avx512) found.push_back(SET(avx512));
        if (has_avx2) found.push_back(SET(avx2));
#endif
        found.push_back(SET(plain));
        return found;
    }();
    return sets;
}

Set set = available()[0];

// Counters of a call: what the phases of a layer take, and a few more before and after the layers.
constexpr int64_t kCountersPerLayer = 14, kOtherCounters = 8;

template <typename Work>
void run_team(int64_t num_threads, int64_t num_counters, Work work) {
    Counter* counters = new Counter[num_counters]();
    Meeting meeting{0, 0};
#pragma omp parallel num_threads(num_threads)
    {
#ifdef _OPENMP
        Team team{omp_get_thread_num(), omp_get_num_threads(), counters, &meeting};
#else
        Team team{0, 1, counters, &meeting};
#endif
        work(team);
    }
    delete[] counters;
}

// One round of the splitmix64 finaliser (Steele et al., 2014).
uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// As `uniform` in lrt_core/sampling.py.
double uniform(uint64_t seed, int64_t step) {
    constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
    const uint64_t state = mix64(seed + kGolden);
    return static_cast<double>(mix64(state + static_cast<uint64_t>(step + 1) * kGolden) >> 32) / 4294967296.0;
}

// The head on the last row of every sequence whose next token is due, and that token.
void draw(const Model& model, const Step& step, const Outcome& outcome, int64_t num_threads) {
    const int64_t size = model.hidden_size, stride = (size + kTile - 1) / kTile * kTile;
    std::vector<int64_t> due, top_ks, ids;
    std::vector<double> temperatures, top_ps, min_ps, uniforms;
    std::vector<float> hidden;
    for (int64_t s = 0, row = 0; s < step.num_sequences; ++s) {
        row += outcome.num_settled[s];
        outcome.ids[s] = -1;
        if (outcome.num_settled[s] != step.sequences[s].num_wanted) continue;
        const Draw& own = step.draws[s];
        due.push_back(s), top_ks.push_back(own.top_k), temperatures.push_back(own.temperature);
        top_ps.push_back(own.top_p), min_ps.push_back(own.min_p);
        uniforms.push_back(own.temperature == 0.0 ? 0.0 : uniform(own.seed, step.sequences[s].num_drawn));
        hidden.insert(hidden.end(), outcome.hidden + (row - 1) * size, outcome.hidden + row * size);
    }
    const int64_t rows = static_cast<int64_t>(due.size());
    if (rows == 0) return;
    std::vector<char> workspace(rows * (8 * stride + 4));
    run_team(num_threads, kOtherCounters, [&](Team& team) {
        set.apply(model.head, hidden.data(), rows, model.softcap, workspace.data(), outcome.logits, team);
    });
    ids.resize(rows);
    lrt_sample(outcome.logits, model.vocab_size, rows, model.vocab_size, temperatures.data(), top_ks.data(), top_ps.data(),
               min_ps.data(), uniforms.data(), ids.data(), num_threads);
    for (int64_t i = 0; i < rows; ++i) outcome.ids[due[i]] = ids[i];
}

}  // namespace
}  // namespace lrt

extern "C" {

// Which instruction set runs.
const char* lrt_instruction_set() { return lrt::set.name; }

// Name of the index-th set that this processor has, the best first; null behind the last.
const char* lrt_available_set(int64_t index) {
    return index < static_cast<int64_t>(lrt::available().size()) ? lrt::available()[index].name : nullptr;
}

// Whether it multiplies pairs of whole numbers, so that bfloat16 weights had best be such, of 12 bits.
int32_t lrt_has_pairs() { return lrt::set.has_pairs; }
int32_t lrt_has_bytes() { return lrt::set.has_bytes; }

// Use the index-th of them from now on; for tests and comparisons, while no other call runs. Workspaces must be cut anew.
void lrt_use_set(int64_t index) { lrt::set = lrt::available()[index]; }

int64_t lrt_workspace_size(const lrt::Model* model, int64_t rows, int64_t num_threads) {
    return lrt::set.workspace_size(*model, rows, num_threads);
}

// A whole step; `forward.h` says what it does. end_of_source: layers up to and with the source. workspace: `lrt_workspace_size`
// bytes for step->capacity rows, zeroed once.
void lrt_forward(const lrt::Model* model, const lrt::Pool* pool, const lrt::Step* step, int64_t end_of_source, char* workspace,
                 const lrt::Outcome* outcome, int64_t num_threads) {
    lrt::run_team(num_threads, lrt::kOtherCounters + lrt::kCountersPerLayer * model->num_layers, [&](lrt::Team& team) {
        lrt::set.forward(*model, *pool, *step, end_of_source, workspace, *outcome, team);
    });
    if (step->draws != nullptr) lrt::draw(*model, *step, *outcome, num_threads);
}

// out [rows, n] = input [rows, k] times the matrix, capped where softcap > 0. workspace: rows * (8 * (k padded to 16) + 4) bytes, zero behind column k.
void lrt_apply(const lrt::Matrix* matrix, const float* input, int64_t rows, float softcap, char* workspace, float* out,
               int64_t num_threads) {
    lrt::run_team(num_threads, lrt::kOtherCounters,
                  [&](lrt::Team& team) { lrt::set.apply(*matrix, input, rows, softcap, workspace, out, team); });
}

// Attention alone over the first layer's part of the pool: queries [T, N, H] -> out [T, N * H]. workspace as for `lrt_forward`.
void lrt_attend(const lrt::Model* model, const lrt::Pool* pool, const lrt::Rows* rows, const float* queries, char* workspace,
                float* out, int64_t num_threads) {
    lrt::run_team(num_threads, lrt::kOtherCounters,
                  [&](lrt::Team& team) { lrt::set.attend(*model, *pool, *rows, queries, workspace, out, team); });
}
}
