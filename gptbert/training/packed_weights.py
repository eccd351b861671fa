"""Copies of weights in the dtype of the products, written by each update instead of at each use."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptbert.model.attention import AttentionWeights
from gptbert.model.block import BlockWeights
from gptbert.model.feed_forward import FeedForwardWeights
from gptbert.model.gptbert import GPTBert, ModelWeights
from kernels import gated_norm, torch_private
from kernels.linear import Packed


class PackedWeights:
    """The weights of a model, packed.

    Attributes:
        weights: for `GPTBert.forward`.
        copies: each parameter's copy, a view of a packed matrix or vector; for `gptbert.optim.update_weights`.

    Args:
        model: not sharded.
        dtype: of the products.
    """

    def __init__(self, model: GPTBert, dtype: torch.dtype) -> None:
        self.weights: ModelWeights = model.pack(dtype)
        self._model = model
        self._dtype = dtype
        self.copies: dict[Tensor, Tensor] = {}
        for packed in self._all():
            for copy, parameter in zip(packed.split(), packed.parts, strict=True):
                if copy.data_ptr() != parameter.data_ptr():  # of that dtype and alone, a parameter is its own copy
                    self.copies[parameter] = copy
        self.note_update()

    def made_by_products(self, lengths: Iterable[int], device: torch.device) -> set[Tensor]:
        """The parameters whose whole gradient is written by a matrix product in each backward, and may be overwritten.

        Args:
            lengths: of all rows.
            device: where the model runs.
        """
        found = [self.weights.words]  # a product of the loss, to which the embedding's rows are added later
        is_fused = all(self._model.has_fused_attention(device, self._dtype, length) for length in lengths)
        for attention, feed_forward in self.weights.blocks:  # operation by operation, attention uses others' weights
            found += [*feed_forward, *([attention.projection, attention.output] if is_fused else [])]
        return {part for packed in found for part in packed.parts}

    def add_gradients_directly(self, overwritten: Collection[Tensor] = ()) -> None:
        """Let the backward add to the parameters' gradients, which exist and stay, in its products.

        Args:
            overwritten: those of `made_by_products` whose gradients the products overwrite.
        """

        def with_gradients(each: Iterable[Packed]) -> Iterator[Packed]:
            return (packed.with_gradient(overwrites=packed.parts[0] in overwritten) for packed in each)

        blocks = [
            BlockWeights(
                AttentionWeights(*with_gradients(block.attention)),
                FeedForwardWeights(*with_gradients(block.feed_forward)),
            )
            for block in self.weights.blocks
        ]
        self.weights = ModelWeights(blocks, *with_gradients([self.weights.words]))

    def note_update(self) -> None:
        """The copies are those of the weights as they are now: the update of the weights has written both."""
        self._versions = self._current_versions()

    @torch.no_grad()
    def refresh_if_changed(self) -> None:
        """Copy the weights if anything but an update has changed them, such as a checkpoint that was loaded."""
        if self._versions != self._current_versions():
            torch_private.copy_each(list(self.copies.values()), list(self.copies))
            self.note_update()

    def _all(self) -> Iterator[Packed]:
        yield self.weights.words
        yield from (packed for block in self.weights.blocks for sub_layer in block for packed in sub_layer)

    def _current_versions(self) -> list[int]:
        return [parameter._version for parameter in self.copies]  # noqa: SLF001 - autograd's count of changes


def packed_weights(model: GPTBert, device: torch.device, dtype: torch.dtype) -> PackedWeights | None:
    """The packed weights of a model that has use for them: its gated norms are fused, and it is not sharded.

    Args:
        model: a `GPTBert`.
        device: where it runs.
        dtype: of its products.
    """
    down = model.blocks[0].feed_forward.down
    is_whole = not isinstance(down.weight, DTensor)
    is_used = is_whole and gated_norm.is_fused(device, dtype, down.in_features)
    return PackedWeights(model, dtype) if is_used else None
