"""LAMB for CPUs: what `reference.py` computes, in blocks that stay in the cache, with the moments by fused Adam."""

import torch
from torch import Tensor

from kernels.lamb.reference import clip_factor

BLOCK = 2**18  # elements, 1 MB in fp32, of the six or seven arrays that a block needs at once


def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    gradient_norm: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: list[float],
    max_grad_norm: float | None,
    average_decay: float,
    seed: int | None,
    clip: Tensor | None = None,
) -> None:
    """See `kernels.lamb.op.lamb_step`; moments have the parameters' type, so that `seed` has nothing to round."""
    del seed
    if max_grad_norm is not None:
        gradient_norm.fill_(_norm([block for grad in grads for block in _blocks(grad)], gradient_norm.dtype))
        clip = clip_factor(gradient_norm, max_grad_norm)
    if clip is not None and clip < 0:
        return
    largest = max(param.numel() for param in params)
    updates, scratch = params[0].new_empty(largest), params[0].new_empty(min(largest, BLOCK))
    for index, (param, weight_decay) in enumerate(zip(params, weight_decays, strict=True)):
        step, param_blocks = steps[index].add_(1), _blocks(param)
        update_blocks = _blocks(updates[: param.numel()])
        states = zip(*(_blocks(tensors[index]) for tensors in (grads, exp_avgs, exp_avg_sqs)), strict=True)
        for param_block, update, (grad, exp_avg, exp_avg_sq) in zip(param_blocks, update_blocks, states, strict=True):
            # Adam's step of length −1 from zero is its update
            torch._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls
                [update.zero_()],
                [_prepared(grad, clip, scratch[: grad.numel()])],
                [exp_avg],
                [exp_avg_sq],
                [],
                [step],
                lr=-1.0,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )
            if weight_decay != 0:
                update.add_(param_block, alpha=weight_decay)
        step_size = float(lr)
        if weight_decay != 0:
            param_norm, update_norm = _norm(param_blocks, param.dtype), _norm(update_blocks, param.dtype)
            step_size *= param_norm / update_norm if param_norm > 0 and update_norm > 0 else 1.0
        for block, (param_block, update) in enumerate(zip(param_blocks, update_blocks, strict=True)):
            param_block.sub_(update, alpha=step_size)
            if averages:
                _blocks(averages[index])[block].lerp_(param_block, 1 - average_decay)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(BLOCK)


def _norm(blocks: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> float:
    norms = [torch.linalg.vector_norm(block, dtype=dtype) for block in blocks]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


def _prepared(grad: Tensor, clip: Tensor | None, out: Tensor) -> Tensor:
    """The gradient clipped and in the parameter's type; in `out`, if that takes any doing."""
    if grad.dtype != out.dtype:
        grad = out.copy_(grad)
    return grad if clip is None else torch.mul(grad, clip, out=out)
