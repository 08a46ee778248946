// Grouped-query attention over a paged cache, and writing to it.
// A block holds 64 tokens; of one layer and key head it is keys, transposed so that a vector runs
// over tokens, then values: both have the shape of a matmul panel and use its inner loops.
// Softmax goes block by block at absolute positions: a token's numbers do not depend on how its
// row was cut into passes, on the other rows, or on where the blocks lie.

#pragma once

#include "matmul.h"

namespace phi {

constexpr long BLOCK = 64;           // tokens
constexpr long TILE_QUERIES = 24;    // query rows that share the loads of one block
constexpr long CACHE_AHEAD = 1024;   // bytes between a fetch and its use

struct Heads {
  long num_heads, num_kv_heads, size, window;  // window 0: full attention
  long rotary_half;

  long padded() const { return round_up(size, LANES); }
  long group() const { return num_heads / num_kv_heads; }
  long tile_tokens() const { return std::max(1L, TILE_QUERIES / group()); }
  long tile_rows() const { return tile_tokens() * group(); }
};

template <class Act, class Kv>
struct CacheLoader;
template <>
struct CacheLoader<float, float> : Load1Fp32 {};
template <>
struct CacheLoader<float, uint16_t> : Load1Bf16 {};
#ifdef PHI_DOT_PAIRS
template <>
struct CacheLoader<uint16_t, uint16_t> : LoadBf16 {};
#endif

// One block of one layer and key head: keys [e/step][64][step], values [64/step][e][step].
template <class Act, class Kv>
struct HeadBlock {
  static constexpr long STEP = Kernel<Act>::STEP;
  Kv* keys;
  long e;  // padded head size

  static long elements(long e) { return 2 * BLOCK * e; }
  Kv* values() const { return keys + BLOCK * e; }

  // Fetches what reading begins with, and the places of one token, which lie far apart.
  void fetch() const {
    for (long at = 0; at < CACHE_AHEAD; at += 64) __builtin_prefetch((const char*)keys + at, 0, 3);
  }
  void fetch(long slot) const {
    for (long i = 0; i < e; i += STEP) __builtin_prefetch(keys + i * BLOCK + slot * STEP, 1, 3);
    const Kv* row = values() + slot / STEP * e * STEP;
    for (long i = 0; i < e * STEP; i += 64 / sizeof(Kv)) __builtin_prefetch(row + i, 1, 3);
  }

  // Key and value of one token, both of e floats (what pads a head is zero). `last`: no later token
  // of the row is written now; the place paired with this one is then cleared, for reading
  // multiplies it by zero, and what another row left there might not be finite.
  void write(long slot, const float* key, const float* value, bool last) const {
    Kv* column = keys + slot * STEP;
    Kv* row = values() + slot / STEP * e * STEP + slot % STEP;
    for (long i = 0; i < e; i += LANES) {
      Kv key_part[LANES];
      phi::write(key_part, load(key + i));
      for (long j = 0; j < LANES; j += STEP)
        std::memcpy(column + (i + j) / STEP * BLOCK * STEP, key_part + j, STEP * sizeof(Kv));
      write_value(row + i * STEP, load(value + i), last && slot % STEP == 0);
    }
  }

