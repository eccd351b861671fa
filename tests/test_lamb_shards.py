"""LAMB, AdamW and the EMA on sharded tensors: a step of all ranks equals the step of the whole tensors."""

import copy
import math
import traceback
from datetime import timedelta
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from gptbert.distributed.fsdp import full_tensor
from gptbert.optim import Lamb, WeightAverage, parameter_groups, update_weights
from kernels import lamb_step
from tests.numerics import relative_error, same
from tests.runs import on_ranks

# Shards of 16,384 elements and more, dim 0 not divisible by the number of ranks, and fewer rows than ranks.
SHAPES = ((6557, 5), (7, 5), (33,), (1, 40), (3,), (16, 24))
DECAYS = (0.1, 0.1, 0.0, 0.3, 0.1, 0.1)
STEPS, SKIPPED = 4, 2  # number of steps, and the step with a NaN
SETTINGS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "max_grad_norm": 2.0, "average_decay": 0.9}
OPTIMIZERS = {
    "lamb": lambda groups: Lamb(groups, lr=0.1),
    "lamb with a learning rate for each group": lambda groups: Lamb([{**groups[0], "lr": 0.01}, groups[1]], lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


def operations(world_size):
    """Backends and moment dtypes; the interpreter is slow, so it runs on two ranks only. C++ has no kernel for them."""
    backends = ["torch", "triton", "cpp"] if world_size == 2 else ["torch"]
    return [(backend, moment_type) for backend in backends for moment_type in (torch.float32, torch.bfloat16)]


def meshes(world_size):
    """Mesh shapes by name; fully_shard replicates shards along the first of two dimensions."""
    return {"1-D": (2,)} if world_size == 2 else {"1-D": (4,), "2-D": (2, 2)}


def shard(tensor, rank, world_size):
    """This rank's rows in fully_shard's layout."""
    chunks = tensor.chunk(world_size)
    return (chunks[rank] if rank < len(chunks) else tensor[:0]).clone()


def randoms(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def operation(rank, world_size, backend, moment_type):
    """Largest error of a rank's shards after each step, norms included; whether a skipped step left them unchanged."""
    part = lambda tensors: [shard(tensor, rank, world_size) for tensor in tensors]  # noqa: E731
    moments = [[torch.zeros(shape, dtype=moment_type) for shape in SHAPES] for _ in "mv"]
    complete = [randoms(0), *moments, [torch.zeros(()) for _ in SHAPES], randoms(1)]
    parts = [part(tensors) if tensors is not complete[3] else [torch.zeros(()) for _ in SHAPES] for tensors in complete]
    errors, stayed = [], False
    for step in range(STEPS):
        grads = randoms(10 + step)
        if step == SKIPPED:
            grads[0][0, 0] = math.nan  # on the first rank only
            before = copy.deepcopy(parts)
        norms = []
        for state, own, group in ((complete, grads, None), (parts, part(grads), dist.group.WORLD)):
            params, exp_avgs, exp_avg_sqs, steps, averages = state
            norms.append(
                lamb_step(
                    params, own, exp_avgs, exp_avg_sqs, steps, averages=averages, weight_decay=DECAYS, group=group,
                    backend=backend, **SETTINGS,
                )
            )  # fmt: skip
        if step == SKIPPED:
            stayed = same(chain(*parts), chain(*before)) and not norms[1].isfinite()
            continue
        errors.append(relative_error(norms[1], norms[0]))
        for index, pairs in enumerate(zip(parts, complete, strict=True)):
            for mine, expected in zip(*pairs, strict=True):
                own = expected if index == 3 else shard(expected, rank, world_size)
                if mine.numel():  # relative to the whole tensor, as its norm is
                    errors.append(((mine.double() - own.double()).abs().max() / expected.double().abs().max()).item())
    return max(errors), stayed


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3), nn.Linear(3, 1))


def make_sharded(mesh):
    return shard_layers(make_model(), mesh)


def make_sharded_average(mesh):
    average = WeightAverage(make_model(), 0.9)
    shard_layers(average.model, mesh)
    return average


def shard_layers(model, mesh):
    for layer in model[:2]:  # the root module owns the other parameters
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def set_gradients(model, step, bad=None):
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(model.parameters()):
        grad = torch.randn(param.shape, generator=generator)
        if index == 0 and bad is not None:
            grad[0, 0] = bad
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = None if index == 3 and step % 2 else grad  # a parameter without gradient, whose EMA still moves


def optimizer(mesh, name):
    """Largest error of parameters, EMA and norms after each step; whether skipped steps changed nothing."""
    models = [make_model(), make_sharded(mesh)]
    averages = [WeightAverage(models[0], 0.9), make_sharded_average(mesh)]
    optimizers = [OPTIMIZERS[name](parameter_groups(model, 0.1)) for model in models]
    errors, stayed = [], True
    for step in range(STEPS):
        for bad in (math.nan, math.inf):  # before the first step too
            set_gradients(models[1], step, bad)
            before = [
                full_tensor(param).clone() for model in (models[1], averages[1].model) for param in model.parameters()
            ]
            norm = update_weights(optimizers[1], models[1], averages[1], 2.0)
            after = [full_tensor(param) for model in (models[1], averages[1].model) for param in model.parameters()]
            stayed = stayed and not norm.isfinite() and all(map(torch.equal, before, after))
        norms = []
        with torch.no_grad():
            averages[1].model(torch.ones(1, 7))  # as validation does, which leaves the root parameters unsharded
        for model, average, each in zip(models, averages, optimizers, strict=True):
            set_gradients(model, step)
            norms.append(update_weights(each, model, average, 2.0))
        assert type(norms[1]) is torch.Tensor
        errors.append(relative_error(norms[1], norms[0]))
        for one, other in (models, [average.model for average in averages]):
            errors += [
                relative_error(full_tensor(actual.detach()), expected.detach())
                for expected, actual in zip(one.parameters(), other.parameters(), strict=True)
            ]
    stayed = stayed and all(
        optimizers[1].state[mine]["step"] == optimizers[0].state[param]["step"]
        for param, mine in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    return max(errors), stayed


def restored(mesh, name, folder):
    """Whether a run resumes bit for bit from a state saved and loaded by torch.distributed.checkpoint."""
    model = make_sharded(mesh)
    own = OPTIMIZERS[name](parameter_groups(model, 0.1))
    average = make_sharded_average(mesh)
    for step in range(6):
        if step == 3:
            weights = [param.detach().clone() for param in model.parameters()]
            save({"optimizer": get_optimizer_state_dict(model, own)}, checkpoint_id=folder)
        set_gradients(model, step)
        update_weights(own, model, average, 2.0)
    results = [param.to_local().clone() for param in model.parameters()]
    other = make_sharded(mesh)
    second = OPTIMIZERS[name](parameter_groups(other, 0.1))
    for param, old in zip(other.parameters(), weights, strict=True):
        param.data.copy_(old)
    state = {"optimizer": get_optimizer_state_dict(other, second)}
    load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, second, state["optimizer"])
    average = make_sharded_average(mesh)
    for step in range(3, 6):
        set_gradients(other, step)
        update_weights(second, other, average, 2.0)
    kinds = {type(second.state[param]["exp_avg"]) for param in other.parameters()}
    return kinds == {DTensor} and all(map(torch.equal, results, [param.to_local() for param in other.parameters()]))


def refusal(params):
    try:
        Lamb(params).step()
    except ValueError as error:
        return str(error)
    return ""


def everything(rank, world_size, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    said = {}
    try:
        for backend, moment_type in operations(world_size):
            said[backend, moment_type] = operation(rank, world_size, backend, moment_type)
        for shape, sizes in meshes(world_size).items():
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
            for name in OPTIMIZERS:
                said[shape, name] = optimizer(mesh, name)
                said["restored", shape, name] = restored(mesh, name, folder / f"{shape} {name}")
        mesh = init_device_mesh("cpu", (world_size,))
        params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [kind])) for kind in (Shard(0), Replicate())]
        said["refused"] = refusal(params)
        said["partial"] = refusal([nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))])
        twice = init_device_mesh("cpu", (2, world_size // 2))
        said["twice"] = refusal([nn.Parameter(distribute_tensor(torch.ones(4), twice, [Shard(0), Shard(0)]))])
        dist.barrier()  # no rank exits while others still communicate
    except Exception:  # noqa: BLE001 - the test reports this rank's error
        said["raised"] = traceback.format_exc()
    results.put((rank, said))
    results.close()
    results.join_thread()  # flush, in case this process crashes below
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def said(request, tmp_path_factory):
    """Results of every rank, from one launch of the processes."""
    return on_ranks(request.param, everything, request.param, tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def nothing_raised(request):
    if "said" in request.fixturenames:
        for rank, found in request.getfixturevalue("said").items():
            assert "raised" not in found, f"rank {rank}: {found['raised']}"


def test_shards_take_the_step_of_the_whole(said):
    """Sums in a different order differ by rounding; with bf16 moments, by some of their roundings."""
    for found in said.values():
        for backend, moment_type in operations(len(said)):
            error, stayed = found[backend, moment_type]
            assert error < (1e-6 if moment_type == torch.float32 else 2**-8), (backend, moment_type)
            assert stayed


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_models_take_the_step_of_whole_ones(said, name):
    """Also if a second mesh dimension replicates the shards."""
    for found in said.values():
        for shape in meshes(len(said)):
            error, stayed = found[shape, name]
            assert error < 1e-6
            assert stayed


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sharded_optimizer_is_saved_and_restored(said, name):
    for found in said.values():
        assert all(found["restored", shape, name] for shape in meshes(len(said)))


def test_parameters_spread_over_different_processes_are_refused(said):
    assert {found["refused"] for found in said.values()} == {
        "Lamb: parameters are spread over different processes; give each kind its own optimizer"
    }


@pytest.mark.parametrize("name", ["partial", "twice"])
def test_a_parameter_placed_in_a_way_without_norms_is_refused(said, name):
    for found in said.values():
        assert "at most one dimension of a mesh may shard it" in found[name]
