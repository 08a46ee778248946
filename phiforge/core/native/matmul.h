// y = x W^T with W packed in panels of 64 outputs, in fp32, bf16, int8 or int4.
// `pack` makes the panels; `multiply` gives one panel's outputs for a few rows of x.
// Every output is one sum, sequential over the inputs in its own lane: it depends neither on the
// number of rows nor on tiles or threads. (int4: one sum per 32 inputs, then scaled and added.)
//
// Two families. With bf16 pair products (AVX512_BF16) a panel holds pairs of inputs, 64 outputs
// side by side, and weights of every format become bf16 exactly (int8 and int4 as integers).
// Elsewhere a panel holds single inputs, weights become fp32, and activations stay in fp32.

#pragma once

#include <type_traits>

#include "common.h"

namespace phi {

enum Format : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr long PANEL = 64;       // outputs side by side
constexpr long GROUP = 32;       // inputs that share an int4 scale; inputs are padded to this
constexpr long MAX_ROWS = 96;    // rows of x that `multiply` takes at once
constexpr long STRETCH = 128;    // inputs worked on before the next rows: 16 KB of bf16, in L1

#ifdef PHI_DOT_PAIRS
typedef uint16_t Half;  // activations of bf16 models
#else
typedef float Half;
#endif

// A packed matrix. Outputs and inputs are padded to whole panels and groups, with zeros.
struct Matrix {
  const uint8_t* panels;
  const float* scales;  // int8: one per output; else unused
  int64_t num_outputs, num_inputs, format;

  long num_panels() const { return ceil_div(num_outputs, PANEL); }
  long padded_inputs() const { return round_up(num_inputs, GROUP); }
  inline long panel_bytes() const;
};

// ---- Loading weights ------------------------------------------------------------------------
// A loader turns the packed weights of one step (an input, or a pair) into vectors to multiply by.

#ifdef PHI_DOT_PAIRS
typedef __m512bh Vector;

PHI_INLINE f32x16 multiply_add(Vector w, Vector x, f32x16 sum) {
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, w, x);
}
PHI_INLINE Vector broadcast(const uint16_t* pair) {
  return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(pair));
}

struct LoadBf16 {
  static constexpr bool GROUPED = false;
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, Vector* w) const {
    PHI_UNROLL for (int v = 0; v < V; v++) w[v] = (__m512bh)_mm512_loadu_si512(at + 64 * v);
  }
};

// bf16 of 0 .. 127, low bytes then high bytes: int8 weights are stored as sign and magnitude.
struct MagnitudeTable {
  alignas(64) uint8_t low[128], high[128];
  constexpr MagnitudeTable() : low(), high() {
    for (int m = 1; m < 128; m++) {
      int exponent = 0;
      while ((m >> exponent) > 1) exponent++;
      int bits = ((127 + exponent) << 7) | ((m << (7 - exponent)) & 0x7f);
      low[m] = (uint8_t)(bits & 0xff);
      high[m] = (uint8_t)(bits >> 8);
    }
  }
};
constexpr MagnitudeTable MAGNITUDES;

struct LoadInt8 {
  static constexpr bool GROUPED = false;
  __m512i low[2], high[2], sign;
  LoadInt8() {
    for (int i = 0; i < 2; i++) {
      low[i] = _mm512_load_si512(MAGNITUDES.low + 64 * i);
      high[i] = _mm512_load_si512(MAGNITUDES.high + 64 * i);
    }
    sign = _mm512_set1_epi8((char)0x80);
  }
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, Vector* w) const {
    static_assert(V % 2 == 0, "two vectors share 64 bytes");
    PHI_UNROLL for (int v = 0; v < V; v += 2) {
      __m512i q = _mm512_loadu_si512(at + 32 * v);
      __m512i l = _mm512_permutex2var_epi8(low[0], q, low[1]);
      __m512i h = _mm512_permutex2var_epi8(high[0], q, high[1]);
      h = _mm512_ternarylogic_epi32(h, q, sign, 0xf8);  // h | (q & sign)
      w[v] = (__m512bh)_mm512_unpacklo_epi8(l, h);
      w[v + 1] = (__m512bh)_mm512_unpackhi_epi8(l, h);
    }
  }
};

