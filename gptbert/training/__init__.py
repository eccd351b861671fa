"""How a step's gradients and updates are computed.

- `eager_step`: operation by operation, as PyTorch launches them, with DDP or FSDP.
- `recorded_step`: the same over tensors that stay where they are, recorded in CUDA graphs (`--cuda_graph`).
- `cuda_graph`: recording of functions, and a way on where one cannot be recorded.
"""
