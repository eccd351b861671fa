"""The buffer of representations, and which implementation mixes them: its layout says so.

C++ kernels keep the buffer in bf16, which halves the traffic. The newest representation stays in fp32, as at first it
is the only one with a weight.
"""

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.depth_mix import cpp


def buffer(capacity: int, like: Tensor, *, backend: str | None = None) -> Tensor:
    """Memory for representations of N elements each: [capacity, N], or for C++ kernels [⌈N/PIECE⌉, capacity, PIECE].

    Args:
        capacity: number of representations.
        like: one of them.
        backend: see `kernels.backend.choose_backend`; "cpp" has kernels for fp32 under autocast to bf16.
    """
    device = like.device.type
    is_mixed = device == "cpu" and like.dtype == torch.float32 and torch.is_autocast_enabled(device)
    is_mixed = is_mixed and torch.get_autocast_dtype(device) == torch.bfloat16
    if is_mixed and choose_backend(backend, like.device) == "cpp":
        return like.new_empty(-(-like.numel() // cpp.PIECE), capacity, cpp.PIECE, dtype=torch.bfloat16)
    return like.new_empty(capacity, like.numel())


def depth_mix(values: Tensor, newest: Tensor, alpha: Tensor) -> Tensor:
    """Take y_n into its place in `values`, and mix.

    Args:
        values: [capacity, N], from `buffer`; row m is y_m for m < n.
        newest: y_n, of N entries and any shape.
        alpha: [n + 1].

    Returns:
        x_n, in the shape of `newest`.
    """
    if values.dim() == 3:
        return cpp.depth_mix(values, newest, alpha)
    depth = len(alpha) - 1
    mixed = newest.new_empty(newest.shape)  # must not be a view: FSDP registers a backward hook on it
    values[depth] = newest.flatten()
    if depth == 0:
        return torch.mul(newest, alpha, out=mixed)
    with torch.autocast(newest.device.type, enabled=False):  # which would take the product in two bytes
        torch.mv(values[: depth + 1].T, alpha, out=mixed.view(-1))
    return mixed


def depth_mix_backward(values: Tensor, grad: Tensor, alphas: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
    """Take ∂/∂x_n into the place of y_n, which is not needed any more.

    Args:
        values: [capacity, N]; row m is y_m for m ≤ n, and ∂/∂x_m for n < m < count.
        grad: ∂/∂x_n, of N entries and any shape.
        alphas: [capacity, capacity]; row m begins with the weights of x_m.
        depth: n.
        count: of representations in all.

    Returns:
        ∂/∂y_n, in the shape of `grad`, and ∂/∂α_n [n + 1].
    """
    if values.dim() == 3:
        return cpp.depth_mix_backward(values, grad, alphas, depth, count)
    flat = grad.flatten()
    grad_alpha = values[: depth + 1] @ flat
    values[depth] = flat
    deeper = slice(depth, count)
    return (alphas[deeper, depth] @ values[deeper]).view_as(grad), grad_alpha
