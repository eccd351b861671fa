"""Mixes of representations that stand in one buffer: x_n = Σ_{m≤n} α_m·y_m, and its backward.

Where C++ kernels serve, the buffer is of bf16, which halves the traffic. The newest representation takes part in full
precision, as at first it is all that has a weight.
"""

import torch
from torch import Tensor

from kernels import cpp

PIECE = 2048  # entries that stand side by side, as in kernel.cpp


def buffer(capacity: int, like: Tensor, *, compiled: bool) -> Tensor:
    """Memory for representations of N entries each: [capacity, N], or for C++ kernels [⌈N/PIECE⌉, capacity, PIECE].

    Args:
        capacity: how many.
        like: one of them.
        compiled: whether the model around is; its C++ kernels then serve mixed precision on a CPU.
    """
    device = like.device.type
    mixed = like.dtype == torch.float32 and torch.is_autocast_enabled(device)
    narrow = compiled and device == "cpu" and mixed and torch.get_autocast_dtype(device) == torch.bfloat16
    if narrow and cpp.is_loaded():
        return like.new_empty(-(-like.numel() // PIECE), capacity, PIECE, dtype=torch.bfloat16)
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
    depth = len(alpha) - 1
    mixed = newest.new_empty(newest.shape)  # no view: FSDP hangs a hook on it
    if values.dtype != newest.dtype:
        cpp.call(
            "depth_mix",
            (values, newest.contiguous(), alpha.contiguous(), mixed, depth, values.shape[1], newest.numel()),
        )
        return mixed
    values[depth] = newest.flatten()
    if depth == 0:
        return mixed.copy_(newest)
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
    if values.dtype != grad.dtype:
        grad_newest, grad_alpha = grad.new_empty(grad.shape), grad.new_empty(depth + 1)
        threads = torch.get_num_threads()
        parts = grad.new_empty(threads, depth + 1)
        outputs = (grad_newest, grad_alpha, parts)
        sizes = (threads, depth, count, alphas.shape[1], grad.numel())
        cpp.call("depth_mix_backward", (values, grad.contiguous(), alphas, *outputs, *sizes))
        return grad_newest, grad_alpha
    flat = grad.flatten()
    grad_alpha = values[: depth + 1] @ flat
    values[depth] = flat
    deeper = slice(depth, count)
    return (alphas[deeper, depth] @ values[deeper]).view_as(grad), grad_alpha