struct NibbleTable {  // bf16 of -8 .. 7, twice: the lookup reads five bits
  alignas(64) uint16_t values[32];
  constexpr NibbleTable() : values() {
    for (int i = 0; i < 32; i++) {
      int value = (i & 15) - 8, magnitude = value < 0 ? -value : value, exponent = 0;
      if (!magnitude) continue;
      while ((magnitude >> exponent) > 1) exponent++;
      int bits = ((127 + exponent) << 7) | ((magnitude << (7 - exponent)) & 0x7f);
      values[i] = (uint16_t)(bits | (value < 0 ? 0x8000 : 0));
    }
  }
};
constexpr NibbleTable NIBBLES;

struct LoadInt4 {
  static constexpr bool GROUPED = true;
  __m512i table = _mm512_load_si512(NIBBLES.values);
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, Vector* w) const {
    static_assert(V == 4, "a word holds the weights of four vectors");
    __m512i q = _mm512_loadu_si512(at);
    w[0] = (__m512bh)_mm512_permutexvar_epi16(q, table);
    w[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), table);
    w[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(q, 8), table);
    w[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(q, 12), table);
  }
};

template <class Loader>  // of a converted stretch
using LoadWork =
    typename std::conditional<std::is_same<Loader, struct Load1Fp32>::value, Loader, LoadBf16>::type;
#endif  // PHI_DOT_PAIRS

// Single inputs, weights as fp32; names carry a 1.
#ifdef PHI_AVX512
constexpr int TILE_ROWS_1 = 6, TILE_VECTORS_1 = 4;
#else
constexpr int TILE_ROWS_1 = 2, TILE_VECTORS_1 = 2;
#endif

PHI_INLINE f32x16 multiply_add(f32x16 w, f32x16 x, f32x16 sum) { return fma(w, x, sum); }
PHI_INLINE f32x16 broadcast(const float* value) { return splat(*value); }

struct Load1Fp32 {
  static constexpr bool GROUPED = false;
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, f32x16* w) const {
    PHI_UNROLL for (int v = 0; v < V; v++) w[v] = load_as<f32x16>(at + 64 * v);
  }
};
struct Load1Bf16 {
  static constexpr bool GROUPED = false;
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, f32x16* w) const {
    PHI_UNROLL for (int v = 0; v < V; v++) w[v] = load_bf16((const uint16_t*)(at + 32 * v));
  }
};
struct Load1Int8 {
  static constexpr bool GROUPED = false;
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, f32x16* w) const {
    PHI_UNROLL for (int v = 0; v < V; v++)
      w[v] = __builtin_convertvector(
          __builtin_convertvector(load_as<i8x16>(at + 16 * v), i32x16), f32x16);
  }
};
// A byte holds output o of the panel's first half (low nibble) and of its second half.
struct Load1Int4 {
  static constexpr bool GROUPED = true;
  template <int V>
  PHI_INLINE void operator()(const uint8_t* at, f32x16* w) const {
    static_assert(V == 4, "a byte holds weights of two halves");
    typedef uint8_t u8x16 __attribute__((vector_size(16)));
    PHI_UNROLL for (int v = 0; v < 2; v++) {
      i32x16 q = __builtin_convertvector(load_as<u8x16>(at + 16 * v), i32x16);
      w[v] = __builtin_convertvector((q & 15) - 8, f32x16);
      w[v + 2] = __builtin_convertvector((q >> 4) - 8, f32x16);
    }
  }
};

#ifndef PHI_DOT_PAIRS
typedef f32x16 Vector;
template <class Loader>
using LoadWork = Load1Fp32;
typedef Load1Bf16 LoadBf16;
typedef Load1Int8 LoadInt8;
typedef Load1Int4 LoadInt4;
#endif

// How activations of a type are multiplied.
template <class Act>
struct Kernel;
template <>
struct Kernel<float> {
  static constexpr int ROWS = TILE_ROWS_1, VECTORS = TILE_VECTORS_1;
  static constexpr long STEP = 1;
  typedef f32x16 Vector;
};
#ifdef PHI_DOT_PAIRS
template <>
struct Kernel<uint16_t> {
  static constexpr int ROWS = 6, VECTORS = 4;
  static constexpr long STEP = 2;
  typedef __m512bh Vector;
};
#endif

// Bytes of one step's weights in a panel.
inline long step_bytes(int64_t format, long step) {
  const long per_input[] = {PANEL * 4, PANEL * 2, PANEL, PANEL / 2};
  return per_input[format] * step;
}
constexpr long GROUP_SCALE_BYTES = PANEL * 2;  // int4: bf16 scales follow each group's weights

