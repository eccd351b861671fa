"""GPT-BERT (Charpentier & Samuel 2024, arXiv 2410.24159); docs/model.md has the formulas.

Letters of shapes: B rows, T positions, D hidden, H heads, d = D/H, I intermediate, V vocabulary, S bucket size,
P = 2S−1 distinct position vectors, N labeled positions.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gptbert.config import ModelConfig
from gptbert.model.attention import Visibility
from gptbert.model.batch import Batch
from gptbert.model.block import BLOCK_SEEDS, Block, BlockWeights
from gptbert.model.dropout import Dropout, random_seeds
from gptbert.model.embedding import Embedding, position_bucket, position_rows
from gptbert.model.key_value_cache import KeyValueCache
from gptbert.model.layer_weighting import Representations
from gptbert.model.norm import InputNorm, layer_norm
from gptbert.model.objective import Objective
from kernels import IGNORE_INDEX, MaskedCrossEntropy, masked_cross_entropy
from kernels.attention_context.fused import distance_tables
from kernels.attention_context.fused import is_fused as is_attention_fused
from kernels.depth_mix import FusedMixes
from kernels.depth_mix import is_fused as are_mixes_fused
from kernels.dropout import dropouts
from kernels.dropout import is_fused as are_dropouts_fused
from kernels.linear import Packed
from kernels.normalize import activate
from kernels.normalize import is_fused as is_norm_fused
from kernels.padding import rounded_rows


class DropoutSeeds(NamedTuple):
    """Seeds of one forward's masks: [2] of the embedding, [BLOCK_SEEDS, 2] of each block, [2] of the head; or None.

    `relative` are the first of all blocks, [L, 2].
    """

    embedding: Tensor | None
    relative: Tensor | None
    blocks: Sequence[Tensor | None]
    head: Tensor | None

    @classmethod
    def split(cls, seeds: Tensor | None, num_layers: int) -> "DropoutSeeds":
        """The parts of `GPTBert.dropout_seeds`."""
        if seeds is None:
            return cls(None, None, [None] * num_layers, None)
        return cls(seeds[0], seeds[1:-1:BLOCK_SEEDS], seeds[1:-1].split(BLOCK_SEEDS), seeds[-1])


class ModelWeights(NamedTuple):
    """Parameters with copies in the products' dtype.

    Attributes:
        blocks: of each block, from `Block.pack`.
        words: the embedding [V, D], which is also the output matrix.
    """

    blocks: Sequence[BlockWeights]
    words: Packed


class GPTBert(nn.Module):
    """The whole model: embedding, blocks, and a head tied to the embedding."""

    bucket_of_distance: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks: Any = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.head = Head(config)
        distances = torch.arange(-config.max_position_embeddings + 1, config.max_position_embeddings)
        buckets = config.position_bucket_size - 1 + position_bucket(distances, config)
        self.register_buffer("bucket_of_distance", buckets, persistent=False)  # [2M − 1], values 0 … P − 1
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        std = math.sqrt(2 / (5 * self.config.hidden_size))
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                param.zero_()
            elif param.ndim == 2:
                nn.init.trunc_normal_(param, std=std, a=-2 * std, b=2 * std)
        for layer, block in enumerate(self.blocks):
            for linear in (block.feed_forward.up, block.feed_forward.down):
                linear.weight.mul_(math.sqrt(1 / (2 * (1 + layer))))

    def encode(self, input_ids: Tensor, document_ids: Tensor, causal: bool | Tensor) -> Tensor:
        """Contextual representations.

        Args:
            input_ids: [B, T] integers.
            document_ids: [B, T] integers; positions attend only to their own document, and −1 (padding) to nothing.
            causal: attend only to positions up to one's own; or [B] bool, per row.

        Returns:
            [B, T, D].
        """
        seeds = DropoutSeeds.split(self.dropout_seeds(input_ids.device), len(self.blocks))
        return self._encode(input_ids, document_ids, causal, seeds)[0]

    @torch.no_grad()
    def encode_next(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Representations of a text's next positions, as `encode` gives them for the whole text: causal, one document.

        Args:
            input_ids: [B, T], the tokens after those in the cache: any T in the first call, 1 in later ones.
            cache: empty, or from the previous call; takes the new positions.

        Returns:
            [B, T, D], without dropout.

        Raises:
            ValueError: the cache is too small, or has positions already and T is not 1.
        """
        length, device = input_ids.shape[1], input_ids.device
        if cache.length and length > 1:
            raise ValueError(f"{length} positions behind {cache.length}: after the first call, one at a time")
        cache.length += length
        hidden_states, relative = self.embedding(input_ids, None)
        if length > 1:
            mask = attention_mask(torch.zeros_like(input_ids), causal=True)
            visibility = Visibility(mask, self.position_buckets(length), cache=cache)
        else:
            distance = torch.arange(cache.length - 1, -1, -1, device=device)  # [K], i − j
            visibility = Visibility(buckets=self._buckets(distance), cache=cache)
        nothing = [None] * len(self.blocks)
        return self._through_blocks(hidden_states, relative, visibility, nothing, nothing)

    def _encode(
        self,
        input_ids: Tensor,
        document_ids: Tensor,
        causal: bool | Tensor,
        seeds: DropoutSeeds,
        weights: ModelWeights | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The blocks' result, [B, T, D], and its LayerNorm in the products' dtype where the mixes have made it."""
        words = None if weights is None else weights.words
        hidden_states, relative = self.embedding(input_ids, seeds.embedding, words)
        dtype, device = hidden_states.dtype, hidden_states.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        visibility = self._visibility(document_ids, causal, len(relative), dtype)
        packed: Sequence[BlockWeights | None] = [None] * len(self.blocks) if weights is None else weights.blocks
        alphas = [mix.alpha for block in self.blocks for mix in (block.attention_mix, block.feed_forward_mix)]
        is_sharded = isinstance(alphas[0], DTensor)  # a group of mixes needs all of its weights at once
        if are_mixes_fused(device, dtype, self.config.hidden_size, num_mixes(self.config)) and not is_sharded:
            dropout_prob = self.config.hidden_dropout_prob if self.training else 0.0
            mixes = FusedMixes(alphas, dtype, dropout_prob, self.config.layer_norm_eps)
            hidden_states, normalized = mixes.start(hidden_states)
            relative_of_layers, is_dropped = self._relative_of_layers(relative, seeds, dtype)
            layers = zip(self.blocks, relative_of_layers, seeds.blocks, packed, strict=True)
            for block, layer_relative, block_seeds, block_weights in layers:
                inputs = (layer_relative, visibility, block_seeds, block_weights)
                hidden_states, normalized = block.forward_fused(
                    hidden_states, normalized, mixes, *inputs, is_dropped=is_dropped
                )
            return hidden_states, normalized
        return self._through_blocks(hidden_states, relative, visibility, seeds.blocks, packed), None

    def _through_blocks(
        self,
        hidden_states: Tensor,
        relative: Tensor,
        visibility: Visibility,
        seeds: Sequence[Tensor | None],
        weights: Sequence[BlockWeights | None],
    ) -> Tensor:
        """x_0 [B, T, D] to x_2L, operation by operation."""
        representations = Representations(num_mixes(self.config) + 1)
        hidden_states = representations.start(hidden_states)
        for block, block_seeds, block_weights in zip(self.blocks, seeds, weights, strict=True):
            hidden_states = block(hidden_states, representations, relative, visibility, block_seeds, block_weights)
        return hidden_states

    def _relative_of_layers(
        self, relative: Tensor, seeds: DropoutSeeds, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], bool]:
        """The position vectors [P, D] of each layer, and whether their elements are dropped: of all layers at once."""
        dropout_prob = self.config.hidden_dropout_prob
        if seeds.relative is None or not dropout_prob or not are_dropouts_fused(relative.device):
            return [relative] * len(self.blocks), False
        return dropouts(relative, seeds.relative, dropout_prob, dtype).unbind(), True

    def _visibility(
        self, document_ids: Tensor, causal: bool | Tensor, num_position_vectors: int, dtype: torch.dtype
    ) -> Visibility:
        """What attention needs: mask and buckets of all pairs, or for the fused kernels ids and tables by distance."""
        length, device = document_ids.shape[1], document_ids.device
        if not self.has_fused_attention(device, dtype, length):
            return Visibility(attention_mask(document_ids, causal), self.position_buckets(length))
        if not isinstance(causal, Tensor):
            causal = document_ids.new_full((len(document_ids),), causal, dtype=torch.bool)  # [B]
        buckets = self._buckets(torch.arange(1 - length, length, device=device))
        tables = distance_tables(buckets, num_position_vectors, dtype)
        # a single row may have any stride, for each of which compiled blocks would be compiled anew
        ids = document_ids.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
        return Visibility(document_ids=ids, is_causal=causal, tables=tables)

    def has_fused_attention(self, device: torch.device, dtype: torch.dtype, length: int) -> bool:
        """Whether attention over rows of this length runs in the fused kernels, with packed weights."""
        _, head_size, num_position_vectors = attention_shape(self.config, device)
        return is_attention_fused(device, dtype, length, head_size, num_position_vectors)

    def pack(self, dtype: torch.dtype) -> ModelWeights:
        """The parameters of the large products, with new copies in the products' dtype."""
        blocks = [block.pack(dtype) for block in self.blocks]
        return ModelWeights(blocks, Packed.of([self.embedding.word_embedding.weight], dtype))

    def dropout_seeds(self, device: torch.device) -> Tensor | None:
        """New seeds of one forward's dropout masks, [masks, 2] int32; None without dropout."""
        probabilities = (self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob)
        if not self.training or not any(probabilities):
            return None
        return random_seeds(BLOCK_SEEDS * len(self.blocks) + 2, device)

    def forward(
        self,
        batch: Batch,
        scales: Tensor | None = None,
        z_loss_weight: float = 0.0,
        dropout_seeds: Tensor | None = None,
        weights: ModelWeights | None = None,
    ) -> MaskedCrossEntropy:
        """Cross-entropy at labeled positions, summed for each objective.

        Args:
            batch: rows of both objectives.
            scales: [objectives] fp32, each objective's factor in `total`; None: 1.
            z_loss_weight: weight of logsumexp² in `total`.
            dropout_seeds: from the method of that name; None: new ones.
            weights: from `pack`, in the dtype of the products; None: packed where they are needed. If the embedding's
                have memory for the gradient, a backward is from `total` itself: see `masked_cross_entropy`.

        Returns:
            Sums over the labeled positions, see `kernels.MaskedCrossEntropy`, [objectives] in the order of `Objective`.
        """
        if dropout_seeds is None:
            dropout_seeds = self.dropout_seeds(batch.labels.device)
        seeds = DropoutSeeds.split(dropout_seeds, len(self.blocks))
        hidden_states, normalized = self._encode(batch.input_ids, batch.document_ids, batch.is_causal, seeds, weights)
        # [B·T, D] to [N, D]: the head sees labeled positions only
        states, labels, objectives = select_labeled(hidden_states if normalized is None else normalized, batch)
        return masked_cross_entropy(
            self.head(states, seeds.head, is_normalized=normalized is not None),
            self.embedding.word_embedding.weight if weights is None else weights.words,
            labels,
            self.head.bias,
            segments=objectives,
            scales=torch.ones(len(Objective), device=labels.device) if scales is None else scales,
            ignore_index=IGNORE_INDEX,
            z_loss_weight=z_loss_weight,
        )

    def sums(
        self, input_ids: Tensor, document_ids: Tensor, labels: Tensor, causal: bool, z_loss_weight: float = 0.0
    ) -> MaskedCrossEntropy:
        """As `forward`, of rows of one objective: scalars. For other programs; training calls `forward`.

        Args:
            input_ids: see `Batch`.
            document_ids: see `Batch`.
            labels: see `Batch`.
            causal: whether the objective is causal.
            z_loss_weight: weight of logsumexp² in `total`.
        """
        batch = Batch(input_ids, document_ids, labels, num_masked=0 if causal else len(labels))
        total, *sums = self(batch, None, z_loss_weight)
        return MaskedCrossEntropy(total, *(each[int(causal)] for each in sums))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Scores [..., V] of the next token for representations [..., D] from `encode`."""
        return F.linear(self.head(hidden_states), self.embedding.word_embedding.weight, self.head.bias)

    def position_buckets(self, length: int) -> Tensor:
        """[T, T] int64: β(i, j) of query i and key j."""
        position = torch.arange(length, device=self.bucket_of_distance.device)
        return self._buckets(position[:, None] - position[None, :])

    def _buckets(self, distance: Tensor) -> Tensor:
        """Bucket of distances of any size and shape, int64."""
        farthest = self.config.max_position_embeddings - 1
        return self.bucket_of_distance[distance.clamp(-farthest, farthest) + farthest]


class Head(nn.Module):
    """The layers between the encoder and the tied output matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = InputNorm(config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_norm = layer_norm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, seed: Tensor | None = None, *, is_normalized: bool = False) -> Tensor:
        """[N, D] to [N, D]; `is_normalized`: LayerNorm has been applied."""
        normalized = hidden_states if is_normalized else self.input_norm(hidden_states)
        dense = self.dense(normalized)
        if is_norm_fused(dense.device, dense.shape[-1]):
            return activate(dense, seed if self.training else None, self.dropout.probability, self.output_norm.eps)
        return self.dropout(self.output_norm(F.gelu(dense)), seed)


def attention_shape(config: ModelConfig, device: torch.device) -> tuple[int, int, int]:
    """The number of heads, the size of each, and the number of position vectors with their padding."""
    head_size = config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, head_size, position_rows(2 * config.position_bucket_size - 1, device)


def num_mixes(config: ModelConfig) -> int:
    """The number of weighted sums of earlier representations: one after each sub-layer."""
    return 2 * config.num_hidden_layers


def attention_mask(document_ids: Tensor, causal: bool | Tensor) -> Tensor:
    """[B, T] document ids, and whether rows are causal (all, or [B] bool), to [B, T, T] bool: query i may see key j."""
    mask = (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids >= 0)[:, None, :]
    if isinstance(causal, Tensor):
        return torch.where(causal[:, None, None], mask.tril(), mask)
    return mask.tril() if causal else mask


def select_labeled(hidden_states: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The labeled positions of a batch.

    Args:
        hidden_states: [B, T, D].
        batch: its labels, their upper bound (without one they are counted, and the number rounded up), and objectives.

    Returns:
        [N, D], and labels and objectives [N]. N is at least the number of labels; positions without a label fill it up.
    """
    objectives = batch.objectives[:, None].expand_as(batch.labels)
    positions = (hidden_states.flatten(0, 1), batch.labels.flatten(), objectives.flatten())  # [B·T, D], [B·T], [B·T]
    hidden_states, labels, objectives = positions
    labeled = labels != IGNORE_INDEX
    count = rounded_rows(int(labeled.sum())) if batch.most_labels is None else batch.most_labels
    if count >= len(labels):
        return positions
    rows = labeled.nonzero_static(size=count, fill_value=-1).squeeze(-1)  # [N]
    is_labeled = rows >= 0
    # fill up with different positions: a GPU adds the gradients of equal ones one after the other
    rows = torch.where(is_labeled, rows, torch.arange(count, device=rows.device))
    return hidden_states[rows], torch.where(is_labeled, labels[rows], IGNORE_INDEX), objectives[rows]
