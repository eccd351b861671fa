"""Copies of the blocks' weights in the dtype of the products, written by each update instead of at each use."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptbert.model.attention import AttentionWeights
from gptbert.model.block import Block, BlockWeights
from gptbert.model.feed_forward import FeedForwardWeights
from gptbert.model.gptbert import GPTBert
from kernels import gated_norm, torch_private
from kernels.linear import Packed


class PackedWeights:
    """The weights of a model's blocks, packed.

    Attributes:
        blocks: of each block, for `GPTBert.forward`.
        copies: each parameter's copy, a view of a packed matrix or vector; for `gptbert.optim.update_weights`.

    Args:
        blocks: the model's, not sharded.
        dtype: of the products.
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        self.blocks: list[BlockWeights] = [block.pack(dtype) for block in blocks]
        self.copies: dict[Tensor, Tensor] = {}
        for packed in self._all():
            for copy, parameter in zip(packed.split(), packed.parts, strict=True):
                if copy.data_ptr() != parameter.data_ptr():  # of that dtype and alone, a parameter is its own copy
                    self.copies[parameter] = copy
        self.note_update()

    def add_gradients_directly(self) -> None:
        """Let the backward add to the parameters' gradients, which exist and stay, in its products."""
        self.blocks = [
            BlockWeights(
                AttentionWeights(*(packed.with_gradient() for packed in block.attention)),
                FeedForwardWeights(*(packed.with_gradient() for packed in block.feed_forward)),
            )
            for block in self.blocks
        ]

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
        return (packed for block in self.blocks for sub_layer in block for packed in sub_layer)

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
    return PackedWeights(model.blocks, dtype) if is_used else None
