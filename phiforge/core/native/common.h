// Sixteen floats at a time on every machine: loads, bf16, exp, and a team of threads.
// Included by every kernel; a library includes it once, which also gives it phiforge_simd().
// Vector extensions of GCC and Clang throughout; hand-written instructions only under AVX-512.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(PHIFORGE_GENERIC)
#define PHI_AVX512 1
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define PHI_DOT_PAIRS 1  // products of bf16 pairs summed in fp32, one instruction
#endif
#endif

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PHI_INLINE inline __attribute__((always_inline))
#define PHI_EXPORT extern "C" __attribute__((visibility("default")))
#define PHI_UNROLL _Pragma("GCC unroll 8")
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

PHI_EXPORT const char* phiforge_simd() {
#if defined(PHI_DOT_PAIRS)
  return "avx512_bf16";
#elif defined(PHI_AVX512)
  return "avx512";
#elif defined(PHIFORGE_GENERIC)
  return "generic";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "generic";
#endif
}

namespace phi {

constexpr long LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

template <class T>
PHI_INLINE T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
PHI_INLINE void store_as(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}
PHI_INLINE f32x16 load(const float* from) { return load_as<f32x16>(from); }
PHI_INLINE void store(float* to, f32x16 value) { store_as(to, value); }
PHI_INLINE f32x16 splat(float value) { return value - f32x16{}; }

// a b + c rounded once wherever the machine can. Spelled out: a compiler that may contract a * b + c
// does so in one instance of a function and not in another, and results would depend on which.
PHI_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(PHI_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  f32x16 out;
  for (int part = 0; part < 2; part++) {
    const long at = 32 * part;
    __m256 x = load_as<__m256>((const char*)&a + at), y = load_as<__m256>((const char*)&b + at);
    store_as((char*)&out + at, _mm256_fmadd_ps(x, y, load_as<__m256>((const char*)&c + at)));
  }
  return out;
#elif defined(__ARM_NEON)
  f32x16 out;
  for (int part = 0; part < 4; part++) {
    const long at = 16 * part;
    float32x4_t x = load_as<float32x4_t>((const char*)&a + at);
    float32x4_t y = load_as<float32x4_t>((const char*)&b + at);
    store_as((char*)&out + at, vfmaq_f32(load_as<float32x4_t>((const char*)&c + at), x, y));
  }
  return out;
#else
  return a * b + c;
#endif
}

// Sums and maxima of the lanes in one fixed order: halves folded onto each other.
template <class Fold>
PHI_INLINE float fold_lanes(f32x16 x, Fold fold) {
  f32x8 low8, high8;
  std::memcpy(&low8, &x, 32);
  std::memcpy(&high8, (const char*)&x + 32, 32);
  f32x8 x8 = fold(low8, high8);
  f32x4 low4, high4;
  std::memcpy(&low4, &x8, 16);
  std::memcpy(&high4, (const char*)&x8 + 16, 16);
  f32x4 x4 = fold(low4, high4);
  f32x4 pairs = fold(x4, f32x4{x4[2], x4[3], x4[0], x4[1]});
  return fold(pairs, f32x4{pairs[1], pairs[0], pairs[3], pairs[2]})[0];
}
PHI_INLINE float sum_lanes(f32x16 x) {
  return fold_lanes(x, [](auto a, auto b) { return a + b; });
}
PHI_INLINE float max_lanes(f32x16 x) {
  return fold_lanes(x, [](auto a, auto b) { return a > b ? a : b; });
}
PHI_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

// exp within 2 ulp; 0 below -87.3 (no denormals), saturated above 88.3; NaN stays NaN.
// Range reduction by two parts of ln 2, then the polynomial of Cephes' expf.
PHI_INLINE f32x16 exp(f32x16 x) {
  const f32x16 tiny = splat(-87.3f), huge = splat(88.3f), magic = splat(12582912.0f);
  i32x16 vanishes = x < tiny;
  x = x < tiny ? tiny : x;
  x = x > huge ? huge : x;
  f32x16 n = fma(x, splat(1.44269504088896341f), magic) - magic;
  f32x16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;  // the bits of 2^n
  return vanishes ? f32x16{} : p * (f32x16)power;
}

PHI_INLINE float widen(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
PHI_INLINE uint16_t narrow(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
PHI_INLINE f32x16 load_bf16(const uint16_t* from) {
  u32x16 wide = __builtin_convertvector(load_as<u16x16>(from), u32x16);
  return (f32x16)(wide << 16);
}
PHI_INLINE void store_bf16(uint16_t* to, f32x16 value) {
#ifdef PHI_DOT_PAIRS
  store_as(to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  u32x16 bits = (u32x16)value;
  i32x16 is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  u32x16 quiet = (bits >> 16) | 0x40u;
  store_as(to, __builtin_convertvector(is_nan ? quiet : rounded, u16x16));
#endif
}

// One interface for activations kept in either type.
PHI_INLINE f32x16 read(const float* from) { return load(from); }
PHI_INLINE f32x16 read(const uint16_t* from) { return load_bf16(from); }
PHI_INLINE void write(float* to, f32x16 value) { store(to, value); }
PHI_INLINE void write(uint16_t* to, f32x16 value) { store_bf16(to, value); }
PHI_INLINE float read_one(const float* from) { return *from; }
PHI_INLINE float read_one(const uint16_t* from) { return widen(*from); }
PHI_INLINE void write_one(float* to, float value) { *to = value; }
PHI_INLINE void write_one(uint16_t* to, float value) { *to = narrow(value); }

// out[i] = x[i] factor
template <class Out>
PHI_INLINE void write_scaled(Out* out, const float* x, float factor, long size) {
  const long whole = size / LANES * LANES;
  for (long i = 0; i < whole; i += LANES) write(out + i, load(x + i) * factor);
  for (long i = whole; i < size; i++) write_one(out + i, x[i] * factor);
}

PHI_INLINE long round_up(long value, long multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
PHI_INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Memory on cache lines that only grows; its content is undefined after `need`.
template <class T>
class Buffer {
 public:
  T* need(size_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(new (std::align_val_t(64)) char[count * sizeof(T)]);
      size_ = count;
    }
    return get();
  }
  T* get() const { return reinterpret_cast<T*>(memory_.get()); }
  bool holds(size_t count) const { return count <= size_; }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

struct alignas(64) Counter {
  std::atomic<long> next{0};
};

PHI_INLINE void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where threads meet. Who waits spins for some microseconds, as long as a phase's end takes when
// every thread has a core, then lets others run: on a busy machine the thread waited for is likely
// to want this very core, and OpenMP's barrier would hold it for a millisecond.
class Barrier {
 public:
  void wait(int size) {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (long turn = 0; round_.load(std::memory_order_acquire) == round; turn++) {
      if (turn < SPINS)
        pause_briefly();
      else if (turn < SPINS + YIELDS)
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }

 private:
  static constexpr long SPINS = 1000, YIELDS = 1000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

// What a thread of a parallel region knows. All threads walk through the same phases; within one,
// items go to whoever is free, so that a thread that lost its core holds up one item, not a share.
class Team {
 public:
  Team(int size, Counter* counters, Barrier& barrier)
      : size_(size), counters_(counters), barrier_(barrier) {}

  // work(item) or work(item, next), next being the item this thread does after it (>= num_items:
  // none). No barrier at the end: call wait().
  template <class Work>
  void each(long num_items, Work work) {
    std::atomic<long>& counter = counters_[phase_++].next;
    for (long item = take(counter); item < num_items;) {
      const long next = take(counter);
      if constexpr (std::is_invocable<Work, long, long>::value)
        work(item, next);
      else
        work(item);
      item = next;
    }
  }
  void wait() const {
    if (size_ > 1) barrier_.wait(size_);
  }

 private:
  static long take(std::atomic<long>& next) {
    return next.fetch_add(1, std::memory_order_relaxed);
  }
  int size_;
  Counter* counters_;
  Barrier& barrier_;
  int phase_ = 0;
};

// Runs body(team, thread) on `threads` threads (fewer where the system gives fewer).
template <class Body>
void in_parallel(int threads, std::vector<Counter>& counters, Body body) {
  for (Counter& counter : counters) counter.next.store(0, std::memory_order_relaxed);
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      Team team(omp_get_num_threads(), counters.data(), barrier);
      body(team, omp_get_thread_num());
      team.wait();  // so that nobody waits long in the barrier that ends a parallel region
    }
    return;
  }
#endif
  Team team(1, counters.data(), barrier);
  body(team, 0);
}

}  // namespace phi
