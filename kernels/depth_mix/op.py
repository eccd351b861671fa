"""The buffer of representations, whose layout selects the implementation: 3 dimensions for C++, 2 for PyTorch.

C++ kernels keep the buffer in bf16, which halves the traffic. The newest representation is mixed in fp32: initially it
is the only one with a non-zero weight.
"""

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.depth_mix import cpp


def buffer(capacity: int, like: Tensor, *, backend: str | None = None) -> Tensor:
    """Uninitialized memory for representations of N elements: [capacity, N], for C++ [⌈N/PIECE⌉, capacity, PIECE].

    Args:
        capacity: number of representations.
        like: a representation.
        backend: see `kernels.backend.choose_backend`; "cpp" has kernels for fp32 under autocast to bf16.
    """
    device = like.device.type
    is_mixed = device == "cpu" and like.dtype == torch.float32 and torch.is_autocast_enabled(device)
    is_mixed = is_mixed and torch.get_autocast_dtype(device) == torch.bfloat16
    if is_mixed and choose_backend(backend, like.device) == "cpp":
        return like.new_empty(-(-like.numel() // cpp.PIECE), capacity, cpp.PIECE, dtype=torch.bfloat16)
    return like.new_empty(capacity, like.numel())


def depth_mix(values: Tensor, newest: Tensor, alpha: Tensor) -> Tensor:
    """Store y_n in `values`, and mix.

    Args:
        values: [capacity, N], from `buffer`; row m is y_m for m < n.
        newest: y_n, N elements, any shape.
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
    with torch.autocast(newest.device.type, enabled=False):  # autocast would compute in bf16
        torch.mv(values[: depth + 1].T, alpha, out=mixed.view(-1))
    return mixed


def depth_mix_backward(values: Tensor, grad: Tensor, alphas: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
    """Gradients of y_n and of α_n; stores ∂/∂x_n over y_n, which has no further use.

    Args:
        values: [capacity, N]; row m is y_m for m ≤ n, and ∂/∂x_m for n < m < count.
        grad: ∂/∂x_n, N elements, any shape.
        alphas: [capacity, capacity]; row m starts with the weights of x_m.
        depth: n.
        count: number of representations.

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
