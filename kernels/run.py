"""The settings of a training run that determine which kernel variants it compiles."""

import dataclasses
import json
from dataclasses import dataclass

import torch

from kernels.wanted import VARIANTS


@dataclass(frozen=True)
class Run:
    """The settings that the check before a run needs, to compile only that run's kernel variants.

    Attributes:
        dtype: of the logits, "bfloat16" or "float32".
        vocab_size: V.
        row_lengths: tokens per row in training, one more than positions.
        validation_length: the same for validation, whose rows are not padded.
        mask_history: whether `span_mask` gets counts of how often tokens were masked.
        lamb: whether LAMB is the optimizer, with fp32 state, clipping and averages.
        buckets: whether gradients may be unaligned, as views of DDP's buckets are.
        attention: heads, head size and number of position vectors of fused attention, or None without.
        attention_variant: of its kernels, see `kernels.wanted.VARIANTS`.
        gates: widths of the gated norms of attention and of the feed-forward, None for one that is not fused; or None.
        dropouts: whether the position vectors' masks of all layers are drawn at once.
        norms: D of fused embedding and head, or None without.
        mixes: D and the number of fused mixes, or None without.
    """

    dtype: str
    vocab_size: int
    row_lengths: tuple[int, ...]
    validation_length: int
    mask_history: bool
    lamb: bool
    buckets: bool
    attention: tuple[int, int, int] | None = None
    attention_variant: str = VARIANTS["attention_context"][0]
    gates: tuple[int | None, int | None] | None = None
    dropouts: bool = False
    norms: int | None = None
    mixes: tuple[int, int] | None = None

    @property
    def logits_type(self) -> torch.dtype:
        """`dtype` as a torch.dtype."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]

    @property
    def operations(self) -> tuple[str, ...]:
        """The folders of kernels/ whose Triton kernels the run launches."""
        some = {
            "lamb": self.lamb,
            "attention_context": self.attention,
            "gated_norm": self.gates,
            "normalize": self.norms,
            "dropout": self.dropouts,
            "depth_mix": self.mixes,
        }
        return ("masked_cross_entropy", "span_mask", *(name for name, is_used in some.items() if is_used))

    def to_json(self) -> str:
        """One line of JSON, for a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """The inverse of `to_json`.

        Raises:
            ValueError: the text does not describe a run.
        """
        try:
            values = json.loads(text)
            names = ("row_lengths", "attention", "gates", "mixes")
            lists = {name: tuple(values[name]) for name in names if values.get(name) is not None}
            return cls(**values | lists)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no description of a run ({error})") from error