inline long Matrix::panel_bytes() const {
  long bytes = step_bytes(format, 1) * padded_inputs();
  return format == INT4 ? bytes + padded_inputs() / GROUP * GROUP_SCALE_BYTES : bytes;
}

// ---- The inner loops ------------------------------------------------------------------------

// Lines of memory to fetch while multiplying: `lines` per step from `from` on.
struct Ahead {
  const uint8_t* from = nullptr;
  long lines = 0;

  PHI_INLINE void fetch() {
    for (long line = 0; line < lines; line++) __builtin_prefetch(from + 64 * line, 0, 2);
    from += 64 * lines;
  }
};

// The weights of one call: `groups` groups of `steps` steps, `stride` bytes a step. int4: after
// each group sums are scaled by 64 bf16 numbers; w and scales advance by their group strides.
struct Strip {
  const uint8_t* w;
  long stride, steps;
  long groups = 1, group_stride = 0;
  const uint8_t* scales = nullptr;
  long scale_stride = 0;
};

// sums[R][16 V] += x[R][steps] w[steps][16 V]; `fresh` starts from zero.
template <int R, int V, class Act, class Loader>
PHI_INLINE void tile(const Loader& weights, const Act* x, long x_stride, Strip strip, float* sums,
                     long sums_stride, bool fresh, Ahead ahead) {
  typedef typename Kernel<Act>::Vector Vec;
  constexpr long STEP = Kernel<Act>::STEP;
  f32x16 sum[R][V];
  const uint8_t* w = strip.w;
  for (long group = 0; group < strip.groups; group++) {
    PHI_UNROLL for (int r = 0; r < R; r++)
      PHI_UNROLL for (int v = 0; v < V; v++)
        sum[r][v] = Loader::GROUPED || fresh ? f32x16{} : load(sums + r * sums_stride + LANES * v);
    for (long step = 0; step < strip.steps; step++) {
      Vec vectors[V];
      weights.template operator()<V>(w, vectors);
      w += strip.stride;
      ahead.fetch();
      PHI_UNROLL for (int r = 0; r < R; r++) {
        Vec value = broadcast(x + r * x_stride);
        PHI_UNROLL for (int v = 0; v < V; v++)
          sum[r][v] = multiply_add(vectors[v], value, sum[r][v]);
      }
      x += STEP;
    }
    w += strip.group_stride;
    PHI_UNROLL for (int r = 0; r < R; r++)
      PHI_UNROLL for (int v = 0; v < V; v++) {
        float* at = sums + r * sums_stride + LANES * v;
        if constexpr (Loader::GROUPED) {
          f32x16 scale = load_bf16((const uint16_t*)strip.scales + LANES * v);
          f32x16 before = fresh && group == 0 ? f32x16{} : load(at);
          sum[r][v] = fma(sum[r][v], scale, before);
        }
        store(at, sum[r][v]);
      }
    strip.scales += strip.scale_stride;
  }
}

template <int V, class Act, class Loader>
void tile_of(long rows, const Loader& weights, const Act* x, long x_stride, const Strip& strip,
             float* sums, long sums_stride, bool fresh, Ahead ahead = {}) {
#define PHI_TILE(R) \
  case R:           \
    return tile<R, V>(weights, x, x_stride, strip, sums, sums_stride, fresh, ahead);
  switch (rows) {
    PHI_TILE(1)
    PHI_TILE(2)
    default:
      if constexpr (Kernel<Act>::ROWS == 6) {
        switch (rows) {
          PHI_TILE(3)
          PHI_TILE(4)
          PHI_TILE(5)
          PHI_TILE(6)
        }
      }
  }
#undef PHI_TILE
}

// Calls use(first_row, num_rows) for tiles of nearly equal height.
template <class Act, class Use>
PHI_INLINE void each_tile(long rows, Use use) {
  long first = 0;
  for (long left = ceil_div(rows, Kernel<Act>::ROWS); left > 0; left--) {
    long height = ceil_div(rows - first, left);
    use(first, height);
    first += height;
  }
}

