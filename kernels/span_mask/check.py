"""Span masking against its reference, bit for bit: its part of `python -m kernels.check`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernels.numerics import Comparison, compare_exactly
from kernels.padding import padded_length
from kernels.run import Run
from kernels.span_mask import reference, span_mask

_VOCAB, _MASK = 120, 4


@dataclass(frozen=True)
class _Case:
    """A batch; cases change the defaults one by one."""

    rows: int
    length: int
    dtype: torch.dtype = torch.int64
    counts_type: torch.dtype | None = None
    mask_p: float = 0.3
    random_p: float = 0.3
    keep_p: float = 0.3
    max_span_length: int = 3
    num_special_tokens: int = 16
    seed: int = 2**64 - 0x1234_5678_9ABC
    padded: bool = True

    @property
    def name(self) -> str:
        history = "" if self.counts_type is None else " with history"
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"B={self.rows} T={self.length} {dtype} p={self.mask_p} spans to {self.max_span_length}{history}"
        return name if self.padded else f"{name}, not padded"


_CASES = (
    _Case(3, 129),
    _Case(3, 65, padded=False),
    _Case(3, 66, torch.int32, torch.uint8, mask_p=0.15),
    _Case(2, 64, torch.int32, torch.uint8, mask_p=0.15, padded=False),
    _Case(1, 256, torch.int16, random_p=0.5, max_span_length=16),
    _Case(1, 129, counts_type=torch.int64, mask_p=0.8, random_p=0.0, keep_p=0.5, max_span_length=5, seed=1),
    _Case(1, 90, torch.int32, mask_p=1.0, random_p=1.0, keep_p=0.0, max_span_length=1),
    _Case(1, 1, torch.int8, mask_p=0.0, random_p=0.0, keep_p=0.0, num_special_tokens=0, seed=0),
    _Case(1, 4096, counts_type=torch.uint8, mask_p=0.15, max_span_length=4),
)


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Inputs and labels over lengths, dtypes, spans, probabilities and history.

    Args:
        device: where to run.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check only the row lengths of this run; None checks every variant.
    """
    for case in _CASES if run is None else _cases_of(run):
        yield from _compare(case, device, backend)


def _cases_of(run: Run) -> list[_Case]:
    """The trainer's padded rows, and validation's, which are not padded and have no history."""
    counts_type = torch.uint8 if run.mask_history else None
    cases = [_Case(3, length, counts_type=counts_type) for length in run.row_lengths]
    return [*cases, _Case(3, run.validation_length, padded=False)]


def _compare(case: _Case, device: torch.device, backend: str) -> Iterator[Comparison]:
    """A batch, a view of a larger tensor, whose last row, if there are several, has only special tokens."""
    generator = torch.Generator().manual_seed(case.length)
    wider = (case.rows, padded_length(case.length) + (0 if case.padded else 3))
    tokens = torch.randint(0, _VOCAB, wider, generator=generator)
    if case.rows > 1:
        tokens[-1] %= case.num_special_tokens
    counts = None
    if case.counts_type is not None:
        counts = torch.randint(3, 40, wider, generator=generator)  # beyond the largest weight's count
        counts = torch.where(tokens < case.num_special_tokens, 0, counts)  # special tokens are never masked
        counts = counts.to(device, case.counts_type)[:, : case.length]
    tokens = tokens.to(device, case.dtype)[:, : case.length]
    row_ids = torch.randint(0, 2**63 - 1, (case.rows,), generator=generator).to(device)
    settings: dict[str, Any] = {
        "mask_p": case.mask_p,
        "random_p": case.random_p,
        "keep_p": case.keep_p,
        "mask_token_id": _MASK,
        "vocab_size": _VOCAB,
        "num_special_tokens": case.num_special_tokens,
        "max_span_length": case.max_span_length,
        "seed": case.seed,
        "row_ids": row_ids,
        "mask_counts": counts,
    }
    actual = span_mask(tokens, **settings, backend=backend)
    expected = reference.span_mask(tokens, **settings)
    for name, *tensors in zip(("inputs", "labels"), actual, expected, strict=True):
        yield compare_exactly(f"{case.name}: {name}", *tensors)
