"""Launches of kernels with matrix products, as their launchers make them for small inputs, and blocks to look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention_context.check import buckets_by_distance
from kernels.attention_context.fused import DistanceTables, distance_tables
from kernels.configuration import Configuration
from kernels.machine_code.launch import Launch, recorded

Block = tuple[int, int, int]
_DROPOUT = 0.1


@dataclass(frozen=True)
class Example:
    """A launch, and thread blocks of it: the first has whole tiles only, all of which are computed."""

    launch: Launch
    blocks: tuple[Block, ...]


def example(configuration: Configuration) -> Example | None:
    """A launch of exactly this configuration, or None if there is none for its operation.

    Raises:
        ValueError: the launcher did not launch this configuration.
    """
    module, name = configuration.kernel.fn.__module__, configuration.kernel.fn.__name__
    make = _OPERATIONS.get(".".join(module.split(".")[:2]))
    if make is None:
        return None
    with recorded() as launches:
        blocks = make(configuration)
    for launch in launches:
        if launch.kernel == name:
            if differences := launch.differences(configuration):
                raise ValueError(f"launched with another {', '.join(differences)}")
            return Example(launch, tuple(dict.fromkeys(blocks(launch.grid))))
    raise ValueError(f"{name} was not launched")


@dataclass(frozen=True)
class AttentionInputs:
    """Rows for `kernels.attention_context`.

    All but two are of one document and not causal. Of these two, one is causal and has many documents, the other has
    two documents and padding.

    Attributes:
        projection: [B, T, 4D] bf16, queries, keys, values and gates.
        position: [P, 2D] bf16.
        buckets: [2T − 1], of the distances.
        tables: of the kernels' variant.
        document_ids: [B, T] int32.
        is_causal: [B] bool.
        seed: [2] int32, or None.
        dropout_prob: 0 without a seed.
        scale: of the scores.
        num_heads: H.
    """

    projection: Tensor
    position: Tensor
    buckets: Tensor
    tables: DistanceTables
    document_ids: Tensor
    is_causal: Tensor
    seed: Tensor | None
    dropout_prob: float
    scale: float
    num_heads: int

    @classmethod
    def of(cls, configuration: Configuration, num_rows: int) -> "AttentionInputs":
        """Inputs of a configuration's shape."""
        sizes = configuration.constants
        length, num_heads, head_size, count = sizes["T"], sizes["H"], sizes["d"], sizes["P"]
        width, generator = num_heads * head_size, torch.Generator().manual_seed(7)
        buckets = buckets_by_distance(length, count)
        variant = "gather" if sizes["GATHERS"] else "load"
        position = torch.randn(count, 2 * width, generator=generator).bfloat16()
        positions, is_last = torch.arange(length), torch.arange(num_rows)[:, None] == num_rows - 1
        last = torch.where(positions < length - 3, positions // (length - 5), -1)
        documents = torch.where(is_last, last, 0 * positions)
        documents[num_rows - 2] = positions // 7
        is_causal = torch.arange(num_rows) == num_rows - 2
        seed = torch.tensor([77, -5], dtype=torch.int32) if sizes["HAS_DROPOUT"] else None
        return cls(
            torch.randn(num_rows, length, 4 * width, generator=generator).bfloat16(),
            position,
            buckets,
            distance_tables(buckets, count, torch.bfloat16, variant),
            documents.int().contiguous(),
            is_causal,
            seed,
            0.0 if seed is None else _DROPOUT,
            (3 * head_size) ** -0.5,
            num_heads,
        )

    def launch_forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, T, D], log-sum-exp [H, B, T] and the table of position scores."""
        from kernels.attention_context import kernel  # noqa: PLC0415 - needs Triton

        query, key, value, _ = self.projection.chunk(4, -1)
        rows: tuple[Any, ...] = (self.document_ids, self.is_causal, self.seed)
        settings: tuple[Any, ...] = (self.dropout_prob, self.scale, self.num_heads)
        tables = (self.tables.buckets, self.tables.variant)
        return kernel.forward(query, key, value, self.position, *tables, *rows, *settings)

    def launch_backward(self, grad: Tensor, output: Tensor, lse: Tensor, table: Tensor, of_projection: Tensor) -> None:
        """Of what `launch_forward` returns; `of_projection` [B, T, 4D] gets gradients in its first three quarters."""
        from kernels.attention_context import kernel  # noqa: PLC0415 - needs Triton

        query, key, value, _ = self.projection.chunk(4, -1)
        of_query, of_key, of_value, _ = of_projection.chunk(4, -1)
        kernel.backward(
            grad, query, key, value, self.position, *self.tables, self.document_ids, self.is_causal, self.seed,
            output, lse, table, self.dropout_prob, self.scale, self.num_heads, (of_query, of_key, of_value),
        )  # fmt: skip


def _attention_context(configuration: Configuration) -> Callable[[Block], list[Block]]:
    from kernels.attention_context import kernel  # noqa: PLC0415 - needs Triton

    sizes = configuration.constants
    tiles, num_heads = sizes["L"] // sizes["N"], sizes["H"]
    num_rows = max(
        4, kernel.PROGRAMS // num_heads // tiles + 1
    )  # more tiles of rows than programs of a backward kernel
    inputs = AttentionInputs.of(configuration, num_rows)
    output, lse, table = inputs.launch_forward()
    inputs.launch_backward(output.zero_(), output, lse.zero_(), table, torch.zeros_like(inputs.projection))
    if configuration.kernel.fn.__name__ == "forward_kernel":
        return lambda grid: [
            (0, 0, 0),
            (grid[0] - 1, num_rows - 1, num_heads - 1),
            (0, num_rows - 2, 0),
            (grid[0] - 1, num_rows - 2, 0),
        ]
    items = num_rows * tiles

    def blocks(grid: Block) -> list[Block]:
        groups = grid[0]
        with_one_tile = min(items - groups, groups - 1)
        every = [with_one_tile, 0, (items - 1) % groups, (items - 2 * tiles) % groups]
        return [(group, index % num_heads, 0) for index, group in enumerate(every)]

    return blocks


def _depth_mix(configuration: Configuration) -> Callable[[Block], list[Block]]:
    """The gradients of weights: a last block of elements that is not whole, in programs that have two blocks."""
    from kernels.depth_mix import gram_kernel, kernel  # noqa: PLC0415 - needs Triton
    from kernels.depth_mix.fused import GROUP  # noqa: PLC0415

    rows, size = 177, 400
    depth = (configuration.constants["REPRESENTATIONS"] - GROUP - 1) // GROUP * GROUP + 1
    num_mixes = depth + GROUP - 1
    alpha = torch.zeros((num_mixes + 1) * (num_mixes + 2) // 2)
    values = torch.ones(num_mixes + 1 + GROUP, rows * size, dtype=torch.bfloat16)
    x, normalized = torch.zeros(rows, size), torch.zeros(rows, size, dtype=torch.bfloat16)
    kernel.backward(
        x, normalized, normalized, torch.zeros(rows), alpha, None, values, torch.zeros(GROUP + 1, rows * size), x,
        normalized, None, torch.zeros_like(alpha), depth, num_mixes, 0.0,
    )  # fmt: skip
    return lambda grid: [(0, 0, 0), (rows * size // gram_kernel.GRAM_BLOCK % grid[0], 0, 0), (grid[0] - 1, 0, 0)]


_OPERATIONS = {"kernels.attention_context": _attention_context, "kernels.depth_mix": _depth_mix}