// All rows, `vectors` x 16 outputs, in strips as wide as registers allow.
template <class Act, class Loader>
void rows_of(const Loader& weights, long rows, int vectors, const Act* x, long x_stride,
             const Strip& whole, long bytes_per_vector, float* sums, long sums_stride, bool fresh,
             Ahead ahead = {}) {  // the first strip of the first rows fetches for all
  each_tile<Act>(rows, [&](long first, long height) {
    const Act* from = x + first * x_stride;
    float* to = sums + first * sums_stride;
    for (int v = 0; v < vectors;) {
      Strip strip = whole;
      strip.w += v * bytes_per_vector;
      if (strip.scales) strip.scales += v * LANES * sizeof(uint16_t);
      const int width = std::min(vectors - v, Kernel<Act>::VECTORS);
#define PHI_STRIP(V)                                                                           \
  case V:                                                                                      \
    tile_of<V>(height, weights, from, x_stride, strip, to + LANES * v, sums_stride, fresh,     \
               ahead);                                                                         \
    break;
      switch (width) {
        PHI_STRIP(1)
        PHI_STRIP(2)
        default:
          if constexpr (Kernel<Act>::VECTORS == 4) {
            switch (width) {
              PHI_STRIP(3)
              PHI_STRIP(4)
            }
          }
      }
#undef PHI_STRIP
      ahead.lines = 0;
      v += width;
    }
  });
}

// ---- One panel ------------------------------------------------------------------------------

// What a thread needs besides: a panel's converted stretch, and the sums of one item.
struct MatmulScratch {
  alignas(64) uint8_t converted[STRETCH * PANEL * 4];
  alignas(64) float sums[MAX_ROWS * PANEL];
};

// A stretch's weights as the loader of converted weights reads them, 256 bytes a step.
template <class Vector, class Loader>
Strip convert(const Loader& loader, const Strip& strip, uint8_t* out) {
  Strip made = strip;
  made.w = out;
  made.stride = 4 * 64;
  made.group_stride = 0;
  const uint8_t* w = strip.w;
  for (long group = 0; group < strip.groups; group++, w += strip.group_stride)
    for (long step = 0; step < strip.steps; step++, w += strip.stride, out += 4 * 64) {
      Vector vectors[4];
      loader.template operator()<4>(w, vectors);
      for (int v = 0; v < 4; v++) store_as(out + 64 * v, vectors[v]);
    }
  return made;
}

// All tiles over one stretch; together they fetch the next stretch on the way.
template <class Act, class Loader>
PHI_INLINE void stretch(const Loader& loader, long rows, const Act* x, long x_stride,
                        const Strip& strip, float* sums, bool fresh, const uint8_t* next,
                        long next_bytes) {
  if constexpr (Kernel<Act>::VECTORS == 4) {
    const long tiles = ceil_div(rows, Kernel<Act>::ROWS), steps = strip.steps * strip.groups;
    const long lines = ceil_div(ceil_div(next_bytes, 64 * steps), tiles);
    long fetched = 0;
    each_tile<Act>(rows, [&](long first, long height) {
      Ahead ahead{next + fetched, fetched < next_bytes ? lines : 0};
      fetched += 64 * lines * steps;
      tile_of<4>(height, loader, x + first * x_stride, x_stride, strip, sums + first * PANEL,
                 PANEL, fresh, ahead);
    });
  } else {
    rows_of(loader, rows, 4, x, x_stride, strip, strip.stride / 4, sums, PANEL, fresh);
  }
}

// The loader of converted weights, with the scaling of the format they come from.
template <class Loader>
struct Converted : LoadWork<Loader> {
  static constexpr bool GROUPED = Loader::GROUPED;
};

// Weights that need converting are converted in registers for up to so many rows, else into L1
// first: the same values, multiplied in the same order.
template <class Act>
constexpr long DIRECT_ROWS = Kernel<Act>::ROWS == 6 ? 24 : 2;

// Bytes between a streamed weight's fetch and its use, by format; measured on Zen 4, where each
// of them reads at the memory's speed with one row.
constexpr long FETCH_AHEAD[] = {1024, 1024, 512, 4096};

