// What nvcc would supply, for g++: CUDA C++ kernels, CuPy's and the project's own, as ordinary functions on the CPU.
//
// One block runs after another. In a kernel without barriers one thread of the block runs to its end, then the
// next. Where the source names a barrier or a warp function each thread is a fiber (a stack of its own,
// <ucontext.h>), which runs until it waits; when all have, they go on: __syncthreads waits for the block,
// __syncwarp and the shuffles for the warp.
//
// Offered: threadIdx and the like, static __shared__ memory (filled with 0xff before each block: it is not zero on
// a GPU), barriers, two shuffles (their masks are ignored), atomics, __ldg, the usual mathematics. Not
// offered, and then a compile error: dynamic shared memory (extern __shared__), textures, wmma, cooperative groups,
// inline PTX. Not seen: races, since threads never run at once, and the rounding of a GPU's own exp, division and
// fused multiply-add.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

namespace cuda {
namespace std = ::std;
}

#define __CUDACC_VER_MAJOR__ 13
#define __CUDA_ON_CPU__ 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One section holds all shared variables, so that they can be filled; "extern __shared__" becomes "extern static",
// an error.
#define __shared__ static __attribute__((section("shared_memory")))

extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

// ---- fibers ----

enum emu_state : char { emu_ready, emu_at_block_barrier, emu_at_warp_barrier, emu_done };
// Stacks do not begin at multiples of a power of two from each other: the tops of all would share few lines of the cache
static const size_t emu_stack_size = 65536 + 5 * 64;
static const unsigned emu_most_threads = 1024;
static void *emu_scheduler[5], *emu_fibers[emu_most_threads][5];
static unsigned emu_started;  // so many fibers have been made; they serve block after block
static std::vector<emu_state> emu_states;
static unsigned emu_thread;  // which thread of the block runs
static void **emu_arguments;
static void (*emu_run_thread)();

