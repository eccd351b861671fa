// Shared by the C++ kernels: bf16, stored as the upper 16 bits of a float, and branch-free functions for SIMD loops.
// No intrinsics: compilers turn the kernels' plain loops into AVX-512, AVX2 or NEON.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using bf16 = uint16_t;

// bf16 to fp32, exact.
static inline float wide(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

// fp32 to bf16. Round to nearest even; NaN stays NaN (0x7fc0, quiet).
static inline bf16 narrow(float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<bf16>(x == x ? rounded : 0x7fc0);
}

// e^x. Relative error 4e-7 for |x| ≤ 5, 4e-6 for |x| ≤ 87; x is clamped to ±87; NaN stays NaN.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float log2_e = 1.44269504f;
    // 1. Split x·log₂e into an integer and a fraction within ±½.
    float exponent = __builtin_rintf(x * log2_e), rest = x * log2_e - exponent;  // e^x = 2^exponent · 2^rest
    // 2. Evaluate 2^rest by Horner's rule.
    float series = 1.32647269e-3f;  // degree-5 polynomial for 2^rest: relative error 1e-7, exactly 1 at 0
    series = series * rest + 9.67151266e-3f;
    series = series * rest + 5.55073374e-2f;
    series = series * rest + 2.40222421e-1f;
    series = series * rest + 6.93146978e-1f;
    series = series * rest + 1.0f;
    // 3. Build 2^exponent from its bits (bias 127, 23 mantissa bits), and multiply.
    return series * __builtin_bit_cast(float, (static_cast<int32_t>(exponent) + 127) << 23);
}
