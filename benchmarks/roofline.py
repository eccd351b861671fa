"""The work of a training step: FLOPs of matrix products and bytes of memory traffic, part by part.

`python -m benchmarks.roofline --config_file configs/base.json` prints tables like those of docs/performance.md, with
three counts per part. Fewest: every operand of a product read once, its result written once, all else fused into
products, and each mix of the layer weighting reading its inputs. Not fused: this implementation on a CPU, or where its
operations are not fused. Fused: with the fused Triton kernels, whose mixes come in groups, in a run whose steps are one
micro-batch each. A part takes at least its FLOPs over the peak rate or its bytes over the bandwidth, whichever is more,
and the time between its launches.

Shapes as in `gptbert.model`; activations and cast weights have two bytes, the residual stream and gradients four.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from benchmarks.markdown import markdown
from benchmarks.traffic import COPY_BYTES, LAMB_BYTES, copied_parameters, mix_bytes
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.model import GPTBert

LAMB_FLOPS = 27  # per parameter, with clipping and moving average
LAUNCHES, LAYER_LAUNCHES = 83, 38.3  # of the fused step, by `benchmarks.launches`; mixes come in groups of three layers


@dataclass(frozen=True)
class Limits:
    """The limits of a machine.

    Attributes:
        name: of the machine.
        flops: FLOPs per second of bf16 matrix products.
        bandwidth: bytes per second, memory reads plus writes.
        launch: seconds between two kernels of a CUDA graph.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float = 0.0


# NVIDIA's data sheet, SXM: dense bf16, HBM3
# launch: 2,563 kernels took 35.9 ms, and in one graph 37.5, on an H100 (docs/performance.md)
H100 = Limits("H100 SXM", flops=989.4e12, bandwidth=3.35e12, launch=0.6e-6)


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes of memory traffic, and launches of kernels."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)

    def __rmul__(self, times: float) -> Self:
        return type(self)(times * self.flops, times * self.bytes, times * self.launches)

    def seconds(self, limits: Limits) -> float:
        """The minimum time at a machine's limits."""
        return max(self.flops / limits.flops, self.bytes / limits.bandwidth) + self.launches * limits.launch


@dataclass(frozen=True)
class Part:
    """A part of the step.

    Attributes:
        name: what it does.
        fewest: see the module.
        ours: of this implementation, not fused.
        fused: of the fused kernels.
    """

    name: str
    fewest: Work
    ours: Work
    fused: Work


