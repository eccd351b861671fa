"""LAMB by C++ kernels, for unsharded tensors in fp32."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels import cpp
from kernels.lamb.arguments import Clipping, Settings, Tensors
from kernels.lamb.reference import clip_factor


def supports(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]) -> bool:
    """Whether `lamb_step` takes these tensors; each list has one dtype."""
    is_fp32 = {params[0].dtype, grads[0].dtype, exp_avgs[0].dtype} == {torch.float32}
    return params[0].device.type == "cpu" and is_fp32


def lamb_step(tensors: Tensors, clipping: Clipping, settings: Settings) -> None:
    """See `kernels.lamb_step`; there is neither seed nor group: fp32 moments, unsharded tensors."""
    count = len(tensors.params)
    sizes = torch.tensor([param.numel() for param in tensors.params])
    max_norm, norm, clip = clipping
    if max_norm is not None:
        exact_norm = torch.empty((), dtype=torch.float64)
        cpp.call("lamb_gradient_norm", (_pointers(tensors.grads), sizes, exact_norm, count))
        clip = clip_factor(norm.copy_(exact_norm), max_norm)
    factor = 1.0 if clip is None else float(clip)
    if factor < 0:
        return
    lists = [_pointers(each) if each else None for each in tensors]
    lr, beta1, beta2, eps, weight_decays, average_decay, *_ = settings
    decays = torch.tensor(weight_decays, dtype=torch.float64)
    numbers = torch.tensor([factor, float(lr), beta1, beta2, eps, average_decay], dtype=torch.float64)
    cpp.call("lamb_whole", (*lists, sizes, decays, numbers, count))


def _pointers(tensors: list[Tensor]) -> ctypes.Array[Any]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
