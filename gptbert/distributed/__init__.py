"""The processes of a run and the machines that they run on.

- `world`: torchrun's environment, the process group, reductions, errors that all ranks share.
- `fsdp`: sharded weights, gradients, averages and moments (`--parallel fsdp`).
- `fresh_store`: a key-value store of its own for each start under `torchrun --max_restarts`.
- `stop_signal`: signals that ask a run to save and stop.
- `memory`: peak memory, and memory that stays with the process.
- `hardware`: the name of a device.
"""
