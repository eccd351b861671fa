"""A stand-in for a GPU, for PyTorch's builds for CUDA: `python -m tests.stand_in COMMAND`.

The command runs on PyTorch's own code for CUDA, up to CUDA's runtime and driver, which the C++ here replaces. The
device's memory is the host's. Streams, events, pinned memory, PyTorch's allocator and recordings of CUDA graphs work as
on a GPU, and a stream does its work as late as it may.

- `__main__`: builds the library, once, and runs a command with it.
- `operations`: PyTorch's operations, computed on the CPU.
- `machine`: Triton's kernels, executed as machine code (`kernels.machine_code`).
- `site/`: what Python imports first in every process of the command.
- `queues.cpp`: work that waits until somebody waits for it; `streams.cpp`, `graphs.cpp`, `memory.cpp`, `device.cpp`,
  `launches.cpp`: the runtime; `driver.cpp`: what Triton calls; `products.cpp`: cuBLAS; `missing.c`: what nobody calls.

What it cannot do: time, several GPUs, NCCL, and the profiler's events of kernels. Kernels that Inductor writes have
instructions that `kernels.machine_code` does not know yet, which is said, and their results are wrong.

With STAND_IN_COUNTS=1 in the environment nothing is computed, so that sizes may be real ones; STAND_IN_GRAPHS names a
file that gets the nodes of every recorded graph.
"""
