"""The registered operation: checks of its arguments, and dispatch to an implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import torch_private
from kernels.backend import triton_kernel
from kernels.lamb import cpp, eager, reference
from kernels.lamb.arguments import Clipping, Settings, Tensors

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
    """See `kernels.lamb_step`; `averages` may be empty, and `lr_tensor` takes precedence over `lr`.

    With `max_grad_norm` the gradients' norm is written to `gradient_norm`. Without it, `clip` is the gradients' factor,
    a scalar in the parameters' dtype, or None; a negative factor skips the step. The process group is passed by name,
    as a schema cannot hold it.
    """
    tensors = Tensors(params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    check_tensors(tensors)
    check_lr(lr_tensor, params[0].device)
    if seed is not None and exp_avgs[0].dtype != torch.bfloat16:
        raise ValueError(f"stochastic_rounding_seed: moments are {exp_avgs[0].dtype}; only bf16 ones are rounded")
    if backend == "triton" and params[0].dtype == torch.float32:
        implementation = triton_kernel("lamb").launch
    elif backend == "cpp" and group_name is None and cpp.supports(params, grads, exp_avgs):
        implementation = cpp.lamb_step
    elif eager.supports(params, exp_avgs):
        implementation = eager.lamb_step
    else:
        implementation = reference.lamb_step
    group = None if group_name is None else torch_private.process_group(group_name)
    settings = Settings(
        lr if lr_tensor is None else lr_tensor, beta1, beta2, eps, weight_decays, average_decay, seed, group
    )
    implementation(tensors, Clipping(max_grad_norm, gradient_norm, clip), settings)


@lamb_step.register_fake
def _(*args) -> None:  # noqa: ANN002
    del args  # all outputs are written in place


def check_numbers(beta1: float, beta2: float, max_grad_norm: float | None, gradient_norm: Tensor | None) -> None:
    """Raise ValueError if a number is out of range."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: {beta} is not in [0, 1)")
    if max_grad_norm is not None and not max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm: {max_grad_norm} is not a number from 0")
    if gradient_norm is not None and max_grad_norm is None:
        raise ValueError("gradient_norm: clips nothing without max_grad_norm")


def check_lr(lr: float | Tensor | None, device: torch.device) -> None:
    """Raise ValueError if the learning rate is a tensor that the kernels cannot read."""
    if not isinstance(lr, Tensor):
        return
    if (lr.numel(), lr.dtype) != (1, torch.float32):
        raise ValueError(f"lr: {lr.dtype} of {lr.numel()} elements; a tensor must be an fp32 scalar")
    if lr.device != device:
        raise ValueError(f"lr: on {lr.device}, the parameters are on {device}")


def clipping(gradient_norm: Tensor | None, max_grad_norm: float | None, like: Tensor) -> Clipping:
    """How to clip: by the factor of a norm that is given, or by a norm that is yet to be computed."""
    if gradient_norm is not None:
        gradient_norm = gradient_norm.to(like)
        return Clipping(None, gradient_norm, reference.clip_factor(gradient_norm, max_grad_norm))
    if max_grad_norm is not None:
        gradient_norm = torch.empty((), dtype=like.dtype, device=like.device)
    return Clipping(max_grad_norm, gradient_norm)


def check_lengths(tensors: Tensors) -> None:
    """Raise ValueError unless each list has one tensor per parameter, each its own; `averages` may be empty."""
    count = len(tensors.params)
    for name, each in tensors._asdict().items():
        if len(each) != count and (each or name != "averages"):
            raise ValueError(f"{name}: {len(each)} tensors for {count} parameters")
        for index, tensor in enumerate(each):
            if tensor is None:
                raise ValueError(f"{name}[{index}]: None; leave the parameter out of all lists")
    for name in ("params", "steps"):  # of which every kernel writes each once, in no fixed order
        if len(set(map(id, getattr(tensors, name)))) < count:
            raise ValueError(f"{name}: one tensor is there twice")


def check_tensors(tensors: Tensors) -> None:
    """Raise ValueError if shapes, devices, dtypes or layouts are not those that every implementation expects."""
    lists = tensors._asdict()
    params, steps = tensors.params, lists.pop("steps")
    dtype, device = params[0].dtype, params[0].device
    if dtype not in {torch.float32, torch.float64}:
        raise ValueError(f"params: {dtype}; small updates need fp32 (or fp64)")
    for name, each in lists.items():
        reduced = name in {"grads", "exp_avgs", "exp_avg_sqs"} and each[0].dtype == torch.bfloat16
        expected = torch.bfloat16 if reduced else dtype
        for index, tensor in enumerate(each):
            if tensor.shape != params[index].shape:
                raise ValueError(f"{name}[{index}]: {tuple(tensor.shape)}, its parameter {tuple(params[index].shape)}")
            if tensor.device != device:
                raise ValueError(f"{name}[{index}]: on {tensor.device}, params[0] is on {device}")
            if tensor.dtype != expected:
                raise ValueError(f"{name}[{index}]: {tensor.dtype}, expected {expected}; lists hold one type each")
            if tensor.layout != torch.strided or not tensor.is_contiguous():
                raise ValueError(f"{name}[{index}]: must be dense and contiguous")
    exp_avg, exp_avg_sq = tensors.exp_avgs[0], tensors.exp_avg_sqs[0]
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"exp_avgs are {exp_avg.dtype}, exp_avg_sqs {exp_avg_sq.dtype}; they must agree")
    for index, step in enumerate(steps):
        if (step.numel(), step.dtype, step.device) != (1, torch.float32, device):
            raise ValueError(f"steps[{index}]: must be an fp32 scalar on {device}")


def check_copies(params: list[Tensor], copies: Sequence[Tensor | None]) -> None:
    """Raise ValueError if the copies that a prepared step writes are not like their parameters, or all bf16."""
    if copies and len(copies) != len(params):
        raise ValueError(f"copies: {len(copies)} tensors or None for {len(params)} parameters")
    of_each = [(index, copy) for index, copy in enumerate(copies) if copy is not None]
    dtypes = {copy.dtype for _, copy in of_each}
    if len(dtypes) > 1 or not dtypes <= {params[0].dtype, torch.bfloat16}:
        raise ValueError(f"copies: {', '.join(map(str, dtypes))}; expected all {params[0].dtype} or all torch.bfloat16")
    for index, copy in of_each:
        param = params[index]
        if (copy.shape, copy.device) != (param.shape, param.device) or not copy.is_contiguous():
            raise ValueError(
                f"copies[{index}]: {tuple(copy.shape)} on {copy.device}, its parameter {tuple(param.shape)} on "
                f"{param.device}; must be contiguous"
            )
