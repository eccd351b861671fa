"""LayerNorm without scale and bias before a matrix product, as nearly everywhere in GPT-BERT: the public operation."""

import torch
from torch import Tensor

from kernels.normalize import op, reference


def normalize(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension; under autocast the result has the product's two bytes.

    There that result is all that both backwards need, and all that is kept. PyTorch's own keeps its input too, in four
    bytes.

    Args:
        x: [..., D].
        eps: added to the variance.

    Returns:
        [..., D], in autocast's dtype where that is on.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return reference.normalize(x, eps)
    return op.normalize(x, eps, torch.get_autocast_dtype(device))
