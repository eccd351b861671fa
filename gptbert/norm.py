"""LayerNorm as nearly everywhere in GPT-BERT: without scale and bias."""

from torch import nn

from gptbert.config import ModelConfig


def layer_norm(size: int, config: ModelConfig) -> nn.LayerNorm:
    """LayerNorm over `size` entries, not affine; the relative embedding has an affine one of its own."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)
