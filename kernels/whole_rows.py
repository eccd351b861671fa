"""Triton kernels whose programs have whole rows: how wide those may be, and how many a program has."""

import torch

from kernels.backend import interpreted

WIDEST = 8192  # elements of a row
ROWS, ROWS_INTERPRETED = 1, 16  # the interpreter takes 13 ms for a program of any size


def launch_rows() -> int:
    """Rows of a program: one, and more in the interpreter."""
    return ROWS_INTERPRETED if interpreted() else ROWS


def take(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether they take rows of this dtype: fp32, and bf16 but in the interpreter, where its products are wrong."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and device.type == "cuda")
