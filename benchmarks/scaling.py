"""Predictions for many GPUs: bytes sent, memory, and time per step under DDP, FSDP and HSDP. Not measured.

`python -m benchmarks.scaling` prints the tables of docs/scaling.md, which has the formulas; with `--planning` it first
measures planning on this machine (`benchmarks.planning`).

N parameters, n GPUs, 8 per node. Weights, gradients, both moments and the moving average have four bytes per parameter;
FSDP all-gathers in two bytes, every method reduces in four. Shapes as in `gptbert.model`.
"""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import planning
from benchmarks.markdown import markdown
from benchmarks.roofline import H100, Limits, TrainingStep, parameter_count
from benchmarks.traffic import LAMB_BYTES
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.model.block import Block
from gptbert.monitoring.flops import training_flops

STATE_BYTES = 4 + 4 + 8 + 4  # per parameter: weight, gradient, two moments, moving average
GATHERED, REDUCED = 2, 4  # bytes per parameter
WHOLE = 4  # bytes per parameter gathered in fp32
CAST_BYTES = 4 + 2  # read and written for the weights' bf16 copies
BUCKET_BYTES = 25 * 2**20  # of DDP's gradient buckets; the default


class Method(Enum):
    """How states are sharded, and what is communicated."""

    DDP = "DDP"
    FSDP = "FSDP"
    HSDP = "HSDP"


@dataclass(frozen=True)
class Cluster:
    """GPUs and their interconnect.

    Attributes:
        limits: of one GPU, by its data sheet.
        memory: bytes per GPU.
        per_node: GPUs per node, all connected by NVLink; each has a network port.
        node_bandwidth: bytes per second that a GPU sends over NVLink; H100 SXM data sheet: 900 GB/s both ways.
        network_bandwidth: bytes per second that a port sends: 400 Gb/s, as in a DGX H100.
        base_latency: seconds of any collective, and
        node_latency: per step over NVLink, and
        network_latency: per step over the network: ring, Simple protocol, NCCL's model (src/graph/tuning.cc).
        tree_latencies: both for a tree.
        attainable: fraction of data-sheet rates and bandwidths reached in practice; an assumption.
        hidden: fraction of a pass that can overlap communication; an assumption.
    """

    limits: Limits = H100
    memory: float = 80e9
    per_node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    base_latency: float = 8.4e-6
    node_latency: float = 3.4e-6
    network_latency: float = 9.6e-6
    tree_latencies: tuple[float, float] = (28e-6, 50e-6)
    attainable: float = 0.7
    hidden: float = 0.8


