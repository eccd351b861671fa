"""Before a run's first step: choose the kernel backend, check the kernels, create the run's folder."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from gptbert.config import ModelConfig, TrainConfig
from gptbert.distributed.hardware import hardware_name, has_bf16
from gptbert.distributed.world import World, why_no_gpu
from gptbert.errors import InputError
from gptbert.io import environment
from gptbert.io.files import replacing
from gptbert.io.json_file import write_json
from gptbert.io.names import OWNER, RUN_CONFIG, RUN_FILE, TOKENIZER
from gptbert.io.owner import owned, whereabouts
from gptbert.io.run_file import write_run_file
from gptbert.io.screen import log
from kernels import cpp
from kernels.assembler import is_right, use_right_assembler
from kernels.backend import choose_backend, chosen_by_name, set_default_backend
from kernels.check import first_failure, run_checks
from kernels.wanted import FUSED, use_fused


def with_fast_precision(config: TrainConfig, world: World) -> TrainConfig:
    """`--mixed_precision` only where it is faster: if a process has no bf16 instructions, all compute in fp32."""
    is_slow = config.mixed_precision and not has_bf16(world.device)
    if not any(world.all_gather(is_slow)):
        return config
    if world.is_main:
        who = hardware_name(world.device) if is_slow else "another host"
        why = f"{who} has no instructions for products of bf16, which would take several times as long"
        if world.device.type == "mps":
            why = f"bf16 has not been tried on {who}"
        log(f"--mixed_precision: computing in fp32, since {why}")
    return dataclasses.replace(config, mixed_precision=False)


def prepare_kernels(config: TrainConfig, world: World) -> str:
    """Choose this process's kernel backend by `--kernels`, `KERNELS_BACKEND` or the device.

    Returns:
        The backend; see `kernels.backend`.

    Raises:
        InputError: the backend cannot run on this device, or a variable of the environment cannot be used.
    """
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.check_folder(name)
    if (line := environment.settle_temporary_folder()) and world.is_main:
        log(line)
    try:
        set_default_backend(None if config.kernels == "auto" else config.kernels)
        backend = choose_backend(None, world.device)
    except ValueError as error:
        reason = str(error).removeprefix(f"set_default_backend={config.kernels!r}: ")
        raise InputError(f"--kernels {config.kernels}: {reason}") from None
    use_fused(FUSED)  # unless `gptbert.training.kernel_check` finds one wrong
    if backend == "triton" and world.device.type == "cuda":
        environment.check_program("TRITON_PTXAS_PATH")
        release = use_right_assembler()
        if not is_right(release):
            use_fused(())
            if world.is_main:
                log(
                    f"ptxas {release} is known to make wrong code of matrix products, so nothing is fused in this run; "
                    "TRITON_PTXAS_PATH in the environment names another"
                )
    return backend


def prepare_cpp_kernels(config: TrainConfig, world: World, *, is_compiled: bool) -> str:
    """Choose C++ kernels for a compiled run on CPUs unless a backend was requested, then build and check them.

    That takes seconds at startup; the compiler is loaded for a compiled run anyway. All ranks use the same backend, so
    every rank must call this.

    Args:
        config: the run's settings; `prepare_kernels` has applied `--kernels`.
        world: the run's processes.
        is_compiled: whether the model is compiled.

    Returns:
        The run's backend.

    Raises:
        InputError: C++ kernels were requested and cannot be built, or one differs from its reference; on every rank.
    """
    backend = choose_backend(None, world.device)
    is_asked = backend == "cpp"
    wants_cpp = is_asked or (world.device.type == "cpu" and is_compiled and not chosen_by_name())
    with world.errors_on_all_ranks():
        reason = cpp.unavailable() if wants_cpp else None
    reasons = [reason for reason in world.all_gather(reason) if reason]
    with world.errors_on_all_ranks():  # hosts may differ in KERNELS_BACKEND
        if reasons and is_asked:
            asked = "--kernels cpp" if config.kernels == "cpp" else "KERNELS_BACKEND=cpp"
            raise InputError(f"{asked}: the kernels cannot be compiled here ({reasons[0]}); --kernels torch works")
        if wants_cpp and not reasons:
            backend = "cpp"
            set_default_backend(backend)
            if config.kernel_check == "on" and (failure := first_failure(run_checks(world.device, backend))):
                raise InputError(failure)
    if reasons and world.is_main:
        log(f"kernels in C++ cannot be compiled here ({reasons[0]}); this run does without")
    return backend


def log_choices(config: TrainConfig, world: World, compiling: object) -> None:
    """Say what was chosen in the user's stead and is not in the header.

    Args:
        config: the run's settings.
        world: the run's processes; their device and threads.
        compiling: a line about whether the run is compiled, and why.
    """
    log(str(compiling))
    if world.device.type == "cpu":
        why = f", since {why_no_gpu()}" if config.device == "auto" else ""
        threads = torch.get_num_threads()
        told = f"{threads} thread{'s'[: threads > 1]} a process (--device, --cpu_threads){_other(threads)}"
        log(f"on the CPU{why}, {told}")
        if threads > 1 and environment.text("OMP_WAIT_POLICY") == "passive":
            log("threads sleep while they wait for each other (OMP_WAIT_POLICY=active: faster if nothing else runs)")
    if world.device.type == "mps":
        log("on Apple's MPS, where this trainer has not been run yet: compare its first losses with --device cpu")


def _other(threads: int) -> str:
    """That OMP_NUM_THREADS says another number; torchrun sets it too, to 1."""
    named = environment.text("OMP_NUM_THREADS") if environment.text("RANK") is None else None
    return "" if named in {None, str(threads)} else f"; OMP_NUM_THREADS, which is {named[:100]!r}, does not count"


@contextmanager
def own_run_dir(config: TrainConfig) -> Iterator[None]:
    """Own the run's folder while the block runs, so that no second process trains in it; for the main rank.

    Raises:
        OwnedError: another process trains in it; names the process.
        InputError: the folder is not writable.
    """
    name, way_on = f"--output_dir and --name: {config.run_dir}", "wait for it, stop it, or give another --name"
    with _write_errors(config), ExitStack() as stack:
        stack.enter_context(owned(config.run_dir / OWNER, name, way_on))
        ownership = stack.pop_all()
    with ownership:
        yield


def check_run_dir(config: TrainConfig) -> None:
    """Refuse to go on once the run's folder is not where it was; for the main rank.

    Raises:
        InputError: it was deleted, or moved away.
    """
    if what := whereabouts(config.run_dir / OWNER):
        raise InputError(
            f"--output_dir and --name: {config.run_dir} {what} while the run was going; the run ends, and goes on from "
            "the last checkpoint in it, if there is one, with --resume auto"
        )


@contextmanager
def _write_errors(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--output_dir {config.output_dir}: cannot be written ({error.strerror})") from error


def prepare_run_dir(config: TrainConfig, model_config: ModelConfig, world: World, backend: str) -> None:
    """Create the run's folder, with the resolved settings and a copy of the tokenizer.

    Raises:
        InputError: the folder is not writable.
    """
    settings = {
        "train": config.to_dict(),
        "model": dataclasses.asdict(model_config),
        "world_size": world.world_size,
        "device": str(world.device),
        "hardware": hardware_name(world.device),
        "kernels": backend,
        "torch": torch.__version__,
    }
    with _write_errors(config):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        # a run that goes on finds these files, which a disk that is full then must not cost
        with replacing(config.run_dir / RUN_CONFIG) as file:
            write_json(file, settings)
        again = config if config.branch_from is None else dataclasses.replace(config, resume=None)
        write_run_file(config.run_dir / RUN_FILE, again)
        with replacing(config.run_dir / TOKENIZER) as file:
            shutil.copyfile(config.tokenizer_path, file)
