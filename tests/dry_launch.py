"""Launch every kernel as on a GPU, without a GPU: `python -m tests.dry_launch`.

Triton's own launch path runs (argument binding, specialization, options, the compiler's first stage) up to the driver's
launch, which is replaced by a stub. This finds launcher bugs that TRITON_INTERPRET would hide, and compares what is
compiled with `configurations()`, whose machine code `kernels.inspect` builds.

Prints a JSON list of launches, each once: check (the operation whose check made it), operation, kernel, types,
constants, aligned arguments, num_warps, max_registers.
"""

import importlib
import json
import os
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from kernels.configuration import TRITON_OPERATIONS
from kernels.machine_code.execution import driven

launches = {}
current = {"check": ""}  # the operation whose check runs


def record(source, metadata):
    """A kernel's launcher, which records a launch instead of executing it."""
    names = list(source.fn.arg_names)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    launch = {
        "operation": source.fn.__module__.split(".")[1],
        "kernel": source.fn.__name__,
        "types": {name: kind for name, kind in source.signature.items() if kind != "constexpr"},
        "constants": {
            name: value if isinstance(value, int | None) else str(value) for name, value in constants.items()
        },
        "aligned": sorted(names[path[0]] for path, attributes in source.attrs.items() if attributes),
        "num_warps": metadata.num_warps,
        "max_registers": metadata.maxnreg,
    }
    kind = json.dumps(launch, sort_keys=True)
    return lambda *_: launches.setdefault((current["check"], kind), launch | current)


def without_machine_code(_backend=None, stages=None, *_):
    """Triton's hook into its compiler: stop after the first stage. Without stages it wants a key and a hash."""
    if stages is None:
        return "", ""
    for stage in list(stages)[1:]:
        del stages[stage]
    stages["cubin"] = no_code
    return None


def no_code(_module, metadata):
    """The compiler's last stage: an empty kernel."""
    metadata |= dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
    metadata |= {"name": "none", "global_scratch_align": 1, "profile_scratch_align": 1}
    return b""


def load(*_):
    """A kernel that is never executed: its module, itself, registers, spills and the most threads of a block."""
    return object(), 0, 0, 0, 1024


def main() -> None:
    """Run the operations' checks, whose results are meaningless here, and print the recorded launches."""
    triton.knobs.runtime.add_stages_inspection_hook = without_machine_code
    torch._assert_async = lambda *_: None  # kernels have not written the values that it asserts on
    with driven("sm_90", record, load), tempfile.TemporaryDirectory() as triton.knobs.cache.dir:  # of empty kernels
        for op in sys.argv[1:] or TRITON_OPERATIONS:
            current["check"] = op
            for _ in importlib.import_module(f"kernels.{op}.check").comparisons(torch.device("cpu"), "triton"):
                pass
    print(json.dumps(list(launches.values())))


if __name__ == "__main__":
    main()
