"""Triton kernels whose programs have whole rows: how wide those may be, and how many a program has."""

import torch

from kernels.backend import computes_as_gpu, interpreted

WIDEST = 8192  # elements of a row
ROWS, ROWS_INTERPRETED = 1, 16  # the interpreter takes 13 ms for a program of any size


def launch_rows() -> int:
    """Rows of a program: one, and more in the interpreter."""
    return ROWS_INTERPRETED if interpreted() else ROWS


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels support rows of a dtype: fp32, and on GPUs bf16.

    Args:
        dtype: of the rows.
        device: theirs; on a CPU the kernels run in the interpreter.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and computes_as_gpu(device))
