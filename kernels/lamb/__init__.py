"""LAMB: Adam's step, scaled per tensor by ‖p‖/‖u‖ (You et al. 2020, arXiv 1904.00962)."""

from torch import Tensor

from kernels.backend import choose_backend
from kernels.lamb import reference


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
    backend: str | None = None,
) -> None:
    """Update `params`, `exp_avgs` and `exp_avg_sqs` in place; `grads` is only read.

    Args:
        params: tensors of any shapes, fp32 (fp64 in tests).
        grads: as `params`, already clipped.
        exp_avgs: first moments, as `params`.
        exp_avg_sqs: second moments, as `params`.
        step: number of this update, from 1.
        lr: learning rate, the schedule's factor included.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the square root.
        weight_decay: decoupled decay; 0 also switches the trust ratio off (spec: no-decay groups take Adam's step).
        backend: see `kernels.backend.choose_backend`.
    """
    choose_backend(backend, params[0].device)
    reference.lamb_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )
