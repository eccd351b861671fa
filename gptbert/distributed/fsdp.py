"""Sharded data parallelism: a rank holds a part of the weights, of their gradients and average, and of the moments.

PyTorch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277) gathers a block's whole weights before its forward
and again before its backward, lets go of them after both, and averages gradients to the rank that holds the part.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from gptbert.config import TrainConfig
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.model import GPTBert


def shard_size(config: TrainConfig, world: World) -> int:
    """Number of ranks that hold one copy of the weights together.

    Raises:
        InputError: the ranks do not divide into groups of that size.
    """
    size = config.shard_size or world.world_size
    if world.world_size % size:
        fitting = ", ".join(str(n) for n in range(1, world.world_size + 1) if world.world_size % n == 0)
        raise InputError(f"--shard_size {size} does not divide the {world.world_size} processes; these do: {fitting}")
    return size


def shard(models: list[GPTBert], config: TrainConfig, world: World) -> None:
    """Shard models in place, whose weights all ranks have alike, and move the parts to the rank's device.

    Consecutive ranks hold one copy of the weights together, so that what is gathered stays within few hosts; gradients
    are averaged over the copies too. Blocks may be compiled before, and optimizers are built after.

    Raises:
        InputError: see `shard_size`.
    """
    mesh = _mesh(shard_size(config, world), config, world)
    for model in models:
        _shard(model, mesh, mixed_precision=config.mixed_precision)


def _mesh(size: int, config: TrainConfig, world: World) -> DeviceMesh:
    """Ranks [copies, size], or [size] of a single copy; groups that it makes wait as long as that of all ranks."""
    device = world.device.type
    if size == world.world_size:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    ranks, timeout = torch.arange(world.world_size).view(-1, size), timedelta(seconds=config.timeout)
    lines = (ranks.T.tolist(), ranks.tolist())
    groups = [dist.new_subgroups_by_enumeration(each, timeout=timeout)[0] for each in lines]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _shard(model: GPTBert, mesh: DeviceMesh, *, mixed_precision: bool) -> None:
    """In mixed precision the blocks' matrices travel in bf16, which autocast would make of them anyway.

    The weights that autocast leaves in fp32, of mixes and embedding, travel as they are, and gradients are summed in
    fp32: the step is the one of DDP.
    """
    products = MixedPrecisionPolicy()
    if mixed_precision:
        products = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # a few numbers in all, in one group: of its own, since a group has one dtype
    fully_shard([mix for block in model.blocks for mix in (block.attention_mix, block.feed_forward_mix)], mesh=mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=products)
    fully_shard(model, mesh=mesh)  # embedding and head, which share a matrix
    register_fsdp_forward_method(model, "encode")
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean


def reshard(model: nn.Module) -> None:
    """Drop the whole embedding, which a forward leaves behind for its backward, where none follows."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: GPTBert, world: World) -> dict[str, Tensor]:
    """A model's weights on the main rank, by name, on the CPU if they were sharded; every rank must call it.

    Returns:
        Nothing on the other ranks, which hold a whole tensor only while it is gathered.
    """
    gathered = {}
    for name, tensor in model.state_dict().items():
        all_of_it = full_tensor(tensor)
        if world.is_main:
            gathered[name] = all_of_it.cpu() if isinstance(tensor, DTensor) else all_of_it
    return gathered


def load_weights(model: GPTBert, weights: dict[str, Tensor]) -> None:
    """Take weights, whole on every rank or sharded as these are."""
    parts = model.state_dict()
    model.load_state_dict({name: _part(tensor, parts[name]) for name, tensor in weights.items()})


def load_moments(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Take the state of the parameters, whole on every rank or sharded as they are; the optimizer's settings stay."""
    params = _params(optimizer)
    parts = {
        index: {name: _part(value, params[index]) for name, value in values.items()} for index, values in state.items()
    }
    optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})


def new_moments(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """Zeros like the moments of LAMB or AdamW, by the parameters' places in the state_dict; sharded as they are."""
    return {
        index: {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        for index, param in enumerate(_params(optimizer))
    }


def _params(optimizer: Optimizer) -> list[Tensor]:
    """In the order of the state_dict."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded like another of its shape; others are whole on every rank."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
