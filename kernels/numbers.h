// What the C++ kernels have in common: bf16 as the upper half of a float, and functions that compilers vectorise.
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

// e^x to two units in the last place of fp32; beyond ±87 that of the bound. What is not a number stays none.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    float exponent = __builtin_rintf(x * 1.44269504f);
    float rest = x - exponent * 0.693359375f + exponent * 2.12194440e-4f;  // ln 2 in two parts
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    return series * __builtin_bit_cast(float, (static_cast<int32_t>(exponent) + 127) << 23);
}
