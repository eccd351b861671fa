"""LAMB: Adam's step, scaled per tensor by ‖p‖/‖u‖ (You et al. 2020, arXiv 1904.00962)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.backend import choose_backend
from kernels.lamb import op
from kernels.lamb.prepared import PreparedStep

__all__ = ["PreparedStep", "lamb_step"]


def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    max_grad_norm: float | None = None,
    gradient_norm: Tensor | None = None,
    averages: list[Tensor] | None = None,
    average_decay: float = 0.999,
    stochastic_rounding_seed: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """One step of LAMB for all tensors of a model, with gradient clipping and moving averages (docs/model.md#lamb).

    Updates `params`, `exp_avgs`, `exp_avg_sqs`, `steps` and `averages` in place; `grads` is only read. Never waits for
    the device. A CUDA graph may record it once it has seen the same tensors before, and `lr` is a tensor.

    Where every process of a group holds a shard of each tensor, norms are those of the whole tensors, and all processes
    skip the same steps: two small all-reduces in a step, one of them for `max_grad_norm`.

    Args:
        params: contiguous tensors of any shapes on one device, fp32 (or fp64, which runs in PyTorch on any backend).
        grads: as `params`, or all bf16.
        exp_avgs: first moments, as `params`, or all bf16.
        exp_avg_sqs: second moments, of the first ones' type.
        steps: fp32 scalars on the parameters' device, each tensor's number of updates so far; grow by one.
        lr: learning rate, the schedule's factor included; as a tensor an fp32 scalar on the device.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the square root.
        weight_decay: decoupled decay, one for all tensors or one each; 0 also switches a tensor's trust ratio off.
        max_grad_norm: gradients longer than this, all taken together, count as if scaled down to it, as by
            torch.nn.utils.clip_grad_norm_. Where their norm is not finite, the step is skipped: nothing is written, to
            the bit. None takes gradients as they are and skips nothing.
        gradient_norm: the norm that `max_grad_norm` is about, a scalar, if that of more gradients than these; None
            computes it.
        averages: exponential moving averages of `params`, like them; None keeps none.
        average_decay: average ← average_decay · average + (1 − average_decay) · the new parameter.
        stochastic_rounding_seed: bf16 moments are rounded up or down at random, by Philox keyed by this number, the
            tensor's place in the list, its step and the element; None rounds to the nearest. Elements are counted in
            each shard, so that ranks round alike unless each has a seed of its own.
        group: the processes over which the tensors are spread: the same lists in the same order on each, any of whose
            tensors may be empty. Every one must make the call. None: the tensors are whole.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        The gradients' norm before clipping, finite or not, a scalar of the parameters' type on their device; None
        without `max_grad_norm`.

    Raises:
        ValueError: lists, shapes, types or devices do not fit together, a tensor is not contiguous, or a number is out
            of range.
    """
    averages = averages or []
    op.check_lengths(params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    decays = [float(weight_decay)] * len(params) if isinstance(weight_decay, int | float) else list(weight_decay)
    if len(decays) != len(params):
        raise ValueError(f"weight_decay: {len(decays)} numbers for {len(params)} parameters")
    op.check_numbers(beta1, beta2, max_grad_norm, gradient_norm)
    if not params:
        return gradient_norm if gradient_norm is not None or max_grad_norm is None else torch.zeros(())
    gradient_norm, clip, max_grad_norm = op.clipping(gradient_norm, max_grad_norm, params[0])
    is_tensor = isinstance(lr, Tensor)
    with torch.no_grad():
        op.lamb_step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            averages,
            gradient_norm if clip is None else None,
            clip,
            lr=1.0 if is_tensor else lr,
            lr_tensor=lr if is_tensor else None,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decays=decays,
            max_grad_norm=max_grad_norm,
            average_decay=average_decay,
            seed=stochastic_rounding_seed,
            backend=choose_backend(backend, params[0].device),
            group_name=None if group is None else group.group_name,
        )
    return gradient_norm
