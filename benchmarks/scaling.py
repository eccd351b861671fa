"""What more GPUs would give, predicted: bytes sent, memory, and time of a step under DDP, FSDP and HSDP. None has run.

`python -m benchmarks.scaling` prints the tables of docs/scaling.md, which has the formulas; with `--planning` it first
measures what planning takes on this machine (`benchmarks.planning`).

N parameters, n GPUs, of which 8 share a node. Weights, gradients, both moments and the moving average have four bytes a
parameter; what FSDP gathers has two, what any method reduces has four. Letters of shapes as in `gptbert.model`.
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
from gptbert.model.gptbert import Block
from gptbert.monitoring.flops import training_flops

STATE_BYTES = 4 + 4 + 8 + 4  # a parameter: weight, gradient, two moments, moving average
GATHERED, REDUCED = 2, 4  # bytes a parameter
WHOLE = 4  # bytes of a parameter that is gathered in fp32
CAST_BYTES = 4 + 2  # read and written for the weights' bf16 copies
BUCKET_BYTES = 25 * 2**20  # of DDP's gradients; its default


class Method(Enum):
    """How the states are divided, and what is sent for it."""

    DDP = "DDP"
    FSDP = "FSDP"
    HSDP = "HSDP"


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them.

    Attributes:
        limits: of one GPU, by its data sheet.
        memory: bytes of one GPU.
        per_node: GPUs of a node, all connected by NVLink; each has a network port.
        node_bandwidth: bytes a second that a GPU sends over NVLink; the H100 SXM's data sheet says 900 GB/s both ways.
        network_bandwidth: bytes a second that a port sends: 400 Gb/s, as in a DGX H100.
        base_latency: seconds of any collective, and
        node_latency: of each of its steps over NVLink, and
        network_latency: over the network: ring and Simple protocol in NCCL's own model (src/graph/tuning.cc).
        tree_latencies: the same two of a tree.
        attainable: share of bandwidths and of data sheets that real programs see; an assumption.
        hidden: share of a pass behind which communication can go on; an assumption.
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
    """GPUs that take part in a collective.

    Attributes:
        cluster: they are part of.
        size: how many.
        per_node: how many of them share a node.
    """

    cluster: Cluster
    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """That the group reaches over."""
        return self.size // self.per_node

    @property
    def bandwidth(self) -> float:
        """Bytes a second that each GPU passes on: rings leave a node by the ports of all its GPUs in the group."""
        ports = self.per_node * self.cluster.network_bandwidth
        fastest = self.cluster.node_bandwidth
        return self.cluster.attainable * (fastest if self.nodes == 1 else min(fastest, ports))

    def gather_bytes(self, size: float) -> float:
        """Sent by each GPU to gather `size` bytes on all of them, or to reduce and scatter them."""
        return size * (self.size - 1) / self.size

    def reduce_bytes(self, size: float) -> float:
        """Sent by each GPU to reduce `size` bytes on all of them: scattered, then gathered."""
        return 2 * self.gather_bytes(size)

    def gather_seconds(self, size: float) -> float:
        """Of a ring; the same for a reduce-scatter."""
        return self._ring_seconds(1, self.gather_bytes(size))

    def reduce_seconds(self, size: float) -> float:
        """Of an all-reduce by a ring, or by a tree of nodes with nine tenths of its bandwidth, whichever is faster."""
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
        method: of dividing it.
        gpus: n; whole nodes where there are more than one node has.
        rows: of each GPU in a step.
        seq_length: T.
        labeled_fraction: share of the positions with a label; 1 for CLM, whose ranks take longest.
        cluster: the GPUs.
        bucket_bytes: of gradients that DDP reduces at once.
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
        """Parameters of what is gathered at once: embedding and head, then each block."""
        with torch.device("meta"):
            layers = range(self.config.num_hidden_layers)
            blocks = [sum(param.numel() for param in Block(self.config, layer).parameters()) for layer in layers]
        return [self.parameters - sum(blocks), *blocks]

    @cached_property
    def gathered(self) -> list[float]:
        """Bytes of each unit as it travels: embedding and head in fp32, as autocast leaves them, and blocks in bf16."""
        root, *blocks = self.units
        return [WHOLE * root, *(GATHERED * block for block in blocks)]

    @property
    def everywhere(self) -> Group:
        """All GPUs."""
        return Group(self.cluster, self.gpus, min(self.gpus, self.cluster.per_node))

    @property
    def sharers(self) -> Group:
        """GPUs that divide the states among them: all for FSDP, those of a node for HSDP."""
        together = {Method.DDP: 1, Method.FSDP: self.gpus, Method.HSDP: min(self.gpus, self.cluster.per_node)}
        return Group(self.cluster, together[self.method], min(together[self.method], self.cluster.per_node))

    @property
    def copies(self) -> Group:
        """GPUs that hold the same part of the states."""
        size = self.gpus // self.sharers.size
        return Group(self.cluster, size, min(size, self.cluster.per_node) if self.method is Method.DDP else 1)

    def sent(self) -> tuple[float, float]:
        """Bytes that a GPU sends in a step: all of them, and through its network port."""
        root, *blocks = self.gathered
        gathered = root + 2 * sum(blocks)  # blocks again in the backward, embedding and head stay
        in_sharers = self.sharers.gather_bytes(gathered + REDUCED * self.parameters)
        in_copies = self.copies.reduce_bytes(REDUCED * self.parameters / self.sharers.size)
        network = [
            sent / group.per_node
            for group, sent in ((self.sharers, in_sharers), (self.copies, in_copies))
            if group.nodes > 1
        ]
        return in_sharers + in_copies, sum(network)

    def state_bytes(self) -> float:
        """Of a GPU, in every moment of the run."""
        return STATE_BYTES * self.parameters / self.sharers.size

    def working_bytes(self) -> float:
        """Casts of all weights; where states are divided, two blocks or the rest gathered, and gradients to scatter."""
        if self.method is Method.DDP:
            return GATHERED * self.parameters
        root, *blocks = self.units
        return max((WHOLE + REDUCED) * root, (2 * GATHERED + REDUCED) * max(blocks))

    def activation_bytes(self, *, recompute: bool) -> float:
        """What a forward keeps for the backward.

        Args:
            recompute: with `--activation_checkpointing`, only the inputs of attention and feed-forward, what one
                of them keeps at a time, and all representations, which the layer weighting needs in any case.
        """
        config, hidden = self.config, self.config.hidden_size
        attention = 14 * hidden + 2 * config.num_attention_heads * self.seq_length  # bytes a token
        feed_forward = 2 * hidden + 6 * config.intermediate_size
        representations, inputs = 2 * 4 * hidden, 2 * 4 * hidden
        layers = config.num_hidden_layers
        kept = layers * (representations + attention + feed_forward)
        if recompute:
            kept = layers * (representations + inputs) + max(attention, feed_forward)
        head = self.labeled_fraction * (12 * hidden + 2 * config.vocab_size)
        return self.rows * self.seq_length * (kept + 4 * hidden + head)

    def memory_bytes(self, *, recompute: bool = False) -> float:
        """Of a GPU."""
        return self.state_bytes() + self.working_bytes() + self.activation_bytes(recompute=recompute)

    @cached_property
    def compute_seconds(self) -> float:
        """Forward and backward, by the counts of docs/performance.md at the attainable share of the GPU's limits."""
        step = TrainingStep(self.config, self.rows, self.seq_length, self.labeled_fraction)
        return sum(part.ours.seconds(self.cluster.limits) for part in step.model_parts()) / self.cluster.attainable

    def mfu(self) -> float:
        """Needed FLOPs over what the GPU could do in `compute_seconds`."""
        tokens = self.rows * self.seq_length
        needed = tokens * training_flops(self.config, self.seq_length, self.labeled_fraction)
        return needed / (self.compute_seconds * self.cluster.limits.flops)

    def optimizer_seconds(self) -> float:
        """LAMB, the moving average and casts of a GPU's part of the states."""
        moved = (LAMB_BYTES + CAST_BYTES) * self.parameters / self.sharers.size
        return moved / (self.cluster.attainable * self.cluster.limits.bandwidth)

    def exposed_seconds(self) -> float:
        """Communication that nothing hides: what does not fit behind a pass, and what comes before or after it."""
        forward, backward = (share * self.cluster.hidden * self.compute_seconds for share in (1 / 3, 2 / 3))
        scalars = self.everywhere.reduce_seconds(8) if self.gpus > 1 else 0.0  # the labels of the step
        if self.method is Method.DDP:
            buckets = math.ceil(REDUCED * self.parameters / self.bucket_bytes)
            bucket = self.copies.reduce_seconds(REDUCED * self.parameters / buckets)
            return scalars + max(buckets * bucket - backward, bucket)
        gather = [self.sharers.gather_seconds(unit) for unit in self.gathered]
        scatter = [self.sharers.gather_seconds(REDUCED * unit) for unit in self.units]
        reduce = [self.copies.reduce_seconds(REDUCED * unit / self.sharers.size) for unit in self.units]
        scalars *= 3  # the gradient's norm and those of LAMB too
        behind = max(sum(gather[1:]) + sum(scatter), sum(reduce))  # NVLink and network work at the same time
        return scalars + max(sum(gather) - forward, gather[0]) + max(behind - backward, scatter[0] + reduce[0])

    def step_seconds(self) -> float:
        """All of a step."""
        return self.compute_seconds + self.exposed_seconds() + self.optimizer_seconds()

    def efficiency(self) -> float:
        """Tokens a second and GPU, over those of one GPU with memory enough for the whole model."""
        alone = dataclasses.replace(self, method=Method.DDP, gpus=1)
        return (alone.compute_seconds + alone.optimizer_seconds()) / self.step_seconds()


def table(config: ModelConfig, gpus: tuple[int, ...] = (8, 64, 1024)) -> str:
    """Markdown: every method on these numbers of GPUs; HSDP on more than a node, where it differs from FSDP."""
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
    """One line about what the table is of."""
    setup = Setup(config, Method.DDP, 1)
    tokens = setup.rows * setup.seq_length
    return f"`configs/{name}.json`, {setup.parameters:,} parameters, {tokens:,} tokens a GPU, MFU {setup.mfu():.2f}:"


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Predict training on many H100s, for the shapes in configs/."""

    names: tuple[str, ...] = ("small", "base", "1b")
    """Shapes, by their files' names."""
    planning: bool = False
    """First measure the planning of a large run on this machine: a minute, and 100 MB of temporary files."""


def run(config: ScalingConfig) -> None:
    """Print everything."""
    if config.planning:
        planning.run(planning.PlanningConfig())
        print()
    tables = [(name, ModelConfig.from_json(Path("configs") / f"{name}.json")) for name in config.names]
    print("\n\n".join(f"{heading(name, shape)}\n\n{table(shape)}" for name, shape in tables))


if __name__ == "__main__":
    run_command(ScalingConfig, run)
