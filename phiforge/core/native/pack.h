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
PHI_INLINE long format_step(int64_t format) { return format == FP32 ? 1 : HALF_STEP; }

// fp32, bf16: [step][64 outputs][inputs of the step].
template <class T>
void pack_plain(const AtRest& from, const int32_t* rows, long first, long inputs, T* out) {
  const long step = format_step(from.format);
  for (long k = first; k < first + inputs; k += step)
    for (long o = 0; o < PANEL; o++) {
      const T* row = (const T*)(from.data + rows[o] * from.row_bytes());
      for (long i = 0; i < step; i++)
        *out++ = rows[o] >= 0 && k + i < from.num_inputs ? row[k + i] : T(0);
    }
}

#ifdef PHI_DOT_PAIRS
// Sign and magnitude, in the order in which two byte lookups interleave to pairs of inputs.
inline void pack_int8(const AtRest& from, const int32_t* rows, long first, long inputs,
                      uint8_t* out) {
  for (long k = first; k < first + inputs; k += 2)
    for (long half = 0; half < 2; half++, out += 64)
      for (long byte = 0; byte < 64; byte++) {
        long word = byte / 16 * 8 + byte % 8, vector = 2 * half + byte % 16 / 8;
        long o = vector * LANES + word / 2, input = k + word % 2;
        int q = 0;
        if (rows[o] >= 0 && input < from.num_inputs)
          q = ((const int8_t*)from.data)[rows[o] * from.row_bytes() + input];
        out[byte] = (uint8_t)(q < 0 ? 0x80 | -q : q);
      }
}
#else
inline void pack_int8(const AtRest& from, const int32_t* rows, long first, long inputs,
                      uint8_t* out) {
  pack_plain(from, rows, first, inputs, out);
}
#endif

PHI_INLINE int nibble(const AtRest& from, int32_t row, long input) {
  if (row < 0) return 8;  // zero
  return from.data[row * from.row_bytes() + input / 2] >> (input % 2 * 4) & 15;
}

// One group of 32 inputs, then its 64 scales.
inline void pack_int4_group(const AtRest& from, const int32_t* rows, long group, uint8_t* out) {
#ifdef PHI_DOT_PAIRS
  for (long k = group * GROUP; k < (group + 1) * GROUP; k += 2, out += 64)
    for (long word = 0; word < 32; word++) {
      int bits = 0;
      for (long v = 0; v < 4; v++)
        bits |= nibble(from, rows[v * LANES + word / 2], k + word % 2) << (4 * v);
      store_as(out + 2 * word, (uint16_t)bits);
    }
#else
  for (long k = group * GROUP; k < (group + 1) * GROUP; k++, out += 32)
    for (long o = 0; o < 32; o++)
      out[o] = (uint8_t)(nibble(from, rows[o], k) | nibble(from, rows[o + 32], k) << 4);
#endif
  const long groups = ceil_div(from.num_inputs, GROUP);
  for (long o = 0; o < PANEL; o++) {
    uint16_t scale = rows[o] < 0 ? 0 : ((const uint16_t*)from.scale)[rows[o] * groups + group];
    store_as(out + 2 * o, scale);
  }
}

// One panel: `rows` names the row at rest of each of its 64 outputs.
inline void pack_panel(const AtRest& from, const int32_t* rows, uint8_t* out, float* scales) {
  const long inputs = round_up(from.num_inputs, GROUP);
  const long group_bytes = step_bytes(from.format, GROUP) + GROUP_SCALE_BYTES;
  if (from.format == FP32) pack_plain(from, rows, 0, inputs, (float*)out);
  if (from.format == BF16) pack_plain(from, rows, 0, inputs, (uint16_t*)out);
  if (from.format == INT8) {
    pack_int8(from, rows, 0, inputs, out);
    for (long o = 0; o < PANEL; o++)
      scales[o] = rows[o] < 0 ? 0.0f : ((const float*)from.scale)[rows[o]];
  }
  if (from.format == INT4)
    for (long group = 0; group < inputs / GROUP; group++)
      pack_int4_group(from, rows, group, out + group * group_bytes);
}

}  // namespace phi
