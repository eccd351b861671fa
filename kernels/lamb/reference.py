"""LAMB in plain PyTorch, one tensor after another: docs/model.md#lamb, and the rounding of bf16 moments."""

import torch
from torch import Tensor

from kernels.backend import widest_float
from kernels.lamb.arguments import Clipping, Settings, Tensors
from kernels.lamb.shards import whole_norms
from kernels.philox import WORD, philox


def lamb_step(tensors: Tensors, clipping: Clipping, settings: Settings) -> None:
    """See `kernels.lamb_step`."""
    params, grads, exp_avgs, exp_avg_sqs, steps, averages = tensors
    lr, beta1, beta2, eps, weight_decays, average_decay, seed, group = settings
    # 1. Global gradient norm and clip factor; −1 skips the step.
    max_norm, norm, clip = clipping
    if max_norm is not None:
        norms = [torch.linalg.vector_norm(grad, dtype=norm.dtype) for grad in grads]
        norm.copy_(whole_norms(torch.linalg.vector_norm(torch.stack(norms)), group))
        clip = clip_factor(norm, max_norm)
    elif clip is None:
        clip = torch.ones((), dtype=params[0].dtype, device=params[0].device)
    is_taken = clip >= 0  # if not, compute anyway and mask the result: no device sync
    updates = []
    for index, (param, weight_decay) in enumerate(zip(params, weight_decays, strict=True)):
        # 2. Moments from the clipped gradient, in the parameter's dtype, then rounded to their own.
        grad, step = grads[index].to(param.dtype) * clip, steps[index].add_(is_taken)
        exp_avg = exp_avgs[index].to(param.dtype).lerp(grad, 1 - beta1)
        exp_avg_sq = beta2 * exp_avg_sqs[index].to(param.dtype) + (1 - beta2) * grad.square()
        if seed is not None:
            noise = rounding_noise(seed, index, step, param)
            exp_avg = round_stochastically(exp_avg, noise & 0xFFFF)
            exp_avg_sq = round_stochastically(exp_avg_sq, noise >> 16)
        for moments, new in ((exp_avgs, exp_avg), (exp_avg_sqs, exp_avg_sq)):
            moments[index].copy_(torch.where(is_taken, new, moments[index]))
        exp_avg, exp_avg_sq = exp_avgs[index].to(param.dtype), exp_avg_sqs[index].to(param.dtype)  # as rounded

        # 3. Update u with bias correction in fp64, where the device has it, and decay.
        age = step.to(widest_float(step.device))
        update = (exp_avg / (1 - beta1**age)) / ((exp_avg_sq / (1 - beta2**age)).sqrt() + eps)
        updates.append(update + weight_decay * param)

    # 4. ‖p‖ and ‖u‖ of all tensors, in one all-reduce if sharded.
    norms_here = torch.stack([torch.linalg.vector_norm(tensor) for tensor in (*params, *updates)])
    both_norms = whole_norms(norms_here, group).view(2, -1)  # [2, tensors]
    for index, (param, update, weight_decay) in enumerate(zip(params, updates, weight_decays, strict=True)):
        # 5. Scale by the trust ratio; new parameter and moving average.
        ratio: Tensor | float = 1.0
        if weight_decay != 0:
            param_norm, update_norm = both_norms[:, index]
            ratio = torch.where((param_norm > 0) & (update_norm > 0), param_norm / update_norm, 1.0)
        param.copy_(torch.where(is_taken, param - lr * ratio * update, param))
        if averages:
            average = averages[index]
            average.copy_(torch.where(is_taken, average.lerp(param, 1 - average_decay), average))


def clip_factor(gradient_norm: Tensor, max_grad_norm: float) -> Tensor:
    """The gradients' factor, as in torch.nn.utils.clip_grad_norm_; −1 if the norm is not finite: skip the step."""
    factor = (max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
    return torch.where(gradient_norm.isfinite(), factor, -1.0)


def rounding_noise(seed: int, tensor: int, step: Tensor, like: Tensor) -> Tensor:
    """Random uint32 words, in int64, one per element, in the shape of `like`.

    Philox with key = seed and counter = (element // 4 low, high, tensor, step) gives four elements' words.
    """
    fours = torch.arange(-(-like.numel() // 4), device=like.device)
    words = philox(seed, fours & WORD, fours >> 32, torch.full_like(fours, tensor), step.to(torch.int64))
    return torch.stack(words, dim=1).flatten()[: like.numel()].view_as(like)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 values to bf16, returned in fp32: up with a probability given by the dropped 16 bits."""
    bits = values.float().view(torch.int32).long() + noise
    rounded = (bits & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)