@dataclass(frozen=True)
class TrainingStep:
    """One step of one process.

    Attributes:
        config: of the model.
        rows: B.
        seq_length: T.
        labeled_fraction: fraction of labeled positions: about mask_p, or 1 for CLM.
    """

    config: ModelConfig
    rows: int
    seq_length: int
    labeled_fraction: float

    @property
    def tokens(self) -> int:
        """B·T."""
        return self.rows * self.seq_length

    def parts(self) -> list[Part]:
        """All parts of the step, forward plus backward."""
        return [*self.model_parts(), self._weights(), self._masking(), self._launches()]

    def model_parts(self) -> list[Part]:
        """The parts of the model's forward and backward."""
        return [
            *(self._projections(), self._attention(), self._between_products(), self._layer_weighting()),
            *(self._embedding(), self._head()),
        ]

    def optimizer(self) -> Work:
        """Clipping, LAMB and the moving average."""
        return parameter_count(self.config) * Work(LAMB_FLOPS, LAMB_BYTES)

    def _projections(self) -> Part:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        shapes = ((hidden, 4 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden))
        work = sum((_product(self.tokens, *shape) for shape in shapes), Work())
        layers = self.config.num_hidden_layers
        fused = work + Work(0, 2 * 4 * hidden * self.tokens)  # sums for the bias of queries, keys, values and gates
        return Part("projections", layers * work, layers * work, layers * fused)

    def _attention(self) -> Part:
        config, layers = self.config, self.config.num_hidden_layers
        hidden = self.tokens * config.hidden_size  # elements of Q, K, V, context each
        scores = self.tokens * config.num_attention_heads * self.seq_length
        positions = 2 * config.position_bucket_size - 1
        by_position = self.tokens * config.num_attention_heads * positions
        flops = 3 * 4 * hidden * (self.seq_length + positions)
        fewest = Work(flops, (3 + 1 + 5 + 3) * 2 * hidden)  # no tensor of size T² leaves the chip
        forward = (2 + 3) * 2 * scores + 4 * 2 * by_position + 6 * 2 * hidden
        # dropout again and softmax's backward 5, the four products 4, bucket sums 2 · (copy 2 + product over 2T 2)
        backward = (5 + 4 + 8) * 2 * scores + 6 * 2 * by_position + 12 * 2 * hidden
        ours = Work(flops + 2 * 2 * 2 * scores * positions, forward + backward)
        # Forward: queries, keys and values to an output; backward: two kernels, of queries, and of keys and values.
        # Products of N × N × d for a tile of scores: in all three, content, and positions of twice as many distances;
        # with values forward; the gradients of weights and queries, and sums by bucket; of weights, values and keys.
        in_tiles, by_bucket = 1 + 2 * 2, 2 * (positions + 1) * config.num_attention_heads / config.hidden_size
        products = 3 * in_tiles + 1 + 2 + 3 + 2 * by_bucket
        fused = Work(products * 2 * hidden * self.seq_length, (4 + 6 + 6) * 2 * hidden)
        return Part("attention", layers * fewest, layers * ours, layers * fused)

    def _between_products(self) -> Part:
        """LayerNorms, gates, dropout and residual connections: one pass each, forward and backward."""
        hidden, inner = self.tokens * self.config.hidden_size, self.tokens * self.config.intermediate_size
        forward, backward = 38 * hidden + 6 * inner, 50 * hidden + 16 * inner
        fused = Work(0, (6 + 12) * (hidden + inner))  # gated norms; the rest is in the mixes
        layers = self.config.num_hidden_layers
        return Part("norms, gates, dropout", Work(), layers * Work(0, forward + backward), layers * fused)

    def _layer_weighting(self) -> Part:
        """x_n reads n + 1 representations; ∂/∂α_n reads them again, ∂/∂y_n the gradients of all later x."""
        mixes = 2 * self.config.num_hidden_layers
        passes = sum((n + 1) + 1 + (n + 1) + 1 + (mixes - n + 1) + 1 for n in range(1, mixes + 1))
        entries = 4 * self.tokens * self.config.hidden_size
        copies = 2 * 2 * mixes
        fused = Work(0, mix_bytes(mixes) * self.tokens * self.config.hidden_size)
        return Part("layer weighting", Work(0, passes * entries), Work(0, (passes + copies) * entries), fused)

    def _embedding(self) -> Part:
        entries = self.tokens * self.config.hidden_size
        table = self.config.vocab_size * self.config.hidden_size
        fewest = Work(0, (2 + 1) * 4 * entries)
        # forward 2, backward 3; rows' gradients into a table, which is added to that of the head
        ours = Work(0, (2 + 3 + 3) * 4 * entries + 4 * table)
        # or to their rows of the head's, at most as many
        return Part("embedding", fewest, ours, Work(0, (2 + 3 + 3) * 4 * entries))

    def _head(self) -> Part:
        config, labeled = self.config, self.labeled_fraction * self.tokens
        dense = _product(labeled, config.hidden_size, config.hidden_size)
        logits = _product(labeled, config.hidden_size, config.vocab_size)
        kernel = Work(0, 2 * 2 * labeled * config.vocab_size)  # logits to their gradients, in place
        hidden, table = labeled * config.hidden_size, config.vocab_size * config.hidden_size
        without = Work(logits.flops, (2 + 2 + 2) * hidden + (2 + 2 + 4) * table)  # logits never leave the chip
        fused = dense + logits + kernel
        ours = fused + Work(0, 2 * 4 * table)  # the backward multiplies the weight's gradient
        return Part("head and cross-entropy", dense + without, ours, fused + Work(0, (2 + 3) * 2 * hidden))

    def _weights(self) -> Part:
        parameters = parameter_count(self.config)
        copied = copied_count(self.config)
        optimizer, casts = self.optimizer(), Work(0, (4 + 2) * parameters)
        # LAMB writes copies; others, as the head's, are made by autocast; gradients that no product writes are cleared
        added = parameters - copied_count(self.config, least_dimensions=2)
        fused = optimizer + Work(0, COPY_BYTES * copied + (4 + 2) * (parameters - copied) + 4 * added)
        return Part("optimizer and casts", optimizer, optimizer + casts, fused)

    def _masking(self) -> Part:
        fewest = Work(0, 3 * 8 * self.tokens)  # tokens to inputs and labels
        ours = fewest + Work(0, 5 * 8 * self.tokens)  # documents, the attention mask, copies
        return Part("masking", fewest, ours, ours)

    def _launches(self) -> Part:
        fused = Work(0, 0, LAUNCHES + LAYER_LAUNCHES * self.config.num_hidden_layers)
        return Part("launches in a graph", Work(), Work(), fused)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, the tied embedding once."""
    with torch.device("meta"):
        return sum(param.numel() for param in GPTBert(config).parameters())


def copied_count(config: ModelConfig, least_dimensions: int = 1) -> int:
    """Number of parameters whose copies in bf16 are written by LAMB in fused steps; or of those in matrices."""
    with torch.device("meta"):
        copied = copied_parameters(GPTBert(config))
    return sum(param.numel() for param in copied if param.ndim >= least_dimensions)


def _product(rows: float, inputs: int, outputs: int) -> Work:
    """Y = X·W of `rows` rows, then ∂X and ∂W; ∂W is written in fp32, and ∂Y is read for each."""
    x, w, y = rows * inputs, inputs * outputs, rows * outputs
    return Work(3 * 2 * rows * inputs * outputs, 2 * (x + w + y) + 2 * (y + w + x) + 2 * (x + y) + 4 * w)


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """Count the work of a training step, and divide by a machine's limits."""

    config_file: Path = Path("configs/small.json")
    """Model."""
    rows: int = 256
    """B per process."""
    seq_length: int = 128
    """T."""
    labeled_fraction: float = 0.15
    """Fraction of labeled positions: about mask_p, or 1 for CLM."""
    tera_flops: float = H100.flops / 1e12
    """10^12 FLOPs per second of bf16 matrix products; default: an H100's data sheet."""
    bandwidth: float = H100.bandwidth / 1e12
    """10^12 bytes per second of memory; default: an H100's data sheet."""
    launch: float = 1e6 * H100.launch
    """Microseconds between two kernels of a CUDA graph; default: an H100's."""


