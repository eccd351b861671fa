"""The two ways in which the tests run, see tests/README.md: on the CPU, or, in tests/gpu alone, on a GPU.

The environment's GPTBERT_TEST_DEVICE says which: "cpu", where it is not set, or "cuda", as `make test-gpu` sets it.
"""

import os

DEVICE = os.environ.get("GPTBERT_TEST_DEVICE", "cpu")


def prepare_environment() -> None:
    """Hide the GPUs from this process and from all that it starts, and have Triton interpret; on a GPU neither.

    PyTorch reads these variables when it first looks for a GPU, Triton when a kernel's module is imported.

    Raises:
        ValueError: GPTBERT_TEST_DEVICE is neither.
    """
    if DEVICE == "cpu":
        # no such device: to HIP an empty list would hide nothing
        os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1") | {"TRITON_INTERPRET": "1"}
    elif DEVICE == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        raise ValueError(f"GPTBERT_TEST_DEVICE={DEVICE!r}: expected cpu or cuda")
