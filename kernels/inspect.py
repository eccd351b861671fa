"""Registers, spills and word widths of the Triton kernels, without a GPU: `python -m kernels.inspect [--json]`.

Every configuration that a launcher can choose is compiled ahead of time for every target. Registers and spills come
from `ptxas -v` (on AMD: the assembly's metadata), widths of loads and stores and the use of tensor cores from the PTX
or the assembly. Three bars must hold, else the exit status is 1: a program fits into a multiprocessor; registers do
not spill on an NVIDIA GPU unless the configuration allows it; and kernels bound by memory traffic move blocks of global
memory in words of 128 bits or more. Up to sm_90, some programs of kernels with matrix products are executed on the CPU
(`kernels.machine_code`): nothing may be wrong with their machine code, and for sm_90 a tile may take no more
instructions and accesses of shared memory than the configuration allows.

The project uses absolute imports only, so this file does not shadow the standard library's `inspect`.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from tqdm import tqdm

from kernels.assembler import use_right_assembler
from kernels.backend import interpreted
from kernels.configuration import TRITON_OPERATIONS, Configuration, fitting_warps

WIDE = 128  # bits, the widest load of one instruction on all targets
NVIDIA_REGISTERS = 65_536  # per multiprocessor, on all targets


class Target(NamedTuple):
    """The arguments of Triton's GPUTarget, and the shared memory available to a program, in bytes."""

    backend: str
    arch: Any  # a number for CUDA, a name for HIP
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_89": Target("cuda", 89, 32, 99 * 1024),  # RTX 40, L40S; RTX 30 and A10 have the same limits
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "sm_120": Target("cuda", 120, 32, 99 * 1024),  # RTX 50
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


class ToolchainError(Exception):
    """A tool for building kernels is missing; the message is one line."""


@dataclass(frozen=True)
class Build:
    """One configuration built for one target.

    Attributes:
        configuration: its name.
        target: a key of TARGETS.
        registers: per thread, 32 bits each (AMD: vector registers).
        spill_bytes: bytes per thread of spill stores and loads to local memory, counted per instruction (AMD: per
            spilled register).
        shared_bytes: shared memory per program.
        loads: number of global load instructions, by width in bits.
        stores: the same for stores.
        tensor_cores: whether there are matrix instructions.
        assembler: release of ptxas, for kernels with matrix products up to sm_90; see `kernels.assembler`.
        tile: costs of a tile, `kernels.machine_code.emulation.Counts`, for the same kernels.
        note: why there are none, or None.
        problems: the bars that do not hold, or why it was not built.
    """

    configuration: str
    target: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    tensor_cores: bool = False
    assembler: str | None = None
    tile: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    problems: list[str] = field(default_factory=list)


def inspect_modules(modules: Iterable[str], targets: Iterable[str] = TARGETS, match: str = "") -> list[Build]:
    """Build configurations for every target, with one process per core, into Triton's cache.

    Args:
        modules: names of modules with a function `configurations() -> list[Configuration]`.
        targets: keys of TARGETS.
        match: regular expression to search in the configuration's name.

    Returns:
        Builds in the order of the configurations, targets innermost.

    Raises:
        ToolchainError: Triton or an assembler is missing, or Triton would interpret the kernels.
    """
    check_toolchain(targets := list(targets))
    # decorated kernels do not pickle: workers get the module and the index of a configuration
    jobs = [
        (module, index, target)
        for module in modules
        for index, configuration in enumerate(_configurations(module))
        if re.search(match, configuration.name)
        for target in targets
        if configuration.targets is None or target in configuration.targets
    ]
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as workers:
        builds = workers.map(_build_job, *zip(*jobs, strict=True)) if jobs else []
        return list(tqdm(builds, total=len(jobs), desc="builds", disable=None))  # None: only on a terminal


def check_toolchain(targets: Sequence[str]) -> None:
    """Check that kernels can be built here.

    Raises:
        ToolchainError: Triton or an assembler is missing, or Triton would interpret the kernels.
    """
    if importlib.util.find_spec("triton") is None:
        raise ToolchainError("Triton is not installed: pip install triton (Linux only)")
    if interpreted():
        raise ToolchainError("TRITON_INTERPRET is set: interpreted kernels cannot be built; unset it")
    backends = importlib.import_module("triton.backends").backends
    for name in targets:
        target = TARGETS[name]
        if {"cuda": "nvidia", "hip": "amd"}[target.backend] not in backends:
            raise ToolchainError(f"{name}: this Triton was built without the backend for {target.backend}")
        if target.backend == "cuda":
            _find_ptxas(target.arch)


def _find_ptxas(arch: int) -> None:
    try:
        importlib.import_module("triton.backends.nvidia.compiler").get_ptxas_version(arch)
    except (AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"sm_{arch}: ptxas does not run ({error}); TRITON_PTXAS_PATH names another") from error