 private:
  // Every other number only, if not told to clear: the token beside this one may be another
  // thread's.
  static PHI_INLINE void write_value(Kv* to, f32x16 value, bool clear) {
    if constexpr (STEP == 1) phi::write(to, value);
#ifdef PHI_DOT_PAIRS
    if constexpr (STEP == 2) {
      u16x16 narrow;
      phi::write((uint16_t*)&narrow, value);
      const u32x16 spread = __builtin_convertvector(narrow, u32x16);
      _mm512_mask_storeu_epi16(to, clear ? 0xffffffffu : 0x55555555u, (__m512i)spread);
    }
#endif
  }
};

// Turns pairs (i, i + half) by their angle (half-split RoPE); the rest of the head stays.
inline void rope(const float* __restrict x, long size, long half, const float* __restrict cos,
                 const float* __restrict sin, float* __restrict out) {
  for (long i = 0; i < half; i++) {
    out[i] = x[i] * cos[i] - x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
  for (long i = 2 * half; i < size; i++) out[i] = x[i];
}

template <class Act>
struct AttentionScratch {
  Buffer<Act> queries, weights;
  Buffer<float> scores, sums;
  Buffer<float> head, value;  // one head, what pads it zero
  std::vector<float> maxima, totals;

  void fit(const Heads& heads) {
    const long rows = heads.tile_rows(), e = heads.padded();
    queries.need(rows * e);
    weights.need(rows * BLOCK);
    scores.need(rows * BLOCK);
    sums.need(rows * e);
    std::fill_n(head.need(e), e, 0.0f);
    std::fill_n(value.need(e), e, 0.0f);
    maxima.resize(rows);
    totals.resize(rows);
  }
};

// Scores of one query over a block to weights exp(score - maximum), and the row's running sums
// brought to the new maximum. Slots outside first .. last get exact zeros.
template <class Act>
PHI_INLINE void soften(const float* scores, int vectors, long first, long last, float scale,
                       Act* weights, float& maximum, float& total, float* sums, long e) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 nothing = splat(-INFINITY);
  f32x16 scaled[BLOCK / LANES], highest = nothing;
  for (int v = 0; v < vectors; v++) {
    i32x16 slot = lane + (int)(LANES * v);
    i32x16 visible = (slot >= (int)first) & (slot <= (int)last);
    scaled[v] = visible ? load(scores + LANES * v) * scale : nothing;
    highest = max(scaled[v], highest);
  }
  const float before = maximum;
  maximum = std::max(before, max_lanes(highest));
  f32x16 added = {};
  for (int v = 0; v < vectors; v++) {
    write(weights + LANES * v, exp(scaled[v] - maximum));
    added += read(weights + LANES * v);  // as rounded: weights sum to one
  }
  if (before == maximum) {
    total += sum_lanes(added);
    return;
  }
  const f32x16 fade = exp(splat(before - maximum));
  total = total * fade[0] + sum_lanes(added);
  for (long i = 0; i < e; i += LANES) store(sums + i, load(sums + i) * fade);
}

// Lines to fetch while a block is read row by row.
PHI_INLINE Ahead ahead(const Strip& strip) {
  return {strip.w + CACHE_AHEAD, ceil_div(strip.stride, 64)};
}

// Queries of consecutive tokens (from `position`) against one key head's blocks; block(j) gives
// the j-th. The queries are in scratch.queries [token][group][e]; write(row, sums, 1 / total).
template <class Act, class Kv, class Blocks, class Write>
void attend(const Heads& heads, long position, long tokens, AttentionScratch<Act>& scratch,
            Blocks block, Write write) {
  constexpr long STEP = Kernel<Act>::STEP;
  const CacheLoader<Act, Kv> loader;
  const long e = heads.padded(), group = heads.group(), rows = tokens * group;
  const long window = heads.window ? heads.window : position + tokens;
  const long last_position = position + tokens - 1;
  const float scale = 1.0f / std::sqrt((float)heads.size);
  const long key_stride = BLOCK * STEP * sizeof(Kv), value_stride = e * STEP * sizeof(Kv);
  const long vector_bytes = LANES * STEP * sizeof(Kv);
  float *scores = scratch.scores.get(), *sums = scratch.sums.get();
  std::fill_n(scratch.maxima.begin(), rows, -INFINITY);
  std::fill_n(scratch.totals.begin(), rows, 0.0f);
  std::fill_n(sums, rows * e, 0.0f);
  for (long j = std::max(0L, position - window + 1) / BLOCK; j <= last_position / BLOCK; j++) {
    // Tokens that see any of this block are consecutive: the others' sums must not be touched.
    const long start = j * BLOCK;
    const long t0 = std::max(0L, start - position);
    const long t1 = std::min(tokens, start + BLOCK - 1 + window - position);
    if (t0 >= t1) continue;
    const long count = std::min(BLOCK, position + t1 - start), live = (t1 - t0) * group;
    const int vectors = (int)ceil_div(count, LANES);
    const HeadBlock<Act, Kv> cached = block(j);
    const Act* queries = scratch.queries.get() + t0 * group * e;
    Act* weights = scratch.weights.get();
    const Strip keys{(const uint8_t*)cached.keys, key_stride, ceil_div(heads.size, STEP)};
    const Strip values{(const uint8_t*)cached.values(), value_stride, ceil_div(count, STEP)};
    rows_of(loader, live, vectors, queries, e, keys, vector_bytes, scores, BLOCK, true,
            ahead(keys));
    if (j < last_position / BLOCK) block(j + 1).fetch();
    for (long r = 0; r < live; r++) {
      const long row = t0 * group + r, here = position + row / group - start;
      soften(scores + r * BLOCK, vectors, std::max(0L, here - window + 1),
             std::min(BLOCK - 1, here), scale, weights + r * BLOCK, scratch.maxima[row],
             scratch.totals[row], sums + row * e, e);
    }
    rows_of(loader, live, (int)(e / LANES), weights, BLOCK, values, vector_bytes,
            sums + t0 * group * e, e, false, ahead(values));
  }
  for (long row = 0; row < rows; row++) write(row, sums + row * e, 1.0f / scratch.totals[row]);
}

}  // namespace phi
