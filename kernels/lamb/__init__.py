"""LAMB: Adam's step, scaled per tensor by ‖p‖/‖u‖ (You et al. 2020, arXiv 1904.00962)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.backend import choose_backend
from kernels.lamb import op
from kernels.lamb.arguments import Tensors
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

    Updates `params`, `exp_avgs`, `exp_avg_sqs`, `steps` and `averages` in place; `grads` is only read. No device sync.
    A CUDA graph can capture a call if an earlier one had the same tensors, and `lr` is a tensor.

    With sharded tensors, norms are those of the unsharded tensors, and all processes skip the same steps: two small
    all-reduces per step, one of them for `max_grad_norm`.

    Args:
        params: contiguous tensors of any shapes on one device, fp32 (or fp64, which runs in PyTorch on every backend).
        grads: like `params`, or all bf16.
        exp_avgs: first moments, like `params`, or all bf16.
        exp_avg_sqs: second moments, in the dtype of the first.
        steps: fp32 scalars on the parameters' device, each tensor's number of updates so far; incremented.
        lr: learning rate, including the schedule's factor; a tensor must be an fp32 scalar on the device.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the square root.
        weight_decay: decoupled decay, one for all tensors or one per tensor; 0 also disables a tensor's trust ratio.
        max_grad_norm: gradients are scaled so that their global norm is at most this, as by
            torch.nn.utils.clip_grad_norm_. If it is not finite, the step is skipped: no tensor changes.
            None: no clipping, and no step is skipped.
        gradient_norm: scalar, the norm to clip by, if it covers more gradients than these; None computes it.
        averages: exponential moving averages of `params`, like them, or None.
        average_decay: average ← average_decay · average + (1 − average_decay) · new parameter.
        stochastic_rounding_seed: bf16 moments are rounded stochastically, by Philox keyed by this number, the tensor's
            index in the list, its step and the element; None rounds to nearest even. Elements are counted within a
            shard, so ranks must have different seeds to round independently.
        group: the processes over which the tensors are sharded: the same lists in the same order on each; shards may be
            empty. A collective call: every process must make it. None: the tensors are not sharded.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        The gradients' norm before clipping, finite or not, a scalar in the parameters' dtype on their device; None
        without `max_grad_norm`.

    Raises:
        ValueError: lists, shapes, dtypes or devices do not match, a tensor is not contiguous, or a number is out of
            range.
    """
    tensors = Tensors(params, grads, exp_avgs, exp_avg_sqs, steps, averages or [])
    op.check_lengths(tensors)
    decays = [float(weight_decay)] * len(params) if isinstance(weight_decay, int | float) else list(weight_decay)
    if len(decays) != len(params):
        raise ValueError(f"weight_decay: {len(decays)} numbers for {len(params)} parameters")
    op.check_numbers(beta1, beta2, max_grad_norm, gradient_norm)
    if not params:
        return gradient_norm if gradient_norm is not None or max_grad_norm is None else torch.zeros(())
    max_norm, norm, clip = op.clipping(gradient_norm, max_grad_norm, params[0])
    is_tensor = isinstance(lr, Tensor)
    with torch.no_grad():
        op.lamb_step(
            *tensors,
            norm if clip is None else None,
            clip,
            lr=1.0 if is_tensor else lr,
            lr_tensor=lr if is_tensor else None,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decays=decays,
            max_grad_norm=max_norm,
            average_decay=average_decay,
            seed=stochastic_rounding_seed,
            backend=choose_backend(backend, params[0].device),
            group_name=None if group is None else group.group_name,
        )
    return norm
