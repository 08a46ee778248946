// One token per row from logits: temperature, min-p, inverse of the distribution function.
// Called through `phiforge_draw` in decoder.cpp.
// A row's numbers depend on that row alone: exps in fp32, sums of 64 tokens added up in fp64.

#pragma once

#include "common.h"

namespace phi {

constexpr long TOKEN_BLOCK = 64;

// Sixteen logits from `at` on; past the row's end they are -inf, tokens of probability zero.
PHI_INLINE f32x16 load_logits(const float* row, long at, long vocab) {
  if (at + LANES <= vocab) return load(row + at);
  f32x16 part = splat(-INFINITY);
  std::memcpy(&part, row + at, std::max(0L, vocab - at) * sizeof(float));
  return part;
}

// The largest logit; NaN if any is NaN.
inline float highest_logit(const float* row, long vocab) {
  f32x16 highest = splat(-INFINITY);
  i32x16 sound = highest == highest;
  for (long at = 0; at < vocab; at += LANES) {
    const f32x16 x = load_logits(row, at, vocab);
    highest = max(x, highest);
    sound &= x == x;
  }
  for (long lane = 0; lane < LANES; lane++)
    if (!sound[lane]) return NAN;
  return max_lanes(highest);
}

// exp((x - highest) / temperature), zero where that is below `least`: p relative to the largest p.
PHI_INLINE f32x16 weights_of(f32x16 x, float highest, float temperature, float least) {
  f32x16 shifted = x - highest;
  if (temperature != 1.0f) shifted = shifted / temperature;
  const f32x16 weight = exp(shifted);
  return weight < least ? f32x16{} : weight;
}

// Sums over blocks of 64 tokens, running, into ends; the total.
inline double running_sums(const float* row, long vocab, float highest, float temperature,
                           float least, double* ends) {
  double total = 0.0;
  for (long at = 0; at < vocab; at += TOKEN_BLOCK) {
    f32x16 sum = {};
    for (long part = 0; part < TOKEN_BLOCK; part += LANES)
      if (at + part < vocab)
        sum += weights_of(load_logits(row, at + part, vocab), highest, temperature, least);
    total += sum_lanes(sum);
    ends[at / TOKEN_BLOCK] = total;
  }
  return total;
}

// Where the distribution function passes u: first the block, then the token. A target that rounding
// puts past the end of its block takes the block's last token of non-zero weight.
inline long invert(const float* row, long vocab, float highest, float temperature, float least,
                   const double* ends, double u) {
  const long blocks = ceil_div(vocab, TOKEN_BLOCK);
  const double total = ends[blocks - 1], target = u * total;
  long block = std::upper_bound(ends, ends + blocks, target) - ends;
  if (block == blocks) block = std::lower_bound(ends, ends + blocks, total) - ends;
  double sum = block ? ends[block - 1] : 0.0;
  long chosen = block * TOKEN_BLOCK;
  for (long at = block * TOKEN_BLOCK; at < std::min(vocab, (block + 1) * TOKEN_BLOCK);
       at += LANES) {
    const f32x16 weights =
        weights_of(load_logits(row, at, vocab), highest, temperature, least);
    for (long lane = 0; lane < LANES; lane++) {
      if (!(weights[lane] > 0.0f)) continue;
      chosen = at + lane;
      sum += weights[lane];
      if (sum > target) return chosen;
    }
  }
  return chosen;
}

inline long first_equal(const float* row, long vocab, float value) {
  for (long id = 0; id < vocab; id++)
    if (row[id] == value) return id;
  return 0;
}

// Draws from one row; false when its logits are damaged (NaN, +inf, or nothing but -inf).
// Temperature 0 takes the largest logit, the lowest id among equals. `ends` has room for a number
// per block of 64 tokens.
inline bool draw(const float* row, long vocab, double temperature, double min_p, double u,
                 double* ends, int64_t* id) {
  const float highest = highest_logit(row, vocab);
  *id = 0;
  if (!std::isfinite(highest)) return false;
  if (temperature == 0.0) {
    *id = first_equal(row, vocab, highest);
    return true;
  }
  const float heat = (float)temperature, least = (float)min_p;
  running_sums(row, vocab, highest, heat, least, ends);
  *id = invert(row, vocab, highest, heat, least, ends, u);
  return true;
}

}  // namespace phi
