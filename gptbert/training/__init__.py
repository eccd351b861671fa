"""What is decided before the first step, and how a step's gradients and updates are computed.

- `preparation`: the backend and the run's folder.
- `kernel_check`: the check of the Triton kernels, in a process of its own.
- `compile_choice`: whether the run is compiled.
- `step`: a step, operation by operation with DDP or FSDP, or recorded.
- `cuda_graph`: recording of functions in CUDA graphs, and a way on where one cannot be recorded.
- `packed_weights`: the weights of large products, narrowed once a step.
"""
