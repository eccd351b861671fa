"""How a step's gradients and updates are computed.

- `step`: a step, operation by operation with DDP or FSDP, or recorded.
- `cuda_graph`: recording of functions in CUDA graphs, and a way on where one cannot be recorded.
- `packed_weights`: the blocks' weights, narrowed once a step.
"""
