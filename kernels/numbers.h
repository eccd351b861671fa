// What the C++ kernels have in common: bf16 as the upper half of a float, and functions that compilers vectorize.
// Plain loops, in which a compiler finds AVX-512, AVX2 or NEON by itself; no intrinsics.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using bf16 = uint16_t;

static inline float wide(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

// To the nearest, ties to even; what is not a number stays none.
static inline bf16 narrow(float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<bf16>(x == x ? rounded : 0x7fc0);
}

// e^x to 4·10⁻⁷ of it within ±5, and to 4·10⁻⁶ up to ±87; beyond ±87 that of the bound. What is not a number stays none.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float log2_e = 1.44269504f;
    float exponent = __builtin_rintf(x * log2_e), rest = x * log2_e - exponent;  // e^x = 2^exponent · 2^rest
    float series = 1.32647269e-3f;  // 2^rest within ±1/2, to 10⁻⁷ of it, and 1 at 0
    series = series * rest + 9.67151266e-3f;
    series = series * rest + 5.55073374e-2f;
    series = series * rest + 2.40222421e-1f;
    series = series * rest + 6.93146978e-1f;
    series = series * rest + 1.0f;
    return series * __builtin_bit_cast(float, (static_cast<int32_t>(exponent) + 127) << 23);
}
