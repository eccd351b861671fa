"""Gradients of the mixes' weights in Triton: products of a group's ∂x with all y up to it, added in a fixed order.

Letters as in kernel.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import use_right_assembler
from kernels.configuration import Configuration, launch_warps
from kernels.depth_mix.fused import GROUP

_G = tl.constexpr(GROUP)
NUM_WARPS = 4
GRAM_BLOCK = 128  # elements of a representation at a time
GRAM_STAGES = {torch.bfloat16: 4, torch.float32: 2}  # fp32's tiles are twice as large
PARTS_BLOCK = 64  # programs' parts at a time


@triton.jit
def row_of(depth):
    """Where α_depth begins."""
    return (depth - 1) * (depth + 2) // 2


@triton.jit(do_not_specialize=["depth", "count", "last"])
def gram_kernel(
    values_ptr, parts_ptr, slot_stride: tl.int64, depth, count, last,
    REPRESENTATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's part of y_m · ∂x_n for m ≤ last and n = depth … depth + count − 1, [16, REPRESENTATIONS] fp32."""
    # 1. Pointers to the y_m and to the group's ∂x_n.
    old = tl.arange(0, REPRESENTATIONS)
    new = tl.arange(0, 16)
    old_ptrs = values_ptr + old.to(tl.int64)[:, None] * slot_stride
    new_ptrs = values_ptr + (new + depth + _G).to(tl.int64)[:, None] * slot_stride
    # 2. Products of every num_programs-th block of elements. Of 16 rows they are no wgmma, for which Triton 3.6 leaves
    #    out the fence behind copies to shared memory.
    sums = tl.zeros([16, REPRESENTATIONS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(slot_stride, BLOCK), tl.num_programs(0)):
        offsets = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        y = tl.load(old_ptrs + offsets, mask=(old <= last)[:, None] & (offsets < slot_stride), other=0.0)
        grad = tl.load(new_ptrs + offsets, mask=(new < count)[:, None] & (offsets < slot_stride), other=0.0)
        sums = tl.dot(grad, tl.trans(y), sums, input_precision="ieee")
    parts_ptr += tl.program_id(0) * 16 * REPRESENTATIONS
    tl.store(parts_ptr + new[:, None] * REPRESENTATIONS + old[None, :], sums)


@triton.jit(do_not_specialize=["num_parts", "depth"])
def gram_sums_kernel(
    parts_ptr, grad_alpha_ptr, num_parts, depth, REPRESENTATIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """∂α of depth + program: the parts of `gram_kernel`, added in their order."""
    new = tl.program_id(0)
    old = tl.arange(0, REPRESENTATIONS)
    sums = tl.zeros([BLOCK, REPRESENTATIONS], tl.float32)
    for start in range(0, num_parts, BLOCK):
        part = (start + tl.arange(0, BLOCK))[:, None]
        places = part * (16 * REPRESENTATIONS) + new * REPRESENTATIONS + old[None, :]
        sums += tl.load(parts_ptr + places, mask=part < num_parts, other=0.0)
    depth += new
    tl.store(grad_alpha_ptr + row_of(depth) + old, tl.sum(sums, axis=0), mask=old <= depth)


def weight_gradients(values: Tensor, grad_alpha: Tensor, begin: int, last: int, most_programs: int) -> None:
    """Launch both kernels: ∂α of the mixes begin … last of a group, whose ∂x are in `values`.

    Args:
        values: see `kernels.depth_mix.fused.backward`.
        grad_alpha: [M(M + 3)/2] fp32; those of the mixes are written.
        begin: the group's first mix.
        last: its last.
        most_programs: that add products; the sums depend on it.
    """
    size, count = values.shape[1], last - begin + 1
    programs, representations = min(triton.cdiv(size, GRAM_BLOCK), most_programs), _padded(last + 1)
    parts = torch.empty(programs, 16, representations, dtype=torch.float32, device=values.device)
    use_right_assembler()
    gram_kernel[(programs,)](
        values, parts, size, begin, count, last, REPRESENTATIONS=representations, BLOCK=GRAM_BLOCK,
        num_warps=launch_warps(NUM_WARPS), num_stages=GRAM_STAGES[values.dtype],
    )  # fmt: skip
    gram_sums_kernel[(count,)](
        parts, grad_alpha, programs, begin, REPRESENTATIONS=representations, BLOCK=PARTS_BLOCK,
        num_warps=launch_warps(NUM_WARPS),
    )  # fmt: skip


def _padded(count: int) -> int:
    """Rows of a tile of this many representations."""
    return max(16, triton.next_power_of_2(count))


def configurations() -> list[Configuration]:
    """Variants of both kernels for up to 63 mixes."""
    found = []
    for representations in (16, 32, 64):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            pointers = {"values_ptr": f"*{name}", "parts_ptr": "*fp32", "slot_stride": "i64"}
            found.append(
                Configuration(
                    f"depth_mix/gram {representations} {name}",
                    gram_kernel,
                    pointers | dict.fromkeys(("depth", "count", "last"), "i32"),
                    {"REPRESENTATIONS": representations, "BLOCK": GRAM_BLOCK},
                    num_warps=NUM_WARPS,
                    num_stages=GRAM_STAGES[dtype],
                    aligned=frozenset(pointers),
                    has_products=dtype == torch.bfloat16,
                    streams=False,
                    # a word, with registers left; for models of 16 layers on
                    most_spilled={"any": 8 if representations == 64 else 0},
                )
            )
        pointers = dict.fromkeys(("parts_ptr", "grad_alpha_ptr"), "*fp32")
        found.append(
            Configuration(
                f"depth_mix/gram sums {representations}",
                gram_sums_kernel,
                pointers | dict.fromkeys(("num_parts", "depth"), "i32"),
                {"REPRESENTATIONS": representations, "BLOCK": PARTS_BLOCK},
                num_warps=NUM_WARPS,
                aligned=frozenset(pointers),
                streams=False,
            )
        )
    return found