def table(step: TrainingStep, limits: Limits) -> str:
    """Markdown: each part's FLOPs and bytes, fewest, ours and fused, and their times at the machine's limits."""
    rows = [["part", "GFLOP", "fewest GB", "floor ms"]]
    for kind in ("not fused", "fused"):
        rows[0] += ["GFLOP", f"{kind} GB", "ms"]
    parts = step.parts()
    for part in parts:
        figures = []
        for work in (part.fewest, part.ours, part.fused):
            figures += [f"{work.flops / 1e9:.1f}", f"{work.bytes / 1e9:.3f}", f"{1e3 * work.seconds(limits):.3f}"]
        rows.append([part.name, *figures])
    sums = []
    for kind in ("fewest", "ours", "fused"):
        works = [getattr(part, kind) for part in parts]
        total = sum(works, Work())
        seconds = sum(work.seconds(limits) for work in works)
        sums += [f"{total.flops / 1e9:.1f}", f"{total.bytes / 1e9:.3f}", f"{1e3 * seconds:.3f}"]
    return "\n".join(markdown([*rows, ["all", *sums]]))


def run(config: RooflineConfig) -> None:
    """Print the table."""
    model_config = ModelConfig.from_json(config.config_file)
    step = TrainingStep(model_config, config.rows, config.seq_length, config.labeled_fraction)
    print(table(step, Limits("", 1e12 * config.tera_flops, 1e12 * config.bandwidth, config.launch / 1e6)))


if __name__ == "__main__":
    run_command(RooflineConfig, run)