@dataclass(frozen=True)
class Group:
    """The GPUs of a collective.

    Attributes:
        cluster: that contains them.
        size: number of GPUs.
        per_node: number of them per node.
    """

    cluster: Cluster
    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes of the group."""
        return self.size // self.per_node

    @property
    def bandwidth(self) -> float:
        """Bytes per second per GPU: rings leave a node by the ports of all its GPUs in the group."""
        ports = self.per_node * self.cluster.network_bandwidth
        fastest = self.cluster.node_bandwidth
        return self.cluster.attainable * (fastest if self.nodes == 1 else min(fastest, ports))

    def gather_bytes(self, size: float) -> float:
        """Bytes that each GPU sends to all-gather, or to reduce-scatter, `size` bytes."""
        return size * (self.size - 1) / self.size

    def reduce_bytes(self, size: float) -> float:
        """Bytes that each GPU sends to all-reduce `size` bytes: a reduce-scatter, then an all-gather."""
        return 2 * self.gather_bytes(size)

    def gather_seconds(self, size: float) -> float:
        """Seconds of a ring all-gather or reduce-scatter."""
        return self._ring_seconds(1, self.gather_bytes(size))

    def reduce_seconds(self, size: float) -> float:
        """Seconds of an all-reduce by a ring, or a tree of nodes with 0.9 of its bandwidth, whichever is faster."""
        ring = self._ring_seconds(2, self.reduce_bytes(size))
        if self.nodes == 1:
            return ring
        in_node, between = self.cluster.tree_latencies
        tree = 2 * ((self.per_node - 1) * in_node + math.floor(math.log2(self.nodes)) * between)
        return min(ring, tree + self.reduce_bytes(size) / (0.9 * self.bandwidth))

    def _ring_seconds(self, rounds: int, sent: float) -> float:
        if self.size == 1:
            return 0.0
        cluster, between = self.cluster, self.nodes - 1
        steps = (self.size - 1 - between) * cluster.node_latency + between * cluster.network_latency
        return cluster.base_latency + rounds * steps + sent / self.bandwidth


@dataclass(frozen=True)
class Setup:
    """A model on GPUs.

    Attributes:
        config: the model's shape.
        method: of sharding.
        gpus: n; whole nodes if more than `per_node`.
        rows: per GPU and step.
        seq_length: T.
        labeled_fraction: fraction of labeled positions; 1 for CLM, whose ranks take longest.
        cluster: the GPUs.
        bucket_bytes: of DDP's gradient buckets.
    """

    config: ModelConfig
    method: Method
    gpus: int
    rows: int = 16
    seq_length: int = 512
    labeled_fraction: float = 1.0
    cluster: Cluster = Cluster()
    bucket_bytes: float = BUCKET_BYTES

    @cached_property
    def parameters(self) -> int:
        """N."""
        return parameter_count(self.config)

    @cached_property
    def units(self) -> list[int]:
        """Parameters of each all-gather unit: embedding and head, then each block."""
        with torch.device("meta"):
            layers = range(self.config.num_hidden_layers)
            blocks = [sum(param.numel() for param in Block(self.config, layer).parameters()) for layer in layers]
        return [self.parameters - sum(blocks), *blocks]

    @cached_property
    def gathered(self) -> list[float]:
        """Bytes per all-gather: embedding and head in fp32, which autocast does not cast, blocks in bf16."""
        root, *blocks = self.units
        return [WHOLE * root, *(GATHERED * block for block in blocks)]

    @property
    def everywhere(self) -> Group:
        """All GPUs."""
        return Group(self.cluster, self.gpus, min(self.gpus, self.cluster.per_node))

    @property
    def sharers(self) -> Group:
        """GPUs over which states are sharded: all for FSDP, those of a node for HSDP."""
        together = {Method.DDP: 1, Method.FSDP: self.gpus, Method.HSDP: min(self.gpus, self.cluster.per_node)}
        return Group(self.cluster, together[self.method], min(together[self.method], self.cluster.per_node))

    @property
    def copies(self) -> Group:
        """GPUs with the same shard of the states."""
        size = self.gpus // self.sharers.size
        return Group(self.cluster, size, min(size, self.cluster.per_node) if self.method is Method.DDP else 1)

    def sent(self) -> tuple[float, float]:
        """Bytes that a GPU sends per step: in total, and through its network port."""
        root, *blocks = self.gathered
        gathered = root + 2 * sum(blocks)  # blocks again in the backward; embedding and head stay gathered
        in_sharers = self.sharers.gather_bytes(gathered + REDUCED * self.parameters)
        in_copies = self.copies.reduce_bytes(REDUCED * self.parameters / self.sharers.size)
        network = [
            sent / group.per_node
            for group, sent in ((self.sharers, in_sharers), (self.copies, in_copies))
            if group.nodes > 1
        ]
        return in_sharers + in_copies, sum(network)

    def state_bytes(self) -> float:
        """Bytes per GPU throughout the run."""
        return STATE_BYTES * self.parameters / self.sharers.size

    def working_bytes(self) -> float:
        """Casts of all weights; with sharding, two gathered blocks or embedding and head, and unreduced gradients."""
        if self.method is Method.DDP:
            return GATHERED * self.parameters
        root, *blocks = self.units
        return max((WHOLE + REDUCED) * root, (2 * GATHERED + REDUCED) * max(blocks))

    def activation_bytes(self, *, recompute: bool) -> float:
        """Bytes of activations saved for the backward.

        Args:
            recompute: with `--activation_checkpointing`, only the inputs of attention and feed-forward, the activations
                of one of them at a time, and all representations, which the layer weighting needs in any case.
        """
        config, hidden = self.config, self.config.hidden_size
        attention = 14 * hidden + 2 * config.num_attention_heads * self.seq_length  # bytes per token
        feed_forward = 2 * hidden + 6 * config.intermediate_size
        representations, inputs = 2 * 4 * hidden, 2 * 4 * hidden
        layers = config.num_hidden_layers
        kept = layers * (representations + attention + feed_forward)
        if recompute:
            kept = layers * (representations + inputs) + max(attention, feed_forward)
        head = self.labeled_fraction * (12 * hidden + 2 * config.vocab_size)
        return self.rows * self.seq_length * (kept + 4 * hidden + head)

    def memory_bytes(self, *, recompute: bool = False) -> float:
        """Peak bytes per GPU."""
        return self.state_bytes() + self.working_bytes() + self.activation_bytes(recompute=recompute)

    @cached_property
    def compute_seconds(self) -> float:
        """Forward and backward, not fused, as docs/performance.md counts, at the attainable part of a GPU's limits."""
        step = TrainingStep(self.config, self.rows, self.seq_length, self.labeled_fraction)
        return sum(part.ours.seconds(self.cluster.limits) for part in step.model_parts()) / self.cluster.attainable

    def mfu(self) -> float:
        """Needed FLOPs over the GPU's peak in `compute_seconds`."""
        tokens = self.rows * self.seq_length
        needed = tokens * training_flops(self.config, self.seq_length, self.labeled_fraction)
        return needed / (self.compute_seconds * self.cluster.limits.flops)

    def optimizer_seconds(self) -> float:
        """LAMB, the moving average and casts of a GPU's shard."""
        moved = (LAMB_BYTES + CAST_BYTES) * self.parameters / self.sharers.size
        return moved / (self.cluster.attainable * self.cluster.limits.bandwidth)

    def exposed_seconds(self) -> float:
        """Exposed communication: beyond the overlap with a pass, and before or after passes."""
        forward, backward = (share * self.cluster.hidden * self.compute_seconds for share in (1 / 3, 2 / 3))
        scalars = self.everywhere.reduce_seconds(8) if self.gpus > 1 else 0.0  # the step's number of labels
        if self.method is Method.DDP:
            buckets = math.ceil(REDUCED * self.parameters / self.bucket_bytes)
            bucket = self.copies.reduce_seconds(REDUCED * self.parameters / buckets)
            return scalars + max(buckets * bucket - backward, bucket)
        gather = [self.sharers.gather_seconds(unit) for unit in self.gathered]
        scatter = [self.sharers.gather_seconds(REDUCED * unit) for unit in self.units]
        reduce = [self.copies.reduce_seconds(REDUCED * unit / self.sharers.size) for unit in self.units]
        scalars *= 3  # also the gradient norm and LAMB's norms
        behind = max(sum(gather[1:]) + sum(scatter), sum(reduce))  # NVLink and network overlap
        return scalars + max(sum(gather) - forward, gather[0]) + max(behind - backward, scatter[0] + reduce[0])

    def step_seconds(self) -> float:
        """Seconds per step."""
        return self.compute_seconds + self.exposed_seconds() + self.optimizer_seconds()

    def efficiency(self) -> float:
        """Tokens per second per GPU, relative to one GPU with enough memory for the model."""
        alone = dataclasses.replace(self, method=Method.DDP, gpus=1)
        return (alone.compute_seconds + alone.optimizer_seconds()) / self.step_seconds()


