"""Scaling predictions: formulas checked by hand, real parameter counts, and relations between methods."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.roofline import Limits
from benchmarks.scaling import Cluster, Group, Method, ScalingConfig, Setup, heading, run, table
from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from gptbert.optim import WeightAverage, build_optimizer
from tests.conftest import TINY

NAMES = ("small", "base", "1b")
SHAPES = {name: ModelConfig.from_json(f"configs/{name}.json") for name in NAMES}
ROUND = Cluster(
    Limits("", 1e12, 1e12), per_node=4, node_bandwidth=100.0, network_bandwidth=10.0, base_latency=1.0,
    node_latency=0.1, network_latency=0.5, tree_latencies=(1e9, 1e9), attainable=1.0,
)  # fmt: skip


def test_ring_bytes_by_hand():
    # 12 bytes on two GPUs: each sends one half to be added, then one sum; three GPUs send 4 bytes 2 + 2 times
    assert Group(ROUND, 2, 2).reduce_bytes(12) == 12
    assert Group(ROUND, 2, 2).gather_bytes(12) == 6
    assert Group(ROUND, 3, 3).reduce_bytes(12) == 16
    assert Group(ROUND, 1, 1).reduce_bytes(12) == 0


def test_ring_seconds_by_hand():
    node, two_nodes, ports = Group(ROUND, 4, 4), Group(ROUND, 8, 4), Group(ROUND, 2, 1)
    assert node.gather_seconds(400) == pytest.approx(1 + 3 * 0.1 + 300 / 100)
    assert node.reduce_seconds(400) == pytest.approx(1 + 6 * 0.1 + 600 / 100)
    assert two_nodes.bandwidth == 40  # of four ports
    assert two_nodes.gather_seconds(400) == pytest.approx(1 + 6 * 0.1 + 1 * 0.5 + 350 / 40)
    assert ports.gather_seconds(400) == pytest.approx(1 + 0.5 + 200 / 10)
    assert Group(ROUND, 1, 1).reduce_seconds(400) == 0
    fast_tree = dataclasses.replace(ROUND, tree_latencies=(0.01, 0.02))
    assert Group(fast_tree, 8, 4).reduce_seconds(400) == pytest.approx(2 * (3 * 0.01 + 0.02) + 700 / (0.9 * 40))


@pytest.mark.parametrize("name", NAMES)
def test_units_are_the_models_parameters(name):
    setup = Setup(SHAPES[name], Method.FSDP, 8)
    assert sum(setup.units) == setup.parameters
    assert len(setup.units) == SHAPES[name].num_hidden_layers + 1


def test_the_third_shape_has_about_a_billion():
    assert Setup(SHAPES["1b"], Method.DDP, 1).parameters == 1_074_074_160


def test_states_are_those_of_a_trainer(make_config):
    model = GPTBert(TINY)
    average, optimizer = WeightAverage(model, 0.9), build_optimizer(make_config(), model)
    for param in model.parameters():
        param.grad = param.detach().clone()
    optimizer.step()
    tensors = [*model.parameters(), *average.model.parameters(), *(param.grad for param in model.parameters())]
    for state in optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    assert sum(tensor.nbytes for tensor in tensors) == Setup(TINY, Method.DDP, 1).state_bytes()


def test_on_one_gpu_there_is_nothing_to_divide():
    one = {method: Setup(TINY, method, 1) for method in Method}
    for setup in one.values():
        assert setup.state_bytes() == one[Method.DDP].state_bytes()
        assert setup.sent() == (0, 0)
        assert setup.exposed_seconds() == 0
        assert setup.efficiency() == 1


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_bytes_sent_by_hand(gpus):
    config, nodes = SHAPES["base"], gpus // 8
    count = 119_454_532
    root = count - sum(Setup(config, Method.FSDP, 8).units[1:])
    ring = (gpus - 1) / gpus
    ddp, fsdp, hsdp = (Setup(config, method, gpus) for method in Method)
    assert ddp.sent()[0] == pytest.approx(2 * ring * 4 * count)
    assert fsdp.sent()[0] == pytest.approx(ring * (4 * root + 2 * 2 * (count - root) + 4 * count))
    across = 2 * (nodes - 1) / nodes * 4 * count / 8
    assert hsdp.sent() == pytest.approx((7 / 8 * 8 * count + across, across))
    if gpus == 8:
        assert ddp.sent()[1] == fsdp.sent()[1] == hsdp.sent()[1] == 0
    else:
        assert ddp.sent()[1] == pytest.approx(ddp.sent()[0] / 8)
        assert fsdp.sent()[1] == pytest.approx(fsdp.sent()[0] / 8)
    assert (ddp.state_bytes(), fsdp.state_bytes(), hsdp.state_bytes()) == (
        20 * count, pytest.approx(20 * count / gpus), 20 * count / 8
    )  # fmt: skip


def test_activations_by_hand():
    setup = Setup(TINY, Method.DDP, 1, rows=3, seq_length=8, labeled_fraction=0.5)
    hidden, inner, heads, vocab, layers = 16, 24, 2, 64, 2
    block = 16 * hidden + 6 * inner + 2 * heads * 8
    head = 0.5 * (12 * hidden + 2 * vocab)
    assert setup.activation_bytes(recompute=False) == 3 * 8 * (layers * (block + 8 * hidden) + 4 * hidden + head)
    recomputed = layers * 16 * hidden + max(14 * hidden + 2 * heads * 8, 2 * hidden + 6 * inner)
    assert setup.activation_bytes(recompute=True) == 3 * 8 * (recomputed + 4 * hidden + head)


def test_exposed_by_hand():
    """Nothing is hidden if passes take no time; all but the first and last transfers are if passes take forever."""
    slow = dataclasses.replace(ROUND, hidden=0.0)
    ddp = Setup(TINY, Method.DDP, 4, cluster=slow, bucket_bytes=1e9)
    everywhere, count = ddp.everywhere, ddp.parameters
    assert ddp.exposed_seconds() == pytest.approx(everywhere.reduce_seconds(8) + everywhere.reduce_seconds(4 * count))
    halves = dataclasses.replace(ddp, bucket_bytes=2 * count)
    assert halves.exposed_seconds() == pytest.approx(
        everywhere.reduce_seconds(8) + 2 * everywhere.reduce_seconds(2 * count)
    )
    fsdp = Setup(TINY, Method.FSDP, 4, cluster=slow)
    root, *blocks = fsdp.units
    passes = [everywhere.gather_seconds(4 * root)]
    passes += [everywhere.gather_seconds(2 * unit) for unit in (*blocks, *blocks)]
    scatters = [everywhere.gather_seconds(4 * unit) for unit in fsdp.units]
    scalars = 3 * everywhere.reduce_seconds(8)
    assert fsdp.exposed_seconds() == pytest.approx(scalars + sum(passes) + sum(scatters))
    hidden = dataclasses.replace(fsdp, cluster=dataclasses.replace(ROUND, hidden=1e30))
    assert hidden.exposed_seconds() == pytest.approx(scalars + passes[0] + scatters[0])
    hsdp = Setup(TINY, Method.HSDP, 8, cluster=hidden.cluster)
    node, ports = Group(hidden.cluster, 4, 4), Group(hidden.cluster, 2, 1)
    assert hsdp.exposed_seconds() == pytest.approx(
        3 * hsdp.everywhere.reduce_seconds(8)
        + node.gather_seconds(4 * root) + node.gather_seconds(4 * root) + ports.reduce_seconds(4 * root / 4)
    )  # fmt: skip


def test_nvlink_and_network_work_at_the_same_time():
    hsdp = Setup(TINY, Method.HSDP, 8, cluster=dataclasses.replace(ROUND, hidden=0.0))
    node, ports = Group(hsdp.cluster, 4, 4), Group(hsdp.cluster, 2, 1)
    root, *blocks = hsdp.units
    gathers = [node.gather_seconds(4 * root), *(node.gather_seconds(2 * block) for block in blocks)]
    by_node = sum(gathers[1:]) + sum(node.gather_seconds(4 * unit) for unit in hsdp.units)
    by_network = sum(ports.reduce_seconds(4 * unit / 4) for unit in hsdp.units)
    scalars = 3 * hsdp.everywhere.reduce_seconds(8)
    assert hsdp.exposed_seconds() == pytest.approx(scalars + sum(gathers) + max(by_node, by_network))


def test_working_memory_by_hand():
    ddp, fsdp = (Setup(TINY, method, 4) for method in (Method.DDP, Method.FSDP))
    assert ddp.working_bytes() == 2 * ddp.parameters
    assert fsdp.working_bytes() == (2 * 2 + 4) * max(fsdp.units[1:]) > (4 + 4) * fsdp.units[0]
    wide = Setup(dataclasses.replace(TINY, vocab_size=10_000), Method.FSDP, 4)
    assert wide.working_bytes() == (4 + 4) * wide.units[0]
    kept = fsdp.activation_bytes(recompute=True)
    assert fsdp.memory_bytes(recompute=True) == fsdp.state_bytes() + fsdp.working_bytes() + kept


def test_a_step_is_its_parts_and_efficiency_their_share():
    setup = Setup(SHAPES["1b"], Method.DDP, 64)
    parts = setup.compute_seconds + setup.exposed_seconds() + setup.optimizer_seconds()
    assert setup.step_seconds() == parts
    assert setup.efficiency() == pytest.approx(1 - setup.exposed_seconds() / parts)
    assert Setup(SHAPES["1b"], Method.FSDP, 64).optimizer_seconds() == pytest.approx(setup.optimizer_seconds() / 64)


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_in_the_documentation_are_these(name, capsys):
    text = Path("docs/scaling.md").read_text()
    shown = f"{heading(name, SHAPES[name])}\n\n{table(SHAPES[name])}"
    assert shown in text
    run(ScalingConfig(names=(name,)))
    assert capsys.readouterr().out == shown + "\n"
