// From matrices at rest, [outputs][inputs] row by row, to panels of 64 outputs (matmul.h).
// `pack` writes one panel; a row map says which row at rest becomes which output (-1: zeros).
// int4 at rest: two inputs to a byte, the even one in the low nibble, value = nibble - 8, a bf16
// scale for every 32 inputs; int8: one fp32 scale per row.

#pragma once

#include "matmul.h"

namespace phi {

struct AtRest {
  const uint8_t* data;
  const void* scale;  // int8: fp32 [n]; int4: bf16 [n][groups]
  int64_t num_outputs, num_inputs, format;

  long row_bytes() const {
    if (format == INT4) return round_up(num_inputs, GROUP) / 2;
    return num_inputs * (format == FP32 ? 4 : format == BF16 ? 2 : 1);
  }
};

#ifdef PHI_DOT_PAIRS
constexpr long HALF_STEP = 2;
#else
constexpr long HALF_STEP = 1;
#endif

// 32 inputs of the panel's 64 rows at rest: whole cache lines are read, and none of them twice,
// though rows may lie a power of two apart.
struct Group {
  static constexpr long STRIDE = GROUP * 4;
  alignas(64) uint8_t bytes[PANEL * STRIDE];

  void gather(const AtRest& from, const int32_t* rows, long group) {
    const long per_row = from.row_bytes(), size = from.format == INT4 ? GROUP / 2
                                                  : from.format == INT8 ? GROUP
                                                  : from.format == BF16 ? GROUP * 2
                                                                        : GROUP * 4;
    const long first = group * size, count = std::min(size, per_row - first);
    for (long o = 0; o < PANEL; o++) {
      uint8_t* to = bytes + o * STRIDE;
      std::memset(to, from.format == INT4 ? 0x88 : 0, size);  // zeros
      if (rows[o] >= 0) std::memcpy(to, from.data + rows[o] * per_row + first, count);
    }
  }
  template <class T>
  PHI_INLINE T at(long output, long input) const {
    return load_as<T>(bytes + output * STRIDE + input * sizeof(T));
  }
  PHI_INLINE int nibble(long output, long input) const {
    return bytes[output * STRIDE + input / 2] >> (input % 2 * 4) & 15;
  }
};

// fp32, bf16 (and int8 where inputs come singly): [step][64 outputs][inputs of the step].
template <class T>
T* pack_plain(const Group& group, long step, T* out) {
  for (long k = 0; k < GROUP; k += step)
    for (long o = 0; o < PANEL; o++)
      for (long i = 0; i < step; i++) *out++ = group.at<T>(o, k + i);
  return out;
}

// int8: sign and magnitude, in the order in which two byte lookups interleave to pairs of inputs.
inline uint8_t* pack_int8(const Group& group, uint8_t* out) {
#ifdef PHI_DOT_PAIRS
  for (long k = 0; k < GROUP; k += 2)
    for (long half = 0; half < 2; half++)
      for (long lane = 0; lane < 4; lane++)
        for (long part = 0; part < 2; part++)
          for (long i = 0; i < 8; i++) {
            const long output = (2 * half + part) * LANES + lane * 4 + i / 2;
            const int q = group.at<int8_t>(output, k + i % 2), sign = q >> 31;
            *out++ = (uint8_t)(((q ^ sign) - sign) | (sign & 0x80));
          }
  return out;
#else
  return pack_plain<uint8_t>(group, 1, out);
#endif
}

// int4: words of four vectors' nibbles, or bytes of two outputs'; then the group's 64 scales.
inline uint8_t* pack_int4(const Group& group, const uint16_t* scales, uint8_t* out) {
#ifdef PHI_DOT_PAIRS
  for (long k = 0; k < GROUP; k += 2)
    for (long word = 0; word < 32; word++, out += 2) {
      int bits = 0;
      for (long v = 0; v < 4; v++)
        bits |= group.nibble(v * LANES + word / 2, k + word % 2) << (4 * v);
      store_as(out, (uint16_t)bits);
    }
#else
  for (long k = 0; k < GROUP; k++)
    for (long o = 0; o < 32; o++)
      *out++ = (uint8_t)(group.nibble(o, k) | group.nibble(o + 32, k) << 4);
#endif
  std::memcpy(out, scales, GROUP_SCALE_BYTES);
  return out + GROUP_SCALE_BYTES;
}

// One panel: `rows` names the row at rest of each of its 64 outputs, -1 for zeros.
inline void pack_panel(const AtRest& from, const int32_t* rows, uint8_t* out, float* scales) {
  const long groups = ceil_div(from.num_inputs, GROUP);
  Group group;
  uint16_t group_scales[PANEL];
  for (long g = 0; g < groups; g++) {
    group.gather(from, rows, g);
    if (from.format == FP32) out = (uint8_t*)pack_plain(group, 1, (float*)out);
    if (from.format == BF16) out = (uint8_t*)pack_plain(group, HALF_STEP, (uint16_t*)out);
    if (from.format == INT8) out = pack_int8(group, out);
    if (from.format != INT4) continue;
    const uint16_t* all = (const uint16_t*)from.scale;
    for (long o = 0; o < PANEL; o++)
      group_scales[o] = rows[o] < 0 ? 0 : all[rows[o] * groups + g];
    out = pack_int4(group, group_scales, out);
  }
  if (from.format == INT8)
    for (long o = 0; o < PANEL; o++)
      scales[o] = rows[o] < 0 ? 0.0f : ((const float*)from.scale)[rows[o]];
}

}  // namespace phi
