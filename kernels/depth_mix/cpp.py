"""Mixes by C++ kernels: representations in bf16, the newest in fp32."""

import torch
from torch import Tensor

from kernels import cpp

PIECE = 2048  # contiguous elements of one representation; must equal PIECE in kernel.cpp


def depth_mix(values: Tensor, newest: Tensor, alpha: Tensor) -> Tensor:
    """See `kernels.depth_mix.depth_mix`."""
    _check(values, newest)
    if not 1 <= len(alpha) <= values.shape[1]:
        raise ValueError(f"alpha: {len(alpha)} weights for a buffer of {values.shape[1]} representations")
    mixed = newest.new_empty(newest.shape)
    sizes = (len(alpha) - 1, values.shape[1], newest.numel())
    cpp.call("depth_mix", (values, newest.contiguous(), alpha.float().contiguous(), mixed, *sizes))
    return mixed


def depth_mix_backward(values: Tensor, grad: Tensor, alphas: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
    """See `kernels.depth_mix.depth_mix_backward`."""
    _check(values, grad)
    if alphas.shape != (values.shape[1], values.shape[1]):
        raise ValueError(f"alphas: {list(alphas.shape)} for a buffer of {values.shape[1]} representations")
    threads = torch.get_num_threads()
    grad_newest, grad_alpha = grad.new_empty(grad.shape), grad.new_empty(depth + 1)
    outputs = (grad_newest, grad_alpha, grad.new_empty(threads, depth + 1))  # the last: scratch, sums per thread
    sizes = (threads, depth, count, alphas.shape[1], grad.numel())
    cpp.call("depth_mix_backward", (values, grad.contiguous(), alphas.float().contiguous(), *outputs, *sizes))
    return grad_newest, grad_alpha


def _check(values: Tensor, newest: Tensor) -> None:
    """Raise TypeError unless the buffer is bf16, the other fp32, and both on the CPU; ValueError if that is larger."""
    is_on_cpu = values.device.type == newest.device.type == "cpu"
    if not is_on_cpu or (values.dtype, newest.dtype) != (torch.bfloat16, torch.float32):
        raise TypeError(
            f"depth_mix: a buffer of {values.dtype} on {values.device} takes fp32 on a CPU, not {newest.dtype} on "
            f"{newest.device}"
        )
    if newest.numel() > values.shape[0] * PIECE:
        raise ValueError(f"depth_mix: {newest.numel()} elements in a buffer for {values.shape[0] * PIECE}")
