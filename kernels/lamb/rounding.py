"""Rounding fp32 to bf16 in Triton: to nearest even, or stochastically by random bits of each element and step."""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, age, tensor, first, BLOCK: tl.constexpr):
    """[BLOCK] uint32, random bits for elements from `first` (int64) on: a pure function of the arguments.

    Philox gives four words per counter, so a counter covers four elements; `first` is a multiple of four.
    """
    # 1. One counter (element // 4 low, high, tensor, step) per four elements.
    four = first // 4 + tl.arange(0, BLOCK // 4)
    low, high = four.to(tl.uint32), (four >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, low, high, low * 0 + tensor.to(tl.uint32), low * 0 + age.to(tl.uint32))
    # 2. Interleave the four words [BLOCK // 4] into [BLOCK].
    return tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK)


@triton.jit
def _cut(values, noise, STOCHASTIC: tl.constexpr):
    """Numbers of bf16, in fp32: rounded to nearest even, or stochastically with the 16 random bits of `noise`.

    By hand, because Triton's interpreter truncates. Infinities and NaN stay as they are.
    """
    bits = values.to(tl.uint32, bitcast=True)
    if not STOCHASTIC:
        noise = 0x7FFF + ((bits >> 16) & 1)  # round to nearest even
    # Add below the cut, then drop the lower 16 bits.
    is_finite = (bits & 0x7F800000) != 0x7F800000
    rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(is_finite, rounded, values)


@triton.jit
def round_to(values, noise, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Cast fp32 to TYPE; see `_cut`."""
    if TYPE.is_bf16():
        values = _cut(values, noise, STOCHASTIC)
    return values.to(TYPE)


@triton.jit
def narrow(values, TYPE: tl.constexpr):
    """Cast fp32 to TYPE with the bits of Tensor.to, to nearest even; of subnormal numbers too, unlike `round_to`.

    Those the interpreter's cast gets wrong. (In the moments kernel this way spills 20 bytes on sm_80 and sm_90.) A NaN
    that was computed stays one, as it has a bit in its upper half.
    """
    if TYPE.is_bf16():
        upper = _cut(values, 0, False).to(tl.uint32, bitcast=True) >> 16
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 - Triton compiles one branch
        return values.to(TYPE)
