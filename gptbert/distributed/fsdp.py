"""Fully sharded data parallelism: each rank holds a shard of the weights, their gradients, their average and moments.

PyTorch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277) all-gathers a block's weights before its
forward and again before its backward, reshards them after both, and reduce-scatters averaged gradients.
"""

import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from gptbert.config import TrainConfig
from gptbert.distributed.world import REDUCE_DTYPES, World
from gptbert.errors import InputError
from gptbert.model import GPTBert


def shard_size(config: TrainConfig, world: World) -> int:
    """Number of ranks that one copy of the weights is sharded over.

    Raises:
        InputError: the number of ranks is not a multiple of it.
    """
    size = config.shard_size or world.world_size
    if world.world_size % size:
        fitting = ", ".join(str(n) for n in range(1, world.world_size + 1) if world.world_size % n == 0)
        raise InputError(f"--shard_size {size} does not divide the {world.world_size} processes; these do: {fitting}")
    return size


def shard(models: list[GPTBert], config: TrainConfig, world: World) -> None:
    """Shard models in place and move the shards to the rank's device; all ranks must have the same weights.

    One copy of the weights is sharded over consecutive ranks, so that all-gathers span few hosts; gradients are
    averaged over the copies too. Compile blocks before, if at all, and build optimizers after.

    Raises:
        InputError: see `shard_size`.
    """
    mesh = _mesh(shard_size(config, world), config, world)
    for model in models:
        _shard(model, mesh, REDUCE_DTYPES[config.reduce_dtype], mixed_precision=config.mixed_precision)
        if mesh.ndim == 2:
            _broadcast(model, mesh)


def _mesh(size: int, config: TrainConfig, world: World) -> DeviceMesh:
    """Mesh of ranks [copies, size], or [size] for a single copy; its groups get the timeout of the default group."""
    device = world.device.type
    if size == world.world_size:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    ranks, timeout = torch.arange(world.world_size).view(-1, size), timedelta(seconds=config.timeout)
    lines = (ranks.T.tolist(), ranks.tolist())
    groups = [dist.new_subgroups_by_enumeration(each, timeout=timeout)[0] for each in lines]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _shard(model: GPTBert, mesh: DeviceMesh, reduce_dtype: torch.dtype, *, mixed_precision: bool) -> None:
    """In mixed precision the blocks' matrices are gathered in bf16, to which autocast would cast them anyway.

    Weights that autocast leaves in fp32 (mixes and embedding) are gathered in fp32, and gradients are reduced as with
    DDP, so the step equals DDP's.
    """
    exact = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    products = dataclasses.replace(exact, param_dtype=torch.bfloat16) if mixed_precision else exact
    # the mix weights, a few numbers, form one group: an FSDP group has one dtype
    mixes = [mix for block in model.blocks for mix in (block.attention_mix, block.feed_forward_mix)]
    fully_shard(mixes, mesh=mesh, mp_policy=exact)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=products)
    fully_shard(model, mesh=mesh, mp_policy=exact)  # embedding and head, whose matrix is tied
    register_fsdp_forward_method(model, "encode")
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean reduction


@torch.no_grad()
def _broadcast(model: GPTBert, mesh: DeviceMesh) -> None:
    """Let all copies begin with the first one's weights: CPUs of different kinds draw other last bits."""
    for param in model.parameters():
        dist.broadcast(local(param), group=mesh.get_group("replicate"), group_src=0)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_weights(model: GPTBert, weights: dict[str, Tensor]) -> None:
    """Load weights that are full on every rank or sharded like the model's."""
    parts = model.state_dict()
    model.load_state_dict({name: _part(tensor, parts[name]) for name, tensor in weights.items()})


def load_moments(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Load per-parameter state, full on every rank or sharded like the parameters; the optimizer's settings stay."""
    params = _params(optimizer)
    parts = {
        index: {name: _part(value, params[index]) for name, value in values.items()} for index, values in state.items()
    }
    optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})


def new_moments(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """Zero moments of LAMB or AdamW by the parameters' indices in the state_dict; sharded like the parameters."""
    return {
        index: {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        for index, param in enumerate(_params(optimizer))
    }


def _params(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of the state_dict."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` sharded like `like`, if that is sharded and of the same shape; otherwise `tensor` itself."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
