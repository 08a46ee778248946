// Attention of documents, forward and backward, without ever holding a whole matrix of scores.
//
// Each run of tokens (a document in its row) is attended causally by itself; tasks are one run and
// one key head. Scores, softmax and sums are fp32; matrices multiply in the type of the inputs.
// Method: FlashAttention-2 (arXiv 2307.08691), whose backward pass computes probabilities again.
//
// Names: h query heads, k key heads, e head size, all rounded up to full vectors in scratch memory.
#pragma once

#include "training_math.h"

namespace phi {

#define PHI_LIST(...) __VA_ARGS__
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PHI_SHUFFLES 1
#endif
#endif

constexpr int kBlock = 64;  // queries, and keys, of one block
constexpr float kNever = -1e30f;  // score of what may not be seen; its exponential is 0

struct AttentionShape {
  int64_t num_heads, num_kv_heads, head_size;
  int64_t window;  // a token sees itself and the window - 1 before it
  float scale;
  int padded;  // head size in full vectors
  int64_t row() const { return (num_heads + 2 * num_kv_heads) * head_size; }
  int64_t group() const { return num_heads / num_kv_heads; }
};

// Memory of one thread, given out piece by piece; each piece starts on a cache line.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : start_(memory_.need(bytes)) {}
  void rewind() { used_ = 0; }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(start_ + used_);
    used_ += round_up(count * sizeof(T), 64);
    return piece;
  }

 private:
  Buffer<char> memory_;
  char* start_;
  size_t used_ = 0;
};

// to[rows_padded, padded] = from[rows, size], zeros where there is nothing.
template <class T>
inline void copy_rows(const T* from, int64_t stride, int rows, int size, T* to, int rows_padded,
                      int padded) {
  for (int r = 0; r < rows; r++) {
    const T* row = from + r * stride;
    T* out = to + r * padded;
    int c = 0;
    for (; c + LANES <= size; c += LANES) std::memcpy(out + c, row + c, LANES * sizeof(T));
    for (; c < padded; c++) out[c] = c < size ? row[c] : T{};
  }
  std::memset((void*)(to + rows * padded), 0, size_t(rows_padded - rows) * padded * sizeof(T));
}

