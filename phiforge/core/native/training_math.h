// Numbers of the training kernels: bf16 and fp32 values, exp, and one small matrix product.
//
// Rows of any length go sixteen numbers at a time through `lanes`, `take` and `give`. A "unit" is
// what one broadcast multiplies: two neighbouring bf16 values or one float.
#pragma once

#include <type_traits>

#include "common.h"

namespace phi {

typedef f32x16 Floats;
typedef u32x16 Words;
typedef uint16_t bf16;  // its bits

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

inline int num_threads() {  // of the parallel region around
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls body(i, count) for i = 0, 16, 32 ...; count is 16, known when compiling, but for the rest.
template <class Body>
PHI_INLINE void lanes(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) body(i, std::integral_constant<long, LANES>{});
  if (i < size) body(i, long(size - i));
}

template <class T>
PHI_INLINE Floats take(const T* from, std::integral_constant<long, LANES>) {
  return read(from);
}
template <class T>
PHI_INLINE Floats take(const T* from, long count) {  // zeros behind the end
  T full[LANES] = {};
  std::memcpy(full, from, count * sizeof(T));
  return read(full);
}

template <class T>
PHI_INLINE void give(T* to, Floats value, std::integral_constant<long, LANES>) {
  write(to, value);
}
template <class T>
PHI_INLINE void give(T* to, Floats value, long count) {
  T full[LANES];
  write(full, value);
  std::memcpy(to, full, count * sizeof(T));
}

// As sum_lanes, without a way through memory where there is an instruction.
PHI_INLINE float add_up(Floats x) {
#ifdef PHI_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  return sum_lanes(x);
#endif
}

PHI_INLINE Floats lane_numbers() {
  return Floats{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// How values of a type lie in units.
template <class T>
struct Unit;

template <>
struct Unit<float> {
  typedef float type;
  static constexpr int kValues = 1;
  typedef Floats Vector;
  static Vector broadcast(type unit) { return unit - Floats{}; }
  static void add_product(Floats& sum, Vector a, Vector b) { sum += a * b; }
};

template <>
struct Unit<bf16> {
  typedef uint32_t type;
  static constexpr int kValues = 2;
  typedef Words Vector;
  static Vector broadcast(type unit) { return unit | Words{}; }
  static void add_product(Floats& sum, Vector a, Vector b) {
#ifdef PHI_DOT_PAIRS
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const Words high = Words{} + 0xffff0000u;
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    sum += (Floats)(a & high) * (Floats)(b & high);
#endif
  }
};

// 8 rows of c: c[8, 16 x V] (+)= a[8, units] x b[units, 16 x V].
template <class T, int V>
inline void tile(int units, const typename Unit<T>::type* a, int64_t lda,
                 const typename Unit<T>::type* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  typedef typename Unit<T>::Vector Vector;
  Floats sum[8][V];
  for (int m = 0; m < 8; m++)
    for (int v = 0; v < V; v++) {
      if (add)
        std::memcpy(&sum[m][v], c + m * ldc + v * LANES, sizeof(Floats));
      else
        sum[m][v] = Floats{};
    }
  for (int k = 0; k < units; k++) {
    Vector right[V];
    for (int v = 0; v < V; v++) std::memcpy(&right[v], b + k * ldb + v * LANES, sizeof(Vector));
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) {
      const Vector left = Unit<T>::broadcast(a[m * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) Unit<T>::add_product(sum[m][v], left, right[v]);
    }
  }
  for (int m = 0; m < 8; m++)
    for (int v = 0; v < V; v++) std::memcpy(c + m * ldc + v * LANES, &sum[m][v], sizeof(Floats));
}

// c[rows, columns] (+)= a[rows, units] x b[units, columns]; rows a multiple of 8, columns of 16.
template <class T>
inline void multiply(int rows, int columns, int units, const typename Unit<T>::type* a, int64_t lda,
                     const typename Unit<T>::type* b, int64_t ldb, float* c, int64_t ldc,
                     bool add) {
  for (int m = 0; m < rows; m += 8) {
    int n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
      tile<T, 2>(units, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, add);
    if (n < columns) tile<T, 1>(units, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, add);
  }
}

}  // namespace phi
