"""The two test lanes, see tests/README.md: on the CPU, or, for tests/gpu only, on a GPU.

The environment variable GPTBERT_TEST_DEVICE selects one: "cpu" (default) or "cuda", as `make test-gpu` sets it.
"""

import os

DEVICE = os.environ.get("GPTBERT_TEST_DEVICE", "cpu")
if DEVICE not in {"cpu", "cuda"}:
    raise ValueError(f"GPTBERT_TEST_DEVICE={DEVICE!r}: expected cpu or cuda")
# Whether Inductor compiles in bf16 too, as `make test-torch` has it do: a minute of two cores.
ALL_CODE = bool(os.environ.get("GPTBERT_TEST_ALL_CODE"))

# Hides all GPUs from this process and its children, and makes Triton interpret. PyTorch reads it at its first GPU
# query, Triton when a kernel's module is imported. HIP would ignore an empty list.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "TRITON_INTERPRET": "1"}
