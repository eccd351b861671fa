"""What a training run asks of the kernels, as far as it decides which of their code is compiled."""

import dataclasses
import json
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """The part of a run's settings that a check before it needs, so that it compiles nothing else.

    Attributes:
        dtype: of the logits, "bfloat16" or "float32".
        vocab_size: V of the head.
        row_lengths: tokens of the rows that are masked in training, one more than positions.
        validation_length: the same of validation, whose rows are not padded.
        mask_history: whether it is counted how often tokens were masked.
        lamb: whether LAMB is the optimizer; its state is fp32, it clips and averages.
        buckets: whether gradients may lie anywhere, as DDP's do.
    """

    dtype: str
    vocab_size: int
    row_lengths: tuple[int, ...]
    validation_length: int
    mask_history: bool
    lamb: bool
    buckets: bool

    @property
    def logits_type(self) -> torch.dtype:
        """`dtype` as PyTorch has it."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]

    @property
    def operations(self) -> tuple[str, ...]:
        """The folders of kernels/ whose kernels it launches."""
        return ("masked_cross_entropy", "span_mask", *(("lamb",) if self.lamb else ()))

    def to_json(self) -> str:
        """One line, for a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """What `to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        try:
            values = json.loads(text)
            return cls(**values | {"row_lengths": tuple(values["row_lengths"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no description of a run ({error})") from error
