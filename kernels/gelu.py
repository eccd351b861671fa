"""GELU in Triton, by its share of the input, and its derivative."""

import math

import triton
import triton.language as tl

_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBE = tl.constexpr(0.044715)
_CURVE = tl.constexpr(2 * math.sqrt(2 / math.pi) * 3 * 0.044715)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def gelu_share(x, IS_TANH: tl.constexpr):
    """GELU(x) / x of x in fp32; the tanh approximation by (1 + tanh z)/2 = sigmoid(2z)."""
    if IS_TANH:
        share = tl.sigmoid((x + x * x * x * _CUBE) * _SLOPE)
    else:
        share = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
    return share


@triton.jit
def gelu_slope(x, share, IS_TANH: tl.constexpr):
    """GELU'(x), given its share."""
    if IS_TANH:
        slope = share + x * share * (1 - share) * (x * x * _CURVE + _SLOPE)
    else:
        slope = share + x * (tl.exp(x * x * -0.5) * _DENSITY)
    return slope
