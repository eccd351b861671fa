"""One mix in plain PyTorch, differentiated by autograd."""

import torch
from torch import Tensor


def depth_mix(representations: list[Tensor], alpha: Tensor) -> Tensor:
    """x_n = Σ_{m≤n} α_m·y_m of n + 1 tensors of one shape, alpha [n + 1]."""
    return torch.einsum("m,m...->...", alpha, torch.stack(representations))
