"""Token embeddings and vectors of relative positions (docs/model.md#attention).

Letters of shapes: B rows, T positions, D hidden, S bucket size, P = 2S−1 distinct position vectors, M the longest text.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptbert.config import ModelConfig
from gptbert.model.dropout import Dropout
from gptbert.model.norm import layer_norm
from kernels.backend import choose_backend
from kernels.linear import Packed
from kernels.normalize import embed
from kernels.normalize import is_fused as is_norm_fused


class Embedding(nn.Module):
    """Token embeddings and the P vectors of relative positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.relative_embedding = nn.Parameter(torch.empty(2 * config.position_bucket_size - 1, config.hidden_size))
        self.relative_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, seed: Tensor | None, words: Packed | None = None) -> tuple[Tensor, Tensor]:
        """[B, T] ids to x0 [B, T, D] and r [P, D], which on a GPU is padded with zero rows; see `position_rows`.

        `words` are the token embeddings, which have memory for the gradient.
        """
        hidden_states = self._words(input_ids, seed if self.training else None, words)
        relative = self.relative_layer_norm(self.relative_embedding)
        zeros = position_rows(len(relative), relative.device) - len(relative)
        return hidden_states, F.pad(relative, (0, 0, 0, zeros)) if zeros else relative

    def _words(self, input_ids: Tensor, seed: Tensor | None, words: Packed | None) -> Tensor:
        weight = self.word_embedding.weight
        if is_norm_fused(weight.device, weight.shape[1]):
            memory = None if words is None else words.gradient
            return embed(input_ids, weight, seed, self.dropout.probability, self.layer_norm.eps, memory)
        return self.dropout(self.layer_norm(self.word_embedding(input_ids)), seed)


def position_rows(count: int, device: torch.device) -> int:
    """`count` position vectors, padded on GPUs to a power of two; no distance maps to an added row.

    The count, 2S − 1, is odd, and GPU libraries have only old, slow kernels for matrices with unaligned rows; tiles of
    the fused kernels are powers of two. On a CPU rows of 64 elements evict each other from the cache: uncompiled steps
    took 7 % longer.
    """
    uses_kernels = device.type != "cpu" or choose_backend(None, device) == "triton"
    return max(16, 1 << (count - 1).bit_length()) if uses_kernels else count


def position_bucket(distance: Tensor, config: ModelConfig) -> Tensor:
    """Bucket of distances i − j, in −(S−1) … S−1: exact up to S/2, logarithmic up to max_position_embeddings.

    Args:
        distance: integers of any shape.
        config: gives S and M.
    """
    middle, farthest = config.position_bucket_size // 2, config.max_position_embeddings - 1
    magnitude = torch.where(distance.abs() < middle, middle - 1, distance.abs().clamp(max=farthest))
    logarithmic = torch.log(magnitude / middle) / math.log(farthest / middle) * (middle - 1)
    # the farthest one's is exactly middle − 1, which fp32 rounds up in some shapes: to a bucket that has no vector
    logarithmic = logarithmic.ceil().clamp(max=middle - 1).long()
    far = distance.sign() * (middle + logarithmic)
    return torch.where(magnitude <= middle, distance, far)
