"""The two ways in which the tests run, see tests/README.md: on the CPU, or, in tests/gpu alone, on a GPU.

The environment's GPTBERT_TEST_DEVICE says which: "cpu", where it is not set, or "cuda", as `make test-gpu` sets it.
"""

import os

DEVICE = os.environ.get("GPTBERT_TEST_DEVICE", "cpu")
if DEVICE not in {"cpu", "cuda"}:
    raise ValueError(f"GPTBERT_TEST_DEVICE={DEVICE!r}: expected cpu or cuda")

# Hides all GPUs from a process and from those that it starts, and has Triton interpret. PyTorch reads it when it first
# looks for a GPU, Triton when a kernel's module is imported. To HIP an empty list would hide nothing.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "TRITON_INTERPRET": "1"}
