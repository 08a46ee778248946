// Packs a matrix into int4: groups of 32 inputs, one bf16 scale each, the one of least squared error
// among a few: the group's largest value times each factor.
// Called by phiforge/model/quantize.py, whose torch code gives the same bits: every sum has one
// order (pairs 16, 8, 4, 2, 1 apart) and no product is fused with an addition.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int GROUP = 32;
constexpr uint16_t NOT_A_NUMBER = 0x7FC0;

inline float from_bf16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Round to nearest, ties to even. Infinity stays; NaN stays NaN, so that the caller sees it.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) return NOT_A_NUMBER;
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// 16 lanes whatever the machine has: the compiler cuts them into its registers.
typedef float Lanes __attribute__((vector_size(64)));
typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes4 __attribute__((vector_size(16)));

struct Group {
    Lanes first, second;
};

inline Lanes lanes(float value) { return value - Lanes{}; }

inline Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }

inline Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }

// Nearest whole number, ties to even, within -8..7: adding 1.5 x 2^23 leaves no room for fractions.
inline Lanes quantized(Lanes values, float inverse) {
    const Lanes magic = lanes(12582912.0f);
    const Lanes q = least(most(values * lanes(inverse), lanes(-8.0f)), lanes(7.0f));
    return (q + magic) - magic;
}

// Zero for scales too small to divide by: their group becomes zero.
inline float inverse_of(float scale) {
    return std::fabs(scale) >= 1.17549435e-38f ? 1.0f / scale : 0.0f;
}

inline float sum_of(Lanes values) {
    Lanes8 eight[2];
    std::memcpy(eight, &values, sizeof values);
    eight[0] = eight[0] + eight[1];
    Lanes4 four[2];
    std::memcpy(four, &eight[0], sizeof eight[0]);
    four[0] = four[0] + four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

inline float squared_error(const Group& w, float scale) {
    const float inverse = inverse_of(scale);
    const Lanes first = quantized(w.first, inverse) * lanes(scale) - w.first;
    const Lanes second = quantized(w.second, inverse) * lanes(scale) - w.second;
    return sum_of(first * first + second * second);
}

inline float largest(Lanes values) {
    Lanes8 eight[2];
    std::memcpy(eight, &values, sizeof values);
    eight[0] = eight[0] > eight[1] ? eight[0] : eight[1];
    Lanes4 four[2];
    std::memcpy(four, &eight[0], sizeof eight[0]);
    const Lanes4 v = four[0] > four[1] ? four[0] : four[1];
    const float even = v[0] > v[2] ? v[0] : v[2];
    const float odd = v[1] > v[3] ? v[1] : v[3];
    return even > odd ? even : odd;
}

inline uint16_t best_scale(const Group& w, const float* factors, int num_factors) {
    const Lanes nothing = (w.first - w.first) + (w.second - w.second);
    if (!(sum_of(nothing) == 0.0f)) return NOT_A_NUMBER;  // NaN or infinity is among them
    const float high = largest(most(w.first, w.second));
    const float low = -largest(most(-w.first, -w.second));
    const float extreme = high > -low ? high : low;
    uint16_t best = to_bf16(extreme * factors[0]);
    float least_error = INFINITY;
    for (int f = 0; f < num_factors; ++f) {
        const uint16_t scale = to_bf16(extreme * factors[f]);
        const float error = squared_error(w, from_bf16(scale));
        if (error < least_error) {
            least_error = error;
            best = scale;
        }
    }
    return best;
}

inline void pack(const Group& w, uint16_t scale_bits, uint8_t* out) {
    const float inverse = inverse_of(from_bf16(scale_bits));
    float value[GROUP];
    const Group q = {quantized(w.first, inverse) + 8.0f, quantized(w.second, inverse) + 8.0f};
    std::memcpy(value, &q, sizeof q);
    int32_t nibble[GROUP];
    for (int i = 0; i < GROUP; ++i) nibble[i] = static_cast<int32_t>(value[i]);
    for (int i = 0; i < GROUP / 2; ++i) {
        out[i] = static_cast<uint8_t>(nibble[2 * i] | (nibble[2 * i + 1] << 4));
    }
}

inline Group load(const void* row, bool is_bf16, int64_t first, int64_t count) {
    alignas(64) float w[GROUP] = {};
    if (!is_bf16) {
        std::memcpy(w, static_cast<const float*>(row) + first, count * sizeof(float));
    } else if (const uint16_t* values = static_cast<const uint16_t*>(row) + first; count == GROUP) {
        for (int i = 0; i < GROUP; ++i) w[i] = from_bf16(values[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) w[i] = from_bf16(values[i]);
    }
    Group group;
    std::memcpy(&group, w, sizeof group);
    return group;
}

}  // namespace

extern "C" const char* phiforge_simd() {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "generic";
#endif
}

// weight [n, k] contiguous, bf16 or fp32 -> packed [n, 16 g] and scale (bf16) [n, g].
extern "C" void quantize_int4(
    const void* weight,
    int is_bf16,
    int64_t n,
    int64_t k,
    const float* factors,
    int num_factors,
    uint8_t* packed,
    uint16_t* scale
) {
    const int64_t groups = (k + GROUP - 1) / GROUP;
    const int64_t row_bytes = k * (is_bf16 ? 2 : 4);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
        const char* source = static_cast<const char*>(weight) + row * row_bytes;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t count = k - g * GROUP < GROUP ? k - g * GROUP : GROUP;
            const Group w = load(source, is_bf16 != 0, g * GROUP, count);
            const int64_t at = row * groups + g;
            scale[at] = best_scale(w, factors, num_factors);
            pack(w, scale[at], packed + at * (GROUP / 2));
        }
    }
}