// Turns 16 x 16 words; as four rounds of exchanges between rows, each twice as far apart.
template <class U>
inline void transpose_tile(const U* from, int64_t from_stride, U* to, int64_t to_stride) {
  U rows[16][16];
  for (int r = 0; r < 16; r++) std::memcpy(rows[r], from + r * from_stride, 64);
#if PHI_SHUFFLES
  typedef U Row __attribute__((vector_size(64)));
  Row x[16], y[16];
  std::memcpy(x, rows, sizeof x);
#define PHI_EXCHANGE(from, to, step, low, high)                     \
  for (int r = 0; r < 16; r++)                                      \
    if (!(r & step)) {                                              \
      to[r] = __builtin_shufflevector(from[r], from[r + step], low);    \
      to[r + step] = __builtin_shufflevector(from[r], from[r + step], high); \
    }
  PHI_EXCHANGE(x, y, 1, PHI_LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
               PHI_LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  PHI_EXCHANGE(y, x, 2, PHI_LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
               PHI_LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  PHI_EXCHANGE(x, y, 4, PHI_LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
               PHI_LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  PHI_EXCHANGE(y, x, 8, PHI_LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
               PHI_LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef PHI_EXCHANGE
  for (int r = 0; r < 16; r++) std::memcpy(to + r * to_stride, &x[r], 64);
#else
  for (int u = 0; u < 16; u++)
    for (int r = 0; r < 16; r++) to[u * to_stride + r] = rows[r][u];
#endif
}

// to[units, rows] = the transpose of from[rows, units], 4 bytes each.
template <class U>
inline void transpose(const U* from, int64_t from_stride, int rows, int units, U* to,
                      int64_t to_stride) {
  for (int r = 0; r < rows; r += 16)
    for (int u = 0; u < units; u += 16) {
      const U* tile = from + r * from_stride + u;
      U* out = to + u * to_stride + r;
      if (r + 16 <= rows && u + 16 <= units) {
        transpose_tile(tile, from_stride, out, to_stride);
        continue;
      }
      for (int a = 0; a < std::min(16, rows - r); a++)
        for (int b = 0; b < std::min(16, units - u); b++)
          out[b * to_stride + a] = tile[a * from_stride + b];
    }
}

// Rows r and r + 1 of from[rows, columns] side by side: to[rows / 2, columns] units.
inline void interleave(const bf16* from, int rows, int columns, uint32_t* to) {
  for (int r = 0; r < rows; r += 2) {
    const bf16 *first = from + r * columns, *second = first + columns;
    uint32_t* out = to + r / 2 * columns;
    for (int c = 0; c < columns; c++)
      out[c] = uint32_t(first[c]) | uint32_t(second[c]) << 16;
  }
}

inline void interleave(const float* from, int rows, int columns, float* to) {
  memcpy(to, from, size_t(rows) * columns * sizeof(float));
}

inline size_t forward_scratch(const AttentionShape& s, int64_t longest) {
  const size_t length = (longest + kBlock - 1) / kBlock * kBlock;
  return 4 * (2 * length * s.padded + kBlock * (2 * s.padded + 2 * kBlock + 2)) + 64 * 16;
}

template <class T>
void attend(const AttentionShape& s, const T* qkv, int64_t length, int64_t kv_head, T* out,
            float* log_sums, Scratch& scratch) {
  typedef typename Unit<T>::type U;
  constexpr int kValues = Unit<T>::kValues;
  const int e = int(s.head_size), padded = s.padded, units = padded / kValues;
  const int rounded = int((length + kBlock - 1) / kBlock * kBlock);
  const T* keys = qkv + (s.num_heads + kv_head) * e;
  const T* values = keys + s.num_kv_heads * e;
  scratch.rewind();
  U* keys_t = scratch.take<U>(int64_t(units) * rounded);
  U* values_p = scratch.take<U>(int64_t(rounded) / kValues * padded);
  T* rows = scratch.take<T>(kBlock * padded);
  T* probabilities = scratch.take<T>(kBlock * kBlock);
  float* scores = scratch.take<float>(kBlock * kBlock);
  float* sums = scratch.take<float>(kBlock * padded);
  float* maxima = scratch.take<float>(kBlock);
  float* totals = scratch.take<float>(kBlock);
  for (int j = 0; j < rounded; j += kBlock) {
    const int count = std::min<int64_t>(kBlock, length - j);
    copy_rows(keys + j * s.row(), s.row(), count, e, rows, kBlock, padded);
    transpose((const U*)rows, units, kBlock, units, keys_t + j, rounded);
    copy_rows(values + j * s.row(), s.row(), count, e, rows, kBlock, padded);
    interleave(rows, kBlock, padded, values_p + int64_t(j) / kValues * padded);
  }
  memset((void*)probabilities, 0, kBlock * kBlock * sizeof(T));

  for (int64_t head = kv_head * s.group(); head < (kv_head + 1) * s.group(); head++)
    for (int i = 0; i < length; i += kBlock) {
      const int count = std::min<int64_t>(kBlock, length - i), even = (count + 15) / 16 * 16;
      copy_rows(qkv + i * s.row() + head * e, s.row(), count, e, rows, even, padded);
      std::fill(maxima, maxima + kBlock, kNever);
      std::fill(totals, totals + kBlock, 0.0f);
      std::fill(sums, sums + kBlock * padded, 0.0f);
      const int64_t oldest = std::max<int64_t>(0, i - s.window + 1);
      for (int j = int(oldest / kBlock * kBlock); j <= i; j += kBlock) {
        const int width = j == i ? even : kBlock;
        for (int m = 0; m < even; m += 8)  // only up to the diagonal
          multiply<T>(8, j == i ? m / 16 * 16 + 16 : kBlock, units, (const U*)rows + m * units, units,
                      keys_t + j, rounded, scores + m * kBlock, kBlock, false);
        for (int r = 0; r < count; r++) {
          const int last = std::min(width, i + r - j + 1);
          const int first = int(std::max<int64_t>(0, i + r - s.window + 1 - j));
          float* row = scores + r * kBlock;
          T* p = probabilities + r * kBlock;
          const int edge = j == i ? r / 16 * 16 + 16 : kBlock;
          const Floats from = splat(float(first)), to = splat(float(last));
          Floats highest = splat(maxima[r]);
          for (int c = 0; c < edge; c += LANES) {
            const Floats at = lane_numbers() + float(c);
            Floats x = read(row + c) * s.scale;
            x = at >= from ? x : splat(kNever);
            x = at < to ? x : splat(kNever);
            write(row + c, x);
            highest = max(highest, x);
          }
          const float maximum = max_lanes(highest);
          Floats total{};
          for (int c = 0; c < edge; c += LANES) {
            const Floats value = exp(read(row + c) - maximum);
            total += value;
            write(p + c, value);
          }
          for (int c = edge; c < width; c += LANES) write(p + c, Floats{});
          if (maximum != maxima[r]) {
            const float shrink = totals[r] > 0 ? expf(maxima[r] - maximum) : 1.0f;
            totals[r] *= shrink;
            if (shrink != 1.0f)
              for (int c = 0; c < padded; c += LANES)
                write(sums + r * padded + c, read(sums + r * padded + c) * shrink);
            maxima[r] = maximum;
          }
          totals[r] += add_up(total);
        }
        for (int m = 0; m < even; m += 8)
          multiply<T>(8, padded, (j == i ? m + 8 : kBlock) / kValues,
                      (const U*)(probabilities + m * kBlock), kBlock / kValues,
                      values_p + int64_t(j) / kValues * padded, padded, sums + m * padded, padded,
                      true);
      }
      for (int r = 0; r < count; r++) {
        const float inverse = 1.0f / totals[r];
        T* to = out + ((i + r) * s.num_heads + head) * e;
        lanes(e, [&](int64_t c, auto width) {
          give(to + c, read(sums + r * padded + c) * inverse, width);
        });
        log_sums[(i + r) * s.num_heads + head] = maxima[r] + logf(totals[r]);
      }
    }
}

inline size_t backward_scratch(const AttentionShape& s, int64_t longest) {
  const size_t length = (longest + kBlock - 1) / kBlock * kBlock;
  return 4 * (5 * length * s.padded + kBlock * (7 * s.padded + 6 * kBlock + 2)) + 64 * 24;
}

template <class T>
void attend_backward(const AttentionShape& s, const T* qkv, const T* out, const float* log_sums,
                     const T* d_out, int64_t length, int64_t kv_head, T* d_qkv, Scratch& scratch) {
  typedef typename Unit<T>::type U;
  constexpr int kValues = Unit<T>::kValues;
  const int e = int(s.head_size), padded = s.padded, units = padded / kValues;
  const int rounded = int((length + kBlock - 1) / kBlock * kBlock);
  const int64_t key_at = (s.num_heads + kv_head) * e, value_at = key_at + s.num_kv_heads * e;
  const int64_t out_row = s.num_heads * e;
  scratch.rewind();
  T* keys = scratch.take<T>(int64_t(rounded) * padded);
  U* keys_p = scratch.take<U>(int64_t(rounded) / kValues * padded);
  T* values = scratch.take<T>(int64_t(rounded) * padded);
  float* d_keys = scratch.take<float>(int64_t(rounded) * padded);
  float* d_values = scratch.take<float>(int64_t(rounded) * padded);
  T* rows = scratch.take<T>(kBlock * padded);
  U* queries_t = scratch.take<U>(kBlock * units);
  U* queries_p = scratch.take<U>(kBlock / kValues * padded);
  U* d_out_t = scratch.take<U>(kBlock * units);
  U* d_out_p = scratch.take<U>(kBlock / kValues * padded);
  float* scores = scratch.take<float>(kBlock * kBlock);
  float* d_scores = scratch.take<float>(kBlock * kBlock);
  T* p_t = scratch.take<T>(kBlock * kBlock);
  T* ds_t = scratch.take<T>(kBlock * kBlock);
  U* ds_p = scratch.take<U>(kBlock / kValues * kBlock);
  U* ds = scratch.take<U>(kBlock * kBlock / kValues);
  float* d_queries = scratch.take<float>(kBlock * padded);
  float* sums = scratch.take<float>(kBlock);
  float* means = scratch.take<float>(kBlock);
  copy_rows(qkv + key_at, s.row(), int(length), e, keys, rounded, padded);
  copy_rows(qkv + value_at, s.row(), int(length), e, values, rounded, padded);
  interleave(keys, rounded, padded, keys_p);
  std::fill(d_keys, d_keys + int64_t(rounded) * padded, 0.0f);
  std::fill(d_values, d_values + int64_t(rounded) * padded, 0.0f);

  for (int64_t head = kv_head * s.group(); head < (kv_head + 1) * s.group(); head++)
    for (int i = 0; i < length; i += kBlock) {
      const int count = std::min<int64_t>(kBlock, length - i), even = (count + 15) / 16 * 16;
      copy_rows(qkv + i * s.row() + head * e, s.row(), count, e, rows, even, padded);
      transpose((const U*)rows, units, even, units, queries_t, kBlock);
      interleave(rows, even, padded, queries_p);
      const T* gradient = d_out + i * out_row + head * e;
      copy_rows(gradient, out_row, count, e, rows, even, padded);
      transpose((const U*)rows, units, even, units, d_out_t, kBlock);
      interleave(rows, even, padded, d_out_p);
      for (int r = 0; r < even; r++) {
        Floats mean{};
        const T *o = out + (i + r) * out_row + head * e, *g = gradient + r * out_row;
        if (r < count)
          lanes(e, [&](int64_t c, auto width) {
            mean = fma(take(o + c, width), take(g + c, width), mean);
          });
        means[r] = add_up(mean);
        // Rows past the end are zeros: their probability meets nothing but zeros.
        sums[r] = r < count ? log_sums[(i + r) * s.num_heads + head] : 0.0f;
      }
      std::fill(d_queries, d_queries + kBlock * padded, 0.0f);
      const int64_t oldest = std::max<int64_t>(0, i - s.window + 1);
      for (int j = int(oldest / kBlock * kBlock); j <= i; j += kBlock) {
        const int height = j == i ? even : kBlock;  // keys of the block; its columns are queries
        const int pairs = even / kValues;
        for (int m = 0; m < height; m += 8) {  // keys m .. m + 7, seen by queries from `first` on
          const int first = j == i ? m / 16 * 16 : 0, columns = even - first;
          multiply<T>(8, columns, units, (const U*)(keys + int64_t(j + m) * padded), units,
                      queries_t + first, kBlock, scores + m * kBlock + first, kBlock, false);
          multiply<T>(8, columns, units, (const U*)(values + int64_t(j + m) * padded), units,
                      d_out_t + first, kBlock, d_scores + m * kBlock + first, kBlock, false);
          for (int r = m; r < m + 8; r++) {
            const Floats from = splat(float(j + r - i)), to = splat(float(j + r - i + s.window));
            T *p = p_t + r * even, *d_row = ds_t + r * even;
            for (int c = 0; c < first; c += LANES) write(d_row + c, Floats{});
            for (int c = first; c < even; c += LANES) {
              const Floats at = lane_numbers() + float(c), score = read(scores + r * kBlock + c);
              Floats value = exp(score * s.scale - read(sums + c));
              value = at >= from ? value : Floats{};
              value = at < to ? value : Floats{};
              const Floats d_score = read(d_scores + r * kBlock + c) - read(means + c);
              write(p + c, value);
              write(d_row + c, value * d_score * s.scale);
            }
          }
          const int skip = first / kValues;
          multiply<T>(8, padded, pairs - skip, (const U*)(p_t + m * even) + skip, pairs,
                      d_out_p + skip * padded, padded, d_values + int64_t(j + m) * padded, padded,
                      true);
          multiply<T>(8, padded, pairs - skip, (const U*)(ds_t + m * even) + skip, pairs,
                      queries_p + skip * padded, padded, d_keys + int64_t(j + m) * padded, padded,
                      true);
        }
        const int key_pairs = height / kValues;
        interleave(ds_t, height, even, ds_p);
        transpose(ds_p, even, key_pairs, even, ds, key_pairs);
        multiply<T>(even, padded, key_pairs, ds, key_pairs, keys_p + int64_t(j) / kValues * padded,
                    padded, d_queries, padded, true);
      }
      for (int r = 0; r < count; r++) {
        T* to = d_qkv + (i + r) * s.row() + head * e;
        lanes(e, [&](int64_t c, auto width) {
          give(to + c, read(d_queries + r * padded + c), width);
        });
      }
    }
  for (int64_t r = 0; r < length; r++) {
    T *to_key = d_qkv + r * s.row() + key_at, *to_value = d_qkv + r * s.row() + value_at;
    lanes(e, [&](int64_t c, auto width) {
      give(to_key + c, read(d_keys + r * padded + c), width);
      give(to_value + c, read(d_values + r * padded + c), width);
    });
  }
}

}  // namespace phi
