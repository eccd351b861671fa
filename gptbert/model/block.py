"""A block of the transformer: attention and feed-forward, each followed by a mix of all representations so far."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptbert.config import ModelConfig
from gptbert.model.attention import SEEDS as ATTENTION_SEEDS
from gptbert.model.attention import Attention, AttentionWeights, Visibility
from gptbert.model.compilation import any_number_of_rows
from gptbert.model.feed_forward import FeedForward, FeedForwardWeights
from gptbert.model.layer_weighting import LayerWeighting, Representations
from kernels.depth_mix import FusedMixes

BLOCK_SEEDS = ATTENTION_SEEDS + 1


class BlockWeights(NamedTuple):
    """A block's parameters with copies in the products' dtype."""

    attention: AttentionWeights
    feed_forward: FeedForwardWeights


class Block(nn.Module):
    """Attention and feed-forward, each followed by a mix of all representations so far."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_mix = LayerWeighting(2 * layer + 2)
        self.feed_forward = FeedForward(config)
        self.feed_forward_mix = LayerWeighting(2 * layer + 3)
        self.is_compiled = False  # see gptbert.model.compilation
        self.is_checkpointed = False  # whether the backward recomputes activations

    def forward(
        self,
        hidden_states: Tensor,
        representations: Representations,
        relative: Tensor,
        visibility: Visibility,
        seeds: Tensor | None,
        weights: BlockWeights | None,
    ) -> Tensor:
        """x_{2l} [B, T, D] to x_{2l+2}; appends y_{2l+1} and y_{2l+2} to `representations`.

        `weights` are those of `pack`; None: packed at each use.
        """
        attention_seeds, feed_forward_seed = (None, None) if seeds is None else (seeds[:-1], seeds[-1])
        if self.is_compiled:
            hidden_states, visibility = any_number_of_rows(hidden_states), visibility.of_any_number_of_rows()
        attention_weights, feed_forward_weights = (None, None) if weights is None else weights
        newest = self._run(self.attention, hidden_states, relative, visibility, attention_seeds, attention_weights)
        hidden_states = self.attention_mix(newest, representations)
        if self.is_compiled:
            hidden_states = any_number_of_rows(hidden_states)
        newest = self._run(self.feed_forward, hidden_states, feed_forward_seed, feed_forward_weights)
        return self.feed_forward_mix(newest, representations)

    def forward_fused(
        self,
        hidden_states: Tensor,
        normalized: Tensor,
        mixes: FusedMixes,
        relative: Tensor,
        visibility: Visibility,
        seeds: Tensor | None,
        weights: BlockWeights | None,
        *,
        is_dropped: bool,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with `mixes`: x_{2l} and h_{2l} to x_{2l+2} and h_{2l+2}.

        With `is_dropped`, elements of `relative` have been dropped.
        """
        each_seed = (None,) * BLOCK_SEEDS if seeds is None else seeds.unbind()
        relative_seed, probability_seed, output_seed, feed_forward_seed = each_seed
        # the mix has the output's dropout
        attention_seeds = (None if is_dropped else relative_seed, probability_seed, None)
        if self.is_compiled:
            normalized, visibility = any_number_of_rows(normalized), visibility.of_any_number_of_rows()
        attention_weights, feed_forward_weights = (None, None) if weights is None else weights
        inputs = (normalized, relative, visibility, attention_seeds, attention_weights)
        output = self._run(self.attention, *inputs, product_only=True)  # the mix adds bias, dropout and residual
        hidden_states, normalized = mixes.mix(output, self.attention.output.bias, hidden_states, output_seed)
        if self.is_compiled:
            normalized = any_number_of_rows(normalized)
        output = self._run(self.feed_forward, normalized, None, feed_forward_weights, product_only=True)
        return mixes.mix(output, None, hidden_states, feed_forward_seed)

    def pack(self, dtype: torch.dtype) -> BlockWeights:
        """The parameters with new copies in the products' dtype."""
        return BlockWeights(self.attention.pack(dtype), self.feed_forward.pack(dtype))

    def _run(self, sub_layer: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        """The sub-layer's output. Only the sub-layer is recomputed: the mixes store each y_m once, in their buffer."""
        if not (self.is_checkpointed and torch.is_grad_enabled()):
            return sub_layer(*inputs, **options)
        # dropout is a function of its seeds, so there is no generator state to restore
        return checkpoint(sub_layer, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
