"""LAMB in plain PyTorch, one tensor after another: spec.md §4 read aloud."""

import torch
from torch import Tensor


@torch.no_grad()
def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See `kernels.lamb_step`."""
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
        update = torch.div(exp_avg / (1 - beta1**step), update, out=update)
        if weight_decay == 0:
            param.sub_(update, alpha=lr)
            continue
        update.add_(param, alpha=weight_decay)
        param_norm, update_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
        ratio = torch.where((param_norm > 0) & (update_norm > 0), param_norm / update_norm, 1.0)
        param.sub_(update.mul_(ratio * lr))
