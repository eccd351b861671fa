"""The processes of a run: torchrun's environment, the process group, reductions, and errors raised on all ranks."""

import gc
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gptbert.config import TrainConfig
from gptbert.distributed.fresh_store import fresh_store, shares_its_store
from gptbert.distributed.hardware import usable_cores
from gptbert.distributed.lone_work import LoneWork
from gptbert.distributed.memory import keep_freed_memory
from gptbert.errors import InputError, LostProcessError, SharedError, StoppedError, first_line
from gptbert.io import environment

_MOST_PROCESSES = 10**6
_ended_groups: list[Any] = []  # kept until this process ends, see `_leave`
REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of `--reduce_dtype`


@dataclass(frozen=True)
class World:
    """This process among all processes of the run; without torchrun, the only one."""

    rank: int
    world_size: int
    device: torch.device
    lone_work: Callable[[], AbstractContextManager[None]] = nullcontext  # `LoneWork`, of several processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and the screen."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, by rank; every rank must call it."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main rank's values to all ranks, in place; every rank must call it."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wrap(self, model: nn.Module, reduce_dtype: torch.dtype = torch.float32) -> nn.Module:
        """Wrap the model in DDP: gradients are averaged over ranks during the synchronized backward.

        A sharded model is returned as it is: FSDP does so itself (`gptbert.distributed.fsdp`).

        Args:
            model: on this rank's device.
            reduce_dtype: fp32, or bf16: gradients are rounded to it on their way between ranks.
        """
        if self.world_size == 1 or isinstance(model, FSDPModule):
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch<2.13
        options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, sync_buffers: False}
        parallel_model = DistributedDataParallel(model, **options)
        if reduce_dtype == torch.bfloat16:
            parallel_model.register_comm_hook(None, _in_bf16)
        return parallel_model

    def gradient_sync(self, model: nn.Module, *, is_on: bool) -> AbstractContextManager[None]:
        """A block whose backward reduces gradients over ranks, or only accumulates them.

        Args:
            model: from `wrap`, or sharded.
            is_on: for the last micro-batch of a step.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_on)
        if is_on or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    @contextmanager
    def errors_on_all_ranks(self) -> Iterator[None]:
        """Context manager: after an InputError or OSError on any rank, all ranks raise it as the same `SharedError`.

        A collective operation has no place in the block: a rank that raises an error before does not get to it.
        """
        failure = None
        try:
            yield
        except InputError as error:
            failure = str(error), error.status
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}", InputError.status
        failed = [reported for reported in self.all_gather(failure) if reported]
        if failed:
            raise SharedError(*failed[0])

    def on_main(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result, on every rank, of a function that the main rank alone calls; every rank must call this.

        The others wait while the main rank's process lives, longer than `--timeout` if need be.

        The function must not call a collective operation. Its result is picklable.

        Raises:
            InputError: it raised InputError or OSError; on every rank, with the same message.
        """
        with self.errors_on_all_ranks(), self.lone_work():
            result = function(*arguments) if self.is_main else None
        return self.all_gather(result)[0]


