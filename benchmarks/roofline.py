"""The work of a training step: FLOPs of matrix products and bytes of memory traffic, part by part.

`python -m benchmarks.roofline --config_file configs/base.json` prints tables like those of docs/performance.md, with
two counts per part. Fewest: every operand of a product read once, its result written once, all else fused into
products, and each mix of the layer weighting reading its inputs. Ours: this implementation. A part takes at least its
FLOPs over the peak rate or its bytes over the bandwidth, whichever is more.

Shapes as in `gptbert.model`; activations and cast weights have two bytes, the residual stream and gradients four.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from benchmarks.markdown import markdown
from benchmarks.traffic import LAMB_BYTES
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.model import GPTBert

LAMB_FLOPS = 27  # per parameter, with clipping and moving average


@dataclass(frozen=True)
class Limits:
    """The limits of a machine.

    Attributes:
        name: of the machine.
        flops: FLOPs per second of bf16 matrix products.
        bandwidth: bytes per second, memory reads plus writes.
    """

    name: str
    flops: float
    bandwidth: float


# NVIDIA's data sheet, SXM: dense bf16, HBM3
H100 = Limits("H100 SXM", flops=989.4e12, bandwidth=3.35e12)


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes of memory traffic."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> Self:
        return type(self)(times * self.flops, times * self.bytes)

    def seconds(self, limits: Limits) -> float:
        """The minimum time at a machine's limits."""
        return max(self.flops / limits.flops, self.bytes / limits.bandwidth)


@dataclass(frozen=True)
class Part:
    """A part of the step.

    Attributes:
        name: what it does.
        fewest: see the module.
        ours: of this implementation.
    """

    name: str
    fewest: Work
    ours: Work


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
        return [*self.model_parts(), self._weights(), self._masking()]

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
        return Part("projections", (layers := self.config.num_hidden_layers) * work, layers * work)

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
        return Part("attention", layers * fewest, layers * ours)

    def _between_products(self) -> Part:
        """LayerNorms, gates, dropout and residual connections: one pass each, forward and backward."""
        hidden, inner = self.tokens * self.config.hidden_size, self.tokens * self.config.intermediate_size
        forward, backward = 38 * hidden + 6 * inner, 50 * hidden + 16 * inner
        return Part("norms, gates, dropout", Work(), self.config.num_hidden_layers * Work(0, forward + backward))

    def _layer_weighting(self) -> Part:
        """x_n reads n + 1 representations; ∂/∂α_n reads them again, ∂/∂y_n the gradients of all later x."""
        mixes = 2 * self.config.num_hidden_layers
        passes = sum((n + 1) + 1 + (n + 1) + 1 + (mixes - n + 1) + 1 for n in range(1, mixes + 1))
        entries = 4 * self.tokens * self.config.hidden_size
        copies = 2 * 2 * mixes
        return Part("layer weighting", Work(0, passes * entries), Work(0, (passes + copies) * entries))

    def _embedding(self) -> Part:
        entries = self.tokens * self.config.hidden_size
        table = self.config.vocab_size * self.config.hidden_size
        fewest = Work(0, (2 + 1) * 4 * entries + 4 * table)
        return Part("embedding", fewest, fewest + Work(0, (2 + 3) * 4 * entries))

    def _head(self) -> Part:
        config, labeled = self.config, self.labeled_fraction * self.tokens
        dense = _product(labeled, config.hidden_size, config.hidden_size)
        logits = _product(labeled, config.hidden_size, config.vocab_size)
        kernel = Work(0, 2 * 2 * labeled * config.vocab_size)  # logits to their gradients, in place
        hidden, table = labeled * config.hidden_size, config.vocab_size * config.hidden_size
        without = Work(logits.flops, (2 + 2 + 2) * hidden + (2 + 2 + 4) * table)  # logits never leave the chip
        return Part("head and cross-entropy", dense + without, dense + logits + kernel)

    def _weights(self) -> Part:
        optimizer, casts = self.optimizer(), Work(0, (4 + 2) * parameter_count(self.config))
        return Part("optimizer and casts", optimizer, optimizer + casts)

    def _masking(self) -> Part:
        fewest = Work(0, 3 * 8 * self.tokens)  # tokens to inputs and labels
        return Part("masking", fewest, fewest + Work(0, 5 * 8 * self.tokens))  # documents, the attention mask, copies


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, the tied embedding once."""
    with torch.device("meta"):
        return sum(param.numel() for param in GPTBert(config).parameters())


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


def table(step: TrainingStep, limits: Limits) -> str:
    """Markdown: each part's FLOPs and bytes, fewest and ours, and their times at the machine's limits."""
    rows = [["part", "GFLOP", "fewest GB", "floor ms", "our GFLOP", "our GB", "predicted ms"]]
    parts = step.parts()
    for part in parts:
        figures = []
        for work in (part.fewest, part.ours):
            figures += [f"{work.flops / 1e9:.1f}", f"{work.bytes / 1e9:.3f}", f"{1e3 * work.seconds(limits):.3f}"]
        rows.append([part.name, *figures])
    sums = []
    for kind in ("fewest", "ours"):
        works = [getattr(part, kind) for part in parts]
        total = sum(works, Work())
        seconds = sum(work.seconds(limits) for work in works)
        sums += [f"{total.flops / 1e9:.1f}", f"{total.bytes / 1e9:.3f}", f"{1e3 * seconds:.3f}"]
    return "\n".join(markdown([*rows, ["all", *sums]]))


def run(config: RooflineConfig) -> None:
    """Print the table."""
    model_config = ModelConfig.from_json(config.config_file)
    step = TrainingStep(model_config, config.rows, config.seq_length, config.labeled_fraction)
    print(table(step, Limits("", 1e12 * config.tera_flops, 1e12 * config.bandwidth)))


if __name__ == "__main__":
    run_command(RooflineConfig, run)