def build(configuration: Configuration, target_name: str) -> Build:
    """Build one configuration, and check the bars."""
    target = TARGETS[target_name]
    try:
        compiled, log = _compile(configuration, target)
    except Exception as error:  # noqa: BLE001 - the compiler can raise anything; other builds continue
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Build(configuration.name, target_name, problems=[f"does not compile: {reason}"])
    if target.backend == "cuda":
        measured = _measure_nvidia(compiled.asm["ptx"], log)
    else:
        measured = _measure_amd(compiled.asm["amdgcn"])
    result = Build(configuration.name, target_name, shared_bytes=compiled.metadata.shared, **measured)
    if configuration.has_products and target.backend == "cuda" and target.arch < 100:
        result = replace(result, assembler=use_right_assembler())
        result = _with_tile(result, configuration, compiled.asm["cubin"])
    result.problems.extend(_broken_bars(configuration, target, result, compiled.asm["ttir"]))
    return result


def _with_tile(result: Build, configuration: Configuration, cubin: bytes) -> Build:
    """A build with what its machine code says."""
    measurement = importlib.import_module("kernels.machine_code.measurement")  # which needs time to import
    measured = measurement.measure(configuration, cubin, result.shared_bytes)
    if measured is None:
        return result
    result.problems.extend(f"machine code: {finding}" for finding in measured.findings)
    return replace(result, tile={} if measured.counts is None else asdict(measured.counts), note=measured.note)


def _build_job(module: str, index: int, target: str) -> Build:
    return build(_configurations(module)[index], target)


@functools.cache
def _configurations(module: str) -> list[Configuration]:
    return importlib.import_module(module).configurations()


def _compile(configuration: Configuration, target: Target) -> tuple[Any, str]:
    """Triton's CompiledKernel, from the arguments that the JIT would give the compiler, and the log of ptxas.

    On AMD the JIT also marks tensors below 2 GB; no tensor is marked here, which is the harder case.
    """
    names = configuration.kernel.arg_names
    given = {**configuration.types, **configuration.constants}
    wrong = (set(names) ^ given.keys()) | (configuration.types.keys() & configuration.constants)
    wrong |= configuration.aligned - configuration.types.keys()
    if wrong:
        raise ValueError(f"the configuration and the kernel disagree about {', '.join(sorted(wrong))}")
    compiler, knobs = importlib.import_module("triton.compiler"), importlib.import_module("triton.knobs")
    source = compiler.ASTSource(
        configuration.kernel,
        {name: configuration.types.get(name, "constexpr") for name in names},
        dict(configuration.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(configuration.aligned)},
    )
    options = {"num_warps": fitting_warps(configuration.num_warps, target.warp_size)}
    if configuration.num_stages is not None:
        options["num_stages"] = configuration.num_stages
    if target.backend == "cuda" and configuration.max_registers is not None:
        options["maxnreg"] = configuration.max_registers
    gpu_target = importlib.import_module("triton.backends.compiler").GPUTarget(*target[:3])
    use_right_assembler()
    printed = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        compiled = compiler.compile(source, target=gpu_target, options=options)
        cache = importlib.import_module("triton.runtime.cache").get_cache_manager(compiled.hash)
        stored = cache.get_file("ptxas.log")
        if stored is None and target.backend == "cuda":
            if not printed.getvalue():  # cached by a different process, without a log
                knobs.compilation.always_compile = True
                compiled = compiler.compile(source, target=gpu_target, options=options)
            stored = cache.put(printed.getvalue(), "ptxas.log", binary=False)
    return compiled, "" if stored is None else Path(stored).read_text(encoding="utf-8")