def table(config: ModelConfig, gpus: tuple[int, ...] = (8, 64, 1024)) -> str:
    """Markdown: every method for these numbers of GPUs; HSDP on more than one node, where it differs from FSDP."""
    columns = ("GPUs", "method", "sent GB", "by network GB", "states GB", "memory GB", "recomputing GB")
    rows = [(*columns, "compute ms", "exposed ms", "optimizer ms", "step ms", "efficiency")]
    for number in gpus:
        for method in Method:
            setup = Setup(config, method, number)
            if method is Method.HSDP and setup.copies.size == 1:
                continue
            gigabytes = (*setup.sent(), setup.state_bytes(), setup.memory_bytes(), setup.memory_bytes(recompute=True))
            seconds = (
                setup.compute_seconds, setup.exposed_seconds(), setup.optimizer_seconds(), setup.step_seconds()
            )  # fmt: skip
            cells = [f"{value / 1e9:.2f}" for value in gigabytes] + [f"{1e3 * value:.1f}" for value in seconds]
            rows.append((f"{number:,}", method.value, *cells, f"{setup.efficiency():.2f}"))
    return "\n".join(markdown(rows, text_columns=(1,)))


def heading(name: str, config: ModelConfig) -> str:
    """One line that describes the table."""
    setup = Setup(config, Method.DDP, 1)
    tokens = setup.rows * setup.seq_length
    return f"`configs/{name}.json`, {setup.parameters:,} parameters, {tokens:,} tokens a GPU, MFU {setup.mfu():.2f}:"


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Predict training on many H100s, for the shapes in configs/."""

    names: tuple[str, ...] = ("small", "base", "1b")
    """Shapes, by file name."""
    planning: bool = False
    """First measure the planning of a large run on this machine: one minute, 100 MB of temporary files."""


def run(config: ScalingConfig) -> None:
    """Print everything."""
    if config.planning:
        planning.run(planning.PlanningConfig())
        print()
    tables = [(name, ModelConfig.from_json(Path("configs") / f"{name}.json")) for name in config.names]
    print("\n\n".join(f"{heading(name, shape)}\n\n{table(shape)}" for name, shape in tables))


if __name__ == "__main__":
    run_command(ScalingConfig, run)