@contextmanager
def connect(config: TrainConfig) -> Iterator[World]:
    """Join the process group of torchrun's processes (nccl on GPUs, gloo on CPUs), and leave it at the end.

    A process that raises an error of its own keeps an nccl group, and has to end soon (see `_leave`).

    Raises:
        InputError: `--device` names one that this process cannot have; see also `read_launch`.
        LostProcessError: torch.distributed reports, now or later, that another process cannot be reached.
    """
    launch = read_launch()
    rank, world_size = launch.rank, launch.world_size
    device = choose_device(config.device, launch.local_rank, world_size)
    if device.type == "mps" and config.optimizer == "muon":
        raise InputError(
            "--optimizer muon: multiplies in bf16, which has not been tried on Apple's MPS; use lamb or adamw"
        )
    if device.type == "cpu":
        # torchrun sets one thread per process, however many cores there are
        torch.set_num_threads(config.cpu_threads or max(1, usable_cores() // launch.local_world_size))
        if config.huge_pages:
            keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield World(rank, world_size, device)
        return
    with _group("nccl" if device.type == "cuda" else "gloo", config.timeout) as store:
        lone_work = LoneWork(dist.PrefixStore("lone work", store), config.timeout, is_main=rank == 0)
        yield World(rank, world_size, device, lone_work)


@contextmanager
def _group(backend: str, timeout: int) -> Iterator[dist.Store]:
    """Be in the process group while the block runs, which gets its store; see `connect`."""
    if backend == "gloo":
        environment.check_interfaces("GLOO_SOCKET_IFNAME")
    is_with_all = False
    try:
        yield _join(backend, timedelta(seconds=timeout))
        is_with_all = True
    except (SharedError, StoppedError):  # which all ranks raise at the same place
        is_with_all = True
        raise
    except ValueError as error:  # a variable of torchrun's environment is missing
        if dist.is_initialized():
            raise
        raise InputError(f"{error} (torchrun sets it)") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostProcessError(
            f"another process has ended, hangs, or cannot be reached (waited at most --timeout {timeout} s: "
            f"{_reason(error)}); --resume auto goes on from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            _leave(backend, is_with_all=is_with_all)


def _leave(backend: str, *, is_with_all: bool) -> None:
    """Destroy the process group; an nccl one only if all ranks do.

    Before nccl's is destroyed, its kernels must end, and one that waits for another rank may never do. A rank that
    leaves alone would hang there, and its error would not be seen. Its process ends instead.

    The reducer of a DDP model that is freed now or later must not hold the last reference to the group: its destructor
    would wait for gloo's threads while holding the GIL, which they may need: a deadlock.
    """
    if backend == "nccl" and not is_with_all:
        return
    gc.collect()
    if backend == "gloo":
        _ended_groups.append(dist.group.WORLD)
    dist.destroy_process_group()


@dataclass(frozen=True)
class Launch:
    """What torchrun says in the environment about this process; without torchrun, it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_launch() -> Launch:
    """What torchrun's variables say.

    Raises:
        InputError: one is missing, is no number, or contradicts another; names both.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    hint = "; torchrun sets it, and without torchrun it must be unset"
    numbers: list[Any] = [
        environment.integer(name, lowest, _MOST_PROCESSES, hint) for name, lowest in zip(names, (0, 1) * 2, strict=True)
    ]
    rank, world_size, local_rank, local_size = numbers
    if rank is None and world_size in {None, 1} and local_rank in {None, 0} and local_size in {None, 1}:
        return Launch()
    missing = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0 if world_size == 1 else local_rank}
    if absent := [name for name, value in missing.items() if value is None]:
        there = next(name for name in names if environment.text(name))
        raise InputError(
            f"{there} is {environment.text(there)}, and {absent[0]} is not set; torchrun sets both, and without "
            "torchrun both must be unset"
        )
    launch = Launch(rank, world_size, local_rank or 0, min(local_size or world_size, world_size))
    for smaller, larger in (("rank", "world_size"), ("local_rank", "local_world_size")):
        here, number = getattr(launch, smaller), getattr(launch, larger)
        if here >= number:
            raise InputError(f"{smaller.upper()} is {here}, expected one below {larger.upper()} {number}{hint}")
    if local_size and local_size > world_size:
        raise InputError(f"LOCAL_WORLD_SIZE is {local_size}, expected at most WORLD_SIZE {world_size}{hint}")
    if world_size > 1:
        port = environment.integer("MASTER_PORT", 1, 65535, "; a port of the first host that no one uses")
        for name, value in (("MASTER_ADDR", environment.text("MASTER_ADDR")), ("MASTER_PORT", port)):
            if value is None:
                raise InputError(f"{name} is not set, and WORLD_SIZE is {world_size}{hint}")
    return launch


def why_no_gpu() -> str:
    """Why PyTorch sees no GPU, as far as that is known: its build, or a variable that hides GPUs."""
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built for CPUs"
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if (value := os.environ.get(name)) is not None:
            return f"{name} is {value[:100]!r}"
    return "torch sees none"


def choose_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device of this process.

    Args:
        name: "auto" (a GPU if there is one, or else Apple's MPS if there is that and one process), "cuda", "mps" or
            "cpu".
        local_rank: rank among the processes of this host; each has its own GPU.
        world_size: number of processes.

    Raises:
        InputError: there is no such device for this process.
    """
    if name == "mps":
        return _mps(world_size)
    available = torch.cuda.device_count() if name != "cpu" else 0
    if available == 0:
        if name == "cuda":
            raise InputError(f"--device cuda: torch sees no GPU ({why_no_gpu()}); --device cpu works everywhere")
        has_mps = name == "auto" and world_size == 1 and torch.backends.mps.is_available()
        return torch.device("mps" if has_mps else "cpu")
    if local_rank >= available:
        raise InputError(f"--device {name}: process {local_rank} of this host has no GPU ({available} there)")
    return torch.device("cuda", local_rank)


def _mps(world_size: int) -> torch.device:
    if not torch.backends.mps.is_available():
        why = "it takes an Apple GPU" if torch.backends.mps.is_built() else "this PyTorch is built without it"
        raise InputError(f"--device mps: torch sees none ({why}); --device cpu works everywhere")
    if world_size > 1:
        raise InputError(
            f"--device mps: is for one process, not {world_size}, since no backend of torch.distributed takes its "
            "tensors; start one without torchrun, or give --device cpu"
        )
    return torch.device("mps")


def _join(backend: str, timeout: timedelta) -> dist.Store:
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if shares_its_store():
        store = fresh_store(store, rank, world_size, timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return store


def _in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """PyTorch's hook under another name, as DDP refuses that one without NCCL, though gloo takes bf16."""
    return bf16_compress_hook(group, bucket)


def _reason(error: RuntimeError) -> str:
    """The message of gloo or nccl, without its source location and advice."""
    return re.sub(r"\[[^\]]*\.(cc|cpp|h|hpp):\d+\] *", "", first_line(error)).partition(". ")[0].strip()[:200]
