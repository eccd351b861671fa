"""Dropout of one tensor by several masks in Triton: of the position vectors, by a mask for each layer.

Letters of shapes: N elements, L masks.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps
from kernels.dropout_hash import first_words, keep_arguments, keep_mask

BLOCK = 1024  # elements of a program
NUM_WARPS = 4
_FREE = ["seed_stride", "threshold"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["seeds_ptr"])
def forward_kernel(
    x_ptr, seeds_ptr, result_ptr, size, seed_stride, threshold, keep_scale: tl.float32, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of x by one mask; grid [blocks, L]."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tl.program_id(1)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    seed_ptr = seeds_ptr + mask * seed_stride
    kept = keep_mask(first_words(offsets, seed_ptr), seed_ptr, threshold)
    result = tl.where(kept, x * keep_scale, 0.0).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + mask.to(tl.int64) * size + offsets, result, mask=offsets < size)


@triton.jit(do_not_specialize=[*_FREE, "masks"], do_not_specialize_on_alignment=["seeds_ptr"])
def backward_kernel(
    grad_ptr, seeds_ptr, of_x_ptr, size, masks, seed_stride, threshold, keep_scale: tl.float32, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of the gradient of x: the sum over all masks, in their order."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for mask in range(masks):
        seed_ptr = seeds_ptr + mask * seed_stride
        kept = keep_mask(first_words(offsets, seed_ptr), seed_ptr, threshold)
        grad = tl.load(grad_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
        total += tl.where(kept, grad * keep_scale, 0.0)
        grad_ptr += size
    tl.store(of_x_ptr + offsets, total, mask=offsets < size)


def forward(x: Tensor, seeds: Tensor, dropout_prob: float, dtype: torch.dtype) -> Tensor:
    """Launch `forward_kernel`.

    Args:
        x: contiguous, of any shape.
        seeds: [L, 2] int32; rows may stand apart.
        dropout_prob: probability of a zero.
        dtype: of the result.

    Returns:
        [L, *x.shape].

    Raises:
        ValueError: x has 2³¹ elements or more.
    """
    size, masks = x.numel(), len(seeds)
    if size >= 2**31:
        raise ValueError(f"dropouts: {size} elements; places in masks are int32")
    result = x.new_empty(masks, *x.shape, dtype=dtype)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(size, BLOCK), masks)](
            x, seeds, result, size, seeds.stride(0), *keep_arguments(seeds, dropout_prob),
            BLOCK=BLOCK, num_warps=launch_warps(NUM_WARPS),
        )  # fmt: skip
    return result


def backward(grad: Tensor, seeds: Tensor, dropout_prob: float, dtype: torch.dtype) -> Tensor:
    """Launch `backward_kernel`: of a contiguous gradient [L, …] to that of x, in its dtype."""
    of_x = grad.new_empty(grad.shape[1:], dtype=dtype)
    size = of_x.numel()
    with torch.cuda.device_of(grad):
        backward_kernel[(triton.cdiv(size, BLOCK),)](
            grad, seeds, of_x, size, len(seeds), seeds.stride(0), *keep_arguments(seeds, dropout_prob),
            BLOCK=BLOCK, num_warps=launch_warps(NUM_WARPS),
        )  # fmt: skip
    return of_x


def configurations() -> list[Configuration]:
    """Both kernels: x in fp32, its copies in the run's dtype."""
    return [
        _configuration(kernel, dtype) for kernel, dtype in product((forward_kernel, backward_kernel), ("bf16", "fp32"))
    ]


def _configuration(kernel: Any, dtype: str) -> Configuration:
    kinds = {"x_ptr": "*fp32", "of_x_ptr": "*fp32", "seeds_ptr": "*i32", "keep_scale": "fp32"}
    kinds |= {"result_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}"}
    types = {name: kinds.get(name, "i32") for name in kernel.arg_names if name != "BLOCK"}
    aligned = {name for name in types if name.endswith("_ptr") and name != "seeds_ptr"}
    return Configuration(
        f"dropout/{kernel.__name__.removesuffix('_kernel')} {dtype}",
        kernel,
        types,
        {"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        aligned=frozenset(aligned | {"size"}),
    )
