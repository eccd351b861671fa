"""LAMB by C++ kernels, for unsharded tensors in fp32."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import cpp
from kernels.lamb.reference import clip_factor


def supports(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]) -> bool:
    """Whether `lamb_step` takes these tensors; each list has one dtype."""
    is_fp32 = {params[0].dtype, grads[0].dtype, exp_avgs[0].dtype} == {torch.float32}
    return params[0].device.type == "cpu" and is_fp32


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
    group: ProcessGroup | None = None,
) -> None:
    """See `kernels.lamb.op.lamb_step`; `seed` and `group` are unused: fp32 moments, unsharded tensors."""
    del seed, group
    sizes = torch.tensor([param.numel() for param in params])
    if max_grad_norm is not None:
        norm = torch.empty((), dtype=torch.float64)
        cpp.call("lamb_gradient_norm", (_pointers(grads), sizes, norm, len(params)))
        clip = clip_factor(gradient_norm.copy_(norm), max_grad_norm)
    factor = 1.0 if clip is None else float(clip)
    if factor < 0:
        return
    lists = [
        _pointers(tensors) if tensors else None for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    ]
    decays = torch.tensor(weight_decays, dtype=torch.float64)
    settings = torch.tensor([factor, float(lr), beta1, beta2, eps, average_decay], dtype=torch.float64)
    cpp.call("lamb_whole", (*lists, sizes, decays, settings, len(params)))


def _pointers(tensors: list[Tensor]) -> ctypes.Array[Any]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
