"""The gated feed-forward (docs/model.md#feed-forward). B rows, T positions, D hidden, I intermediate."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptbert.config import ModelConfig
from gptbert.model.dropout import Dropout
from gptbert.model.norm import InputNorm
from kernels.gated_norm import gated_norm
from kernels.gated_norm import is_fused as is_gate_fused
from kernels.linear import Packed, linear


class FeedForwardWeights(NamedTuple):
    """Parameters of the feed-forward, [2I, D] and [D, I], with copies in the products' dtype."""

    up: Packed
    down: Packed


class FeedForward(nn.Module):
    """Gated feed-forward with residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = InputNorm(config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.eps = config.layer_norm_eps
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        seed: Tensor | None,
        weights: FeedForwardWeights | None = None,
        *,
        product_only: bool = False,
    ) -> Tensor:
        """Both layers with the residual connection, [B, T, D]; `weights` and `product_only` as in `Attention`."""
        normalized = hidden_states if product_only else self.input_norm(hidden_states)
        down: Packed | Tensor
        if is_gate_fused(normalized.device, normalized.dtype, self.down.in_features):
            weights = self.pack(normalized.dtype) if weights is None else weights
            gate, down = linear(normalized, weights.up), weights.down
        else:
            gate, down = self.up(normalized), self.down.weight
        output = gated_norm(gate, None, down, approximate="tanh", eps=self.eps)
        if product_only:
            return output
        return hidden_states + self.dropout(output, seed)

    def pack(self, dtype: torch.dtype) -> FeedForwardWeights:
        """The parameters with new copies in the products' dtype."""
        return FeedForwardWeights(*(Packed.of([layer.weight], dtype) for layer in (self.up, self.down)))
