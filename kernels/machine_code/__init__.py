"""Machine code of Triton's kernels, for sm_80 to sm_90, executed on a CPU: a developer's tool.

ptxas 12.8 made wrong code of one kernel, which no test of ours could see without a GPU. Here the instructions
themselves run, as the disassembler prints them, for whole thread blocks and with all numbers. `python -m
kernels.machine_code` does so for every launch of the comparisons in `kernels.check`, through Triton's own launch path:
what a GPU would store is compared with the reference. `kernels.inspect` does so for some blocks of kernels with matrix
products. On the way the machine finds

- addresses outside of the launch's tensors, of shared memory or of the stack, and misaligned ones;
- accesses of two warps to the same bytes with no barrier between, also by tensor cores or asynchronous copies;
- numbers that depend on bits which were never written (to the bit), where it matters: in addresses, branches, matrix
  products and what is stored in tensors;
- registers touched while a matrix product still uses them, lanes that differ where the hardware takes one for all;

and counts, for one tile of the inner loop, instructions and accesses of shared memory, which `python -m
kernels.inspect` prints and has bars for. It does not find what depends on how fast warps are: they run in step. Times,
caches and conflicts between blocks are not looked at. An instruction that is not known is an error that says so.

- `listing`: instructions and operands, from text.
- `__main__`, `execution`: the command, and a stand-in for Triton's driver, which executes what it should launch.
- `launch`, `examples`: a recorded launch, and inputs for each operation.
- `emulation`, `measurement`: some blocks of a launch; the same for a configuration that `kernels.inspect` has compiled.
- `cubin`: a compiled kernel's file.
- `machine`, `registers`: a thread block, and what instructions read and write.
- `integers`, `floats`, `doubles`, `predicates`, `moves`, `accesses`, `products`: what each instruction does.
- `memory`, `tensors`, `hazards`, `running`: memories, races, and matrix products under way.
- `findings`, `wavefronts`: faults, and the accesses that one instruction takes.

It is for `kernels.inspect` and tests; nothing that a run imports needs it.
"""
