"""Philox4x32-10 (Salmon et al. 2011): random numbers as a function of a key and a counter."""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(seed: int, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter.

    Args:
        seed: the key, 64 bits.
        counter: four 32-bit words, int64 tensors that broadcast.

    Returns:
        Four int64 tensors with values in 0 … 2³² − 1.
    """
    word0, word1, word2, word3 = torch.broadcast_tensors(*counter)
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57  # overflow leaves the low 64 bits correct
        word0, word2 = (product1 >> 32) & WORD ^ word1 ^ key0, (product0 >> 32) & WORD ^ word3 ^ key1
        word1, word3 = product1 & WORD, product0 & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return word0, word1, word2, word3
