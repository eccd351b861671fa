"""LAMB for CPUs: the same results as `reference.py`, in blocks that stay in the cache, with moments by fused Adam."""

import torch
from torch import Tensor

from kernels import torch_private
from kernels.lamb.arguments import Clipping, Settings, Tensors
from kernels.lamb.reference import clip_factor
from kernels.lamb.shards import whole_norms

BLOCK = 2**18  # elements, 1 MB in fp32, of each of the six or seven tensors of a block


def supports(params: list[Tensor], exp_avgs: list[Tensor]) -> bool:
    """Whether `lamb_step` takes these tensors with this PyTorch; each list has one dtype."""
    is_of_one_type = exp_avgs[0].dtype == params[0].dtype
    return params[0].device.type == "cpu" and is_of_one_type and torch_private.fused_adamw() is not None


def lamb_step(tensors: Tensors, clipping: Clipping, settings: Settings) -> None:
    """See `kernels.lamb_step`; there is no seed, as moments have the parameters' dtype."""
    params, grads, exp_avgs, exp_avg_sqs, steps, averages = tensors
    lr, beta1, beta2, eps, weight_decays, average_decay, _, group = settings
    max_norm, norm, clip = clipping
    if max_norm is not None:
        norm.fill_(_norm([block for grad in grads for block in _blocks(grad)], norm.dtype))
        norm.copy_(whole_norms(norm, group))
        clip = clip_factor(norm, max_norm)
    if clip is not None and clip < 0:
        return
    every = range(len(params))
    # one tensor at a time, to hold one update in memory; with shards all at once, for a single all-reduce of the norms
    batches = [[index] for index in every] if group is None else [every]
    sizes = [param.numel() for param in params]
    updates = params[0].new_empty(max(sum(sizes[index] for index in batch) for batch in batches))
    scratch = params[0].new_empty(min(max(sizes), BLOCK))
    for batch in batches:
        batch_sizes = [sizes[index] for index in batch]
        batch_updates = updates[: sum(batch_sizes)].split(batch_sizes)
        norms = []  # pairs ‖p‖, ‖u‖; zeros without a trust ratio
        for index, update in zip(batch, batch_updates, strict=True):
            state = (params[index], grads[index], exp_avgs[index], exp_avg_sqs[index], steps[index].add_(1))
            _update_moments(update, *state, clip, scratch, beta1, beta2, eps, weight_decays[index])
            scaled = (params[index], update) if weight_decays[index] != 0 else ()
            norms.append([_norm(_blocks(tensor), tensor.dtype) for tensor in scaled] or [0.0, 0.0])
        if group is not None:
            norms = whole_norms(torch.tensor(norms, dtype=torch.float64), group).tolist()
        for index, update, (param_norm, update_norm) in zip(batch, batch_updates, norms, strict=True):
            step_size = float(lr) * (param_norm / update_norm if param_norm > 0 and update_norm > 0 else 1.0)
            blocks = (_blocks(tensor) for tensor in (update, params[index], *averages[index : index + 1]))
            for update_block, param_block, *average_blocks in zip(*blocks, strict=True):
                param_block.sub_(update_block, alpha=step_size)
                for average_block in average_blocks:  # at most one
                    average_block.lerp_(param_block, 1 - average_decay)


def _update_moments(
    update: Tensor,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    clip: Tensor | None,
    scratch: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One tensor's new moments, in place, and its update including decay, written to `update` [elements]."""
    fused_adamw = torch_private.fused_adamw()
    blocks = (_blocks(tensor) for tensor in (update, param, grad, exp_avg, exp_avg_sq))
    for update_block, param_block, grad_block, *moments in zip(*blocks, strict=True):
        # Adam with lr = −1, starting from zero, leaves its update
        fused_adamw(
            [update_block.zero_()],
            [_prepared(grad_block, clip, scratch[: grad_block.numel()])],
            *([moment] for moment in moments),
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
            update_block.add_(param_block, alpha=weight_decay)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(BLOCK)


def _norm(blocks: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> float:
    norms = [torch.linalg.vector_norm(block, dtype=dtype) for block in blocks]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


def _prepared(grad: Tensor, clip: Tensor | None, out: Tensor) -> Tensor:
    """The gradient, clipped and in the parameter's dtype; in `out` if it had to be computed."""
    if grad.dtype != out.dtype:
        grad = out.copy_(grad)
    return grad if clip is None else torch.mul(grad, clip, out=out)
