"""The processes of a run and the machines they run on.

- `world`: torchrun's environment, the process group, reductions, errors raised on all ranks.
- `agreement`: what must be the same on every rank.
- `fsdp`: sharded weights, gradients, averages and moments (`--parallel fsdp`).
- `flat_gradients`: gradients in one buffer, summed over ranks in large pieces (`--cuda_graph`).
- `fresh_store`: a separate key-value store for each start under `torchrun --max_restarts`.
- `random_state`: the random numbers of dropout on a rank.
- `lone_work`: work of the main rank alone, for which the others wait while its process lives.
- `stop_signal`: signals that ask a run to save and stop.
- `memory`: peak memory, and an allocator that keeps freed memory.
- `hardware`: a device's name, a process's cores, support of bf16, the wait for a GPU.
"""
