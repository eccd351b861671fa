"""LayerNorm without scale and bias by PyTorch's function, differentiated by autograd."""

import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, eps: float) -> Tensor:
    """See `kernels.normalize`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)
