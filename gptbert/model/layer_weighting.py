"""Depth-weighted averaging of representations: x_n = Σ_{m≤n} α_{n,m}·y_m, one matrix–vector product per depth.

All y_m of a forward are in one contiguous buffer Y, so x_n is α_n · Y, and its backward is two more such products
(`kernels.depth_mix`), each reading its operands once. Plain autograd would rewrite the gradient of every y_m at each
later depth: four times the memory traffic.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.depth_mix import buffer, depth_mix, depth_mix_backward
from kernels.first_order import first_order


class LayerWeighting(nn.Module):
    """The weights α_n of one depth; initially they select y_n."""

    def __init__(self, num_representations: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(num_representations))
        with torch.no_grad():
            self.alpha[-1] = 1

    def forward(self, newest: Tensor, representations: "Representations") -> Tensor:
        """y_n [B, T, D], appended to `representations`, to x_n [B, T, D]."""
        if not torch.is_grad_enabled():
            return representations.append(newest, self.alpha)
        return _Mix.apply(newest, self.alpha, representations)


class Representations:
    """The y_m of one forward, in order of depth.

    Args:
        capacity: final number of representations.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.collected = 0

    def start(self, first: Tensor) -> Tensor:
        """y_0 [B, T, D] to x_0, which equals it; its gradient collects those of all depths."""
        # [capacity, B·T·D]: y_m; in the backward, ∂/∂x_n of finished depths
        self._values = buffer(self.capacity, first)
        self._alphas = first.new_zeros(self.capacity, self.capacity)
        return _Mix.apply(first, first.new_ones(1), self)

    def append(self, newest: Tensor, alpha: Tensor) -> Tensor:
        """Store y_n, and return α_n · Y."""
        depth, self.count = self.count, self.count + 1
        if len(alpha) != self.count:
            raise ValueError(f"representation {depth} has {len(alpha)} weights, expected {self.count}")
        self._alphas[depth, : self.count] = alpha
        return depth_mix(self._values, newest, self._alphas[depth, : self.count])

    def collect(self, depth: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Store ∂/∂x_n; return ∂/∂y_n and ∂/∂α_n. Called once per depth, in descending order."""
        if depth != self.count - 1 - self.collected:
            raise RuntimeError("layer weighting: a forward has one backward (retain_graph does not help)")
        self.collected += 1
        gradients = depth_mix_backward(self._values, grad, self._alphas, depth, self.count)
        if depth == 0:
            del self._values  # free it now: the graph, and so this object, may live as long as the loss
        return gradients


class _Mix(torch.autograd.Function):
    """∂/∂x_n to ∂/∂y_n = Σ_{k≥n} α_{k,n}·∂/∂x_k. All ∂/∂x_k are available, since x_k is computed from x_n."""

    @staticmethod
    def forward(ctx: Any, newest: Tensor, alpha: Tensor, representations: Representations) -> Tensor:
        ctx.depth, ctx.representations = representations.count, representations
        return representations.append(newest, alpha)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.representations.collect(ctx.depth, grad), None