// From stack to stack by the compiler's own setjmp: swapcontext would ask the kernel for the signal mask each time.
// `noipa`, since whoever calls these must not be compiled as if it knew which registers they leave as they are.
__attribute__((noipa)) static void emu_go(void **to) { __builtin_longjmp(to, 1); }
__attribute__((noipa)) static void emu_wait(emu_state why) {
    emu_states[emu_thread] = why;
    if (!__builtin_setjmp(emu_fibers[emu_thread])) emu_go(emu_scheduler);
}
static void emu_fiber() {
    for (;;) {
        emu_run_thread();
        emu_wait(emu_done);  // until the next block
    }
}
__attribute__((noipa)) static void emu_resume() {
    static char *stacks = (char *)malloc(emu_most_threads * emu_stack_size);
    if (__builtin_setjmp(emu_scheduler)) return;
    if (emu_thread < emu_started) emu_go(emu_fibers[emu_thread]);
    emu_started = emu_thread + 1;
    static ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + emu_thread * emu_stack_size;
    start.uc_stack.ss_size = emu_stack_size;
    makecontext(&start, emu_fiber, 0);
    setcontext(&start);
}
static inline void __syncthreads() { emu_wait(emu_at_block_barrier); }
static inline void __syncwarp(unsigned = 0xffffffffu) { emu_wait(emu_at_warp_barrier); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// ---- what the lanes of a warp tell each other: each writes to its slot, all wait, each reads, all wait ----

static unsigned long long emu_slots[1024];

template <class T> static inline T emu_shuffle(T value, unsigned source_lane) {
    static_assert(sizeof(T) <= sizeof emu_slots[0], "a shuffle moves at most 8 bytes");
    unsigned source = (emu_thread & ~31u) + source_lane;
    memcpy(&emu_slots[emu_thread], &value, sizeof(T));
    emu_wait(emu_at_warp_barrier);
    T result = value;
    if (source_lane < 32 && source < emu_states.size()) memcpy(&result, &emu_slots[source], sizeof(T));
    emu_wait(emu_at_warp_barrier);
    return result;
}
template <class T> static inline T __shfl_sync(unsigned, T value, int lane, int width = 32) {
    return emu_shuffle(value, (emu_thread & 31 & ~(width - 1)) | (lane & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, unsigned mask, int width = 32) {
    unsigned lane = emu_thread & 31, other = lane ^ mask;
    return emu_shuffle(value, (other & ~(width - 1)) <= (lane & ~(width - 1)) ? other : lane);
}

// ---- functions that CUDA has in the global namespace ----

using std::abs, std::ceil, std::copysign, std::cos, std::exp, std::expm1, std::fabs, std::floor, std::fma, std::fmod;
using std::isfinite, std::isinf, std::isnan, std::log, std::log1p, std::pow, std::rint, std::signbit, std::sin;
using std::sqrt, std::tanh, std::trunc;
using std::complex, std::conj, std::imag, std::norm, std::real;

template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
static inline auto min(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return (T)a < (T)b ? (T)a : (T)b;
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
static inline auto max(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return (T)a > (T)b ? (T)a : (T)b;
}
static inline float __expf(float x) { return std::exp(x); }
static inline float __logf(float x) { return std::log(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
static inline float rsqrt(float x) { return 1.f / std::sqrt(x); }
static inline double rsqrt(double x) { return 1. / std::sqrt(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T> static inline T __ldg(const T *address) { return *address; }

template <class To, class From> static inline To emu_same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
static inline long long __double_as_longlong(double x) { return emu_same_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emu_same_bits<double>(x); }
static inline int __float_as_int(float x) { return emu_same_bits<int>(x); }
static inline float __int_as_float(int x) { return emu_same_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return emu_same_bits<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return emu_same_bits<float>(x); }

// Atomics: plain, since no two threads run at once. Each returns the old value.
template <class T> static inline T emu_replace(T *address, T value) {
    T old = *address;
    *address = value;
    return old;
}
template <class T> static inline T atomicAdd(T *address, T value) {
    return emu_replace(address, (T)(*address + value));
}
template <class T> static inline T atomicExch(T *address, T value) { return emu_replace(address, value); }
template <class T> static inline T atomicMax(T *address, T value) {
    return emu_replace(address, value > *address ? value : *address);
}
template <class T> static inline T atomicMin(T *address, T value) {
    return emu_replace(address, value < *address ? value : *address);
}
template <class T> static inline T atomicCAS(T *address, T expected, T value) {
    return emu_replace(address, *address == expected ? value : *address);
}

// ---- launching ----

template <class... A, size_t... I> static void emu_call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<std::remove_reference_t<A>> *)emu_arguments[I]...);
}
template <class... A> struct emu_launch {
    static inline void (*kernel)(A...);

    static void run_thread() { emu_call(kernel, std::index_sequence_for<A...>{}); }

    static void choose(unsigned thread) {
        emu_thread = thread;
        threadIdx = {thread, 0, 0};
        if (thread >= blockDim.x)
            threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
    }

    // 0, or 1 if the threads wait for each other at different barriers
    static int run_block_of_fibers(unsigned threads) {
        emu_states.assign(threads, emu_ready);
        for (;;) {
            bool ran = false;
            for (unsigned thread = 0; thread < threads; thread++) {
                if (emu_states[thread] != emu_ready) continue;
                ran = true;
                choose(thread);
                emu_resume();
            }
            if (ran) {
                for (unsigned first = 0; first < threads; first += 32)
                    release_warp(first, std::min(first + 32, threads));
                continue;
            }
            unsigned done = std::count(emu_states.begin(), emu_states.end(), emu_done);
            unsigned waiting = std::count(emu_states.begin(), emu_states.end(), emu_at_block_barrier);
            if (done == threads) return 0;
            if (done + waiting != threads) {
                emu_started = 0;  // these fibers are in the middle of something
                return 1;
            }
            std::replace(emu_states.begin(), emu_states.end(), emu_at_block_barrier, emu_ready);
        }
    }

    // A warp goes on when all of its threads that still run have come to a warp barrier
    static void release_warp(unsigned first, unsigned end) {
        for (unsigned thread = first; thread < end; thread++)
            if (emu_states[thread] != emu_at_warp_barrier && emu_states[thread] != emu_done) return;
        for (unsigned thread = first; thread < end; thread++)
            if (emu_states[thread] == emu_at_warp_barrier) emu_states[thread] = emu_ready;
    }
};

// `sizes` are the three of the grid and the three of the block, `arguments` points to each argument as
// cuLaunchKernel has it
template <class... A>
static int emu_run(void (*kernel)(A...), const unsigned *sizes, void **arguments, bool with_fibers) {
    typedef emu_launch<A...> launch;
    launch::kernel = kernel;
    emu_arguments = arguments;
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {sizes[3], sizes[4], sizes[5]};
    emu_run_thread = launch::run_thread;
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    for (unsigned z = 0; z < gridDim.z; z++)
        for (unsigned y = 0; y < gridDim.y; y++)
            for (unsigned x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
                if (with_fibers) {
                    if (launch::run_block_of_fibers(threads)) return 1;
                    continue;
                }
                for (unsigned thread = 0; thread < threads; thread++) {
                    launch::choose(thread);
                    launch::run_thread();
                }
            }
    return 0;
}
