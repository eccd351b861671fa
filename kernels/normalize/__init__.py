"""LayerNorm without scale and bias before a matrix product, as in most of GPT-BERT: the public operation."""

import torch
from torch import Tensor

from kernels.normalize import op, reference
from kernels.normalize.fused import activate, embed, is_fused

__all__ = ["activate", "embed", "is_fused", "normalize"]


def normalize(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension; under autocast the result has autocast's dtype, like the product's input.

    That result is the only large tensor that its backward and the product's save. PyTorch's LayerNorm also saves its
    input, in fp32.

    Args:
        x: [..., D].
        eps: added to the variance.

    Returns:
        [..., D], in autocast's dtype if enabled.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return reference.normalize(x, eps)
    return op.normalize(x, eps, torch.get_autocast_dtype(device))