def _broken_bars(configuration: Configuration, target: Target, result: Build, ttir: str) -> list[str]:
    problems = []
    num_threads = fitting_warps(configuration.num_warps, target.warp_size) * target.warp_size
    allocated = -(-result.registers // 8) * 8 * num_threads
    if target.backend == "cuda" and allocated > NVIDIA_REGISTERS:
        problems.append(f"cannot start: takes {allocated} registers of {NVIDIA_REGISTERS}")
    if result.shared_bytes > target.shared_bytes:
        problems.append(f"cannot start: takes {result.shared_bytes} bytes of shared memory of {target.shared_bytes}")
    most_spilled = configuration.most_spilled.get(result.target, configuration.most_spilled.get("any", 0))
    if target.backend == "cuda" and result.spill_bytes > most_spilled:
        problems.append(f"spills {result.spill_bytes} bytes a thread, of {most_spilled} allowed")
    for name, most in (
        ("instructions", configuration.most_instructions),
        ("wavefronts", configuration.most_wavefronts),
    ):
        if result.target == "sm_90" and result.tile.get(name, 0) > most:
            problems.append(f"takes {result.tile[name]:.0f} {name} a tile, of {most:.0f} allowed")
    if configuration.streams and configuration.words >= num_threads:
        for kind, widths in (("load", result.loads), ("store", result.stores)):
            # scalars, such as a row's loss, do not count: only loads and stores of blocks must be wide
            has_blocks = re.search(rf"\btt\.(?:\w+_)?{kind}\b.*tensor<", ttir)
            if has_blocks and max(widths, default=0) < WIDE:
                problems.append(f"the widest {kind} has {max(widths, default=0)} bits, not {WIDE}")
    return problems


def _measure_nvidia(ptx: str, log: str) -> dict[str, Any]:
    return {
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        "loads": dict(Counter(_ptx_widths("ld", ptx))),
        "stores": dict(Counter(_ptx_widths("st", ptx))),
        "tensor_cores": bool(re.search(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
    }


def _ptx_widths(kind: str, ptx: str) -> Iterable[int]:
    """Bits of each `ld.global.v4.b32` and the like, with or without cache hints, and of copies to shared memory."""
    for modifiers in re.findall(rf"\b{kind}\.((?:[\w:]+\.)*global(?:\.[\w:]+)*)", ptx):
        parts = modifiers.split(".")
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d+", part)), 1)
        yield count * int(re.findall(r"\d+", parts[-1])[0])
    if kind == "ld":
        for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)", ptx):
            yield 8 * int(size, base=0)


def _measure_amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.findall(rf"^\s+\.{key}:\s+(\d+)", assembly, re.MULTILINE)[0])

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "loads": dict(Counter(_amd_widths("load", assembly))),
        "stores": dict(Counter(_amd_widths("store", assembly))),
        "tensor_cores": bool(re.search(r"\bv_s?mfmac?_", assembly)),
    }


def _amd_widths(kind: str, assembly: str) -> Iterable[int]:
    """Bits of each `global_load_dwordx4`, `buffer_store_short` and the like."""
    names = {"byte": 8, "short": 16, "dword": 32}
    for name, count in re.findall(rf"\b(?:global|buffer|flat)_{kind}_[us]?(byte|short|dword)(?:x(\d))?", assembly):
        yield names[name] * int(count or 1)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Build every configuration of every kernel for every GPU, and report registers, spills and word widths."""

    op: tuple[Literal[TRITON_OPERATIONS], ...] = TRITON_OPERATIONS  # type: ignore[valid-type]  # tyro sees the values
    """Operations to build."""
    target: tuple[Literal[tuple(TARGETS)], ...] = tuple(TARGETS)  # type: ignore[valid-type]  # likewise
    """GPUs to build for."""
    match: str = ""
    """Build only configurations whose name matches this regular expression, such as "bf16 V=16384$"."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main() -> None:
    """Entry point. Exit status 1 if a bar does not hold, 2 if there is nothing to build or a tool is missing."""
    config = tyro.cli(InspectConfig, use_underscores=True)
    os.environ.pop("TRITON_INTERPRET", None)  # Triton is not imported yet, here and in the workers
    try:
        builds = inspect_modules([f"kernels.{op}.kernel" for op in config.op], config.target, config.match)
    except ToolchainError as error:
        print(f"kernels.inspect: {error}", file=sys.stderr)
        sys.exit(2)
    if not builds:
        print(f"kernels.inspect: no configuration's name contains {config.match!r}", file=sys.stderr)
        sys.exit(2)
    problems = [f"{built.configuration} on {built.target}: {text}" for built in builds for text in built.problems]
    if config.json:
        print(json.dumps({"builds": [asdict(built) for built in builds], "problems": problems}))
    else:
        print_table(builds)
        for release in sorted({built.assembler for built in builds if built.assembler}):
            print(f"Matrix products up to sm_90 are assembled by ptxas {release}.")
        for built in builds:
            if built.note:
                print(f"{built.configuration} on {built.target}: {built.note}")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


def print_table(builds: Sequence[Build]) -> None:
    """Print one line per build, with the configuration's name on its first line only."""
    width = max((len(built.configuration) for built in builds), default=0)
    columns = ["registers", "spilled B", "shared B", "load bits", "store bits", "tensor cores"]
    columns += ["instructions a tile", "shared wavefronts a tile", "L1 lines a tile"]
    print(" ".join([f"{'configuration':{width}} {'target':7}", *columns]))
    previous = None
    for built in builds:
        cells = (
            built.registers,
            built.spill_bytes,
            built.shared_bytes,
            max(built.loads, default=0),
            max(built.stores, default=0),
            "yes" if built.tensor_cores else "-",
            *(f"{built.tile[name]:.0f}" if built.tile else "-" for name in ("instructions", "wavefronts", "lines")),
        )
        name = built.configuration if built.configuration != previous else ""
        row = " ".join(f"{cell:>{len(column)}}" for cell, column in zip(cells, columns, strict=True))
        print(f"{name:{width}} {built.target:7} {row}" + (f"  {'; '.join(built.problems)}" if built.problems else ""))
        previous = built.configuration


if __name__ == "__main__":
    main()
