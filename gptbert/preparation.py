"""What a run needs before its first step: kernels that compute what they should, and a folder to write to."""

import dataclasses
import shutil
from contextlib import suppress

import torch

from gptbert.checkpoint.folder import TOKENIZER
from gptbert.config import ModelConfig, TrainConfig
from gptbert.distributed.hardware import hardware_name
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.json_file import write_json
from kernels import cpp
from kernels.backend import choose_backend, set_default_backend
from kernels.check import first_failure, run_checks


def prepare_kernels(config: TrainConfig, world: World) -> str:
    """Settle which implementation of the kernels this process uses; see `kernel_check` and `check_cpp_kernels`.

    Returns:
        The backend; see `kernels.backend`.

    Raises:
        InputError: it cannot run on this device.
    """
    try:
        set_default_backend(None if config.kernels == "auto" else config.kernels)
        return choose_backend(None, world.device)
    except ValueError as error:
        raise InputError(f"--kernels {config.kernels}: {error}") from None


def check_cpp_kernels(config: TrainConfig) -> None:
    """See that the C++ kernels, where compiled blocks use them, compute what they should.

    Raises:
        InputError: one differs from its reference.
    """
    if cpp.is_loaded() and config.kernel_check == "on":
        failure = first_failure(run_checks(torch.device("cpu"), "cpp"))
        if failure:
            raise InputError(failure)


def prepare_run_dir(config: TrainConfig, model_config: ModelConfig, world: World, backend: str) -> None:
    """Create the run's folder with its resolved settings and a copy of the tokenizer.

    Raises:
        InputError: the folder cannot be written.
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
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(config.run_dir / "config.json", settings)
        with suppress(shutil.SameFileError):
            shutil.copyfile(config.tokenizer_path, config.run_dir / TOKENIZER)
    except OSError as error:
        raise InputError(f"--output_dir {config.output_dir}: cannot be written ({error.strerror})") from error