template <class Act, class Loader>
void multiply_as(const Matrix& m, long panel, long next_panel, long rows, const Act* x,
                 long x_stride, MatmulScratch& scratch) {
  constexpr long STEP = Kernel<Act>::STEP;
  constexpr bool plain = std::is_base_of<LoadWork<Loader>, Loader>::value;
  constexpr bool can_be_direct = Kernel<Act>::VECTORS == 4 || !Loader::GROUPED;
  const bool direct = plain || (can_be_direct && rows <= DIRECT_ROWS<Act>);
  const Loader loader;
  const Converted<Loader> converted;
  const long inputs = m.padded_inputs(), per_input = step_bytes(m.format, 1);
  const uint8_t* next_start = m.panels + next_panel * m.panel_bytes();
  Strip strip;
  strip.w = m.panels + panel * m.panel_bytes();
  strip.stride = per_input * STEP;
  // One tile only streams: it fetches weights just ahead of itself. More than one fetch the next
  // stretch together, while they work on this one in L1.
  const bool streams = direct && rows <= Kernel<Act>::ROWS;
  for (long k = 0; k < inputs; k += STRETCH) {
    const long count = std::min(STRETCH, inputs - k);
    strip.steps = count / STEP;
    long bytes = count * per_input;
    if (Loader::GROUPED) {
      strip.steps = GROUP / STEP;
      strip.groups = count / GROUP;
      strip.group_stride = GROUP_SCALE_BYTES;
      strip.scales = strip.w + GROUP * per_input;
      strip.scale_stride = GROUP * per_input + GROUP_SCALE_BYTES;
      bytes += strip.groups * GROUP_SCALE_BYTES;
    }
    const uint8_t* next = k + count < inputs ? strip.w + bytes : next_start;
    if (streams) next = strip.w + FETCH_AHEAD[m.format];
    if constexpr (can_be_direct) {
      if (direct)
        stretch(loader, rows, x + k, x_stride, strip, scratch.sums, k == 0, next, bytes);
    }
    if (!direct) {
      typedef typename Kernel<Act>::Vector Vec;
      const Strip ready = convert<Vec>(loader, strip, scratch.converted);
      stretch(converted, rows, x + k, x_stride, ready, scratch.sums, k == 0, next, bytes);
    }
    strip.w += bytes;
  }
  if (streams)
    for (long at = 0; at < FETCH_AHEAD[m.format]; at += 64)
      __builtin_prefetch(next_start + at, 0, 2);
  if (m.format == INT8)
    for (long r = 0; r < rows; r++)
      for (int v = 0; v < 4; v++) {
        float* sum = scratch.sums + r * PANEL + LANES * v;
        store(sum, load(sum) * load(m.scales + panel * PANEL + LANES * v));
      }
}

// scratch.sums[r][64] = x[r] . the panel's 64 outputs, for at most MAX_ROWS rows; the beginning of
// `next_panel` is fetched on the way.
template <class Act>
void multiply(const Matrix& m, long panel, long next_panel, long rows, const Act* x, long x_stride,
              MatmulScratch& scratch) {
  if constexpr (std::is_same<Act, Half>::value) {
    if (m.format == BF16)
      return multiply_as<Act, LoadBf16>(m, panel, next_panel, rows, x, x_stride, scratch);
    if (m.format == INT8)
      return multiply_as<Act, LoadInt8>(m, panel, next_panel, rows, x, x_stride, scratch);
    if (m.format == INT4)
      return multiply_as<Act, LoadInt4>(m, panel, next_panel, rows, x, x_stride, scratch);
  }
  if constexpr (std::is_same<Act, float>::value)
    multiply_as<Act, Load1Fp32>(m, panel, next_panel, rows, x, x_stride, scratch);
}

// y = x W^T as items of a phase: finish(first_row, rows, panel, sums[rows][64]).
template <class Act, class Finish>
void matmul(Team& team, int threads, const Matrix& m, long rows, const Act* x, long x_stride,
            MatmulScratch& scratch, Finish finish) {
  const long panels = m.num_panels();
  long cuts = ceil_div(rows, MAX_ROWS);
  // Few panels for many threads: cut the rows too, while a piece keeps whole tiles.
  while (panels * cuts < 4 * threads && rows / (cuts + 1) >= 2 * Kernel<Act>::ROWS) cuts++;
  const long piece = ceil_div(rows, cuts);
  team.each(panels * cuts, [&](long item, long next) {
    const long panel = item / cuts, first = item % cuts * piece;
    const long count = std::min(piece, rows - first);
    if (count <= 0) return;
    multiply(m, panel, std::min(next / cuts, panels - 1), count, x + first * x_stride, x_stride,
             scratch);
    finish(first, count, panel, scratch.sums);
  });
}

}  // namespace phi
