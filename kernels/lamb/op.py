"""The registered operation: what it accepts, and which implementation runs."""

import importlib

import torch
from torch import Tensor

from kernels import torch_private
from kernels.lamb import blocked, cpp_step, reference

_STATE = {"params", "exp_avgs", "exp_avg_sqs", "steps", "averages", "gradient_norm"}


@torch.library.custom_op("kernels::lamb_step", mutates_args=_STATE)
def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    gradient_norm: Tensor | None,
    clip: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: list[float],
    max_grad_norm: float | None,
    average_decay: float,
    seed: int | None,
    backend: str,
    group_name: str | None,
) -> None:
    """See `kernels.lamb_step`; here `averages` may be empty, and `lr_tensor` counts before `lr`.

    With `max_grad_norm` the gradients' norm is written to `gradient_norm`. Without it, `clip` is what gradients are
    multiplied by, a scalar of the parameters' type; negative, it says that the step must be skipped. The group of
    shards has a name here, which is what a schema can take.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    if seed is not None and exp_avgs[0].dtype != torch.bfloat16:
        raise ValueError(f"stochastic_rounding_seed: moments are {exp_avgs[0].dtype}; only bf16 ones are rounded")
    if lr_tensor is not None and (lr_tensor.numel(), lr_tensor.dtype) != (1, torch.float32):
        raise ValueError(f"lr: {lr_tensor.dtype} of {lr_tensor.numel()} elements; a tensor must be an fp32 scalar")
    if lr_tensor is not None and lr_tensor.device != params[0].device:
        raise ValueError(f"lr: on {lr_tensor.device}, the parameters are on {params[0].device}")
    if backend == "triton" and params[0].dtype == torch.float32:
        implementation = importlib.import_module("kernels.lamb.kernel").launch  # Triton may be missing elsewhere
    elif cpp_step.supports(params, grads, exp_avgs, group_name):
        implementation = cpp_step.lamb_step
    elif blocked.supports(params, exp_avgs):
        implementation = blocked.lamb_step
    else:
        implementation = reference.lamb_step
    implementation(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        averages,
        gradient_norm,
        lr=lr if lr_tensor is None else lr_tensor,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decays=weight_decays,
        max_grad_norm=max_grad_norm,
        average_decay=average_decay,
        seed=seed,
        clip=clip,
        group=None if group_name is None else torch_private.process_group(group_name),
    )


@lamb_step.register_fake
def _(*args) -> None:  # noqa: ANN002
    del args  # everything is written in place


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
) -> None:
    dtype, device = params[0].dtype, params[0].device
    if dtype not in {torch.float32, torch.float64}:
        raise ValueError(f"params: {dtype}; small updates need fp32 (or fp64)")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "averages": averages}
    for name, tensors in lists.items():
        reduced = name in {"grads", "exp_avgs", "exp_avg_sqs"} and tensors[0].dtype == torch.bfloat16
        expected = torch.bfloat16 if reduced else dtype
        for index, tensor in enumerate(tensors):
            if tensor.shape != params[index].shape:
                raise ValueError(f"{name}[{index}]: {tuple(tensor.shape)}, its parameter {tuple(params[index].shape)}")
            if tensor.device != device:
                raise ValueError(f"{name}[{index}]: on {tensor.device}, params[0] is on {device}")
            if tensor.dtype != expected:
                raise ValueError(f"{name}[{index}]: {tensor.dtype}, expected {expected}; lists hold one type each")
            if tensor.layout != torch.strided or not tensor.is_contiguous():
                raise ValueError(f"{name}[{index}]: must be dense and contiguous")
    if exp_avgs[0].dtype != exp_avg_sqs[0].dtype:
        raise ValueError(f"exp_avgs are {exp_avgs[0].dtype}, exp_avg_sqs {exp_avg_sqs[0].dtype}; they must agree")
    for index, step in enumerate(steps):
        if (step.numel(), step.dtype, step.device) != (1, torch.float32, device):
            raise ValueError(f"steps[{index}]: must be an fp32 scalar on {device}")
