"""Span masking for masked next-token prediction: selection of labels, and their replacements in the input."""

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.span_mask import op
from kernels.span_mask.reference import IGNORE_INDEX

__all__ = ["DEFAULT_MAX_SPAN_LENGTH", "IGNORE_INDEX", "most_selected", "span_mask"]

DEFAULT_MAX_SPAN_LENGTH = 3
_MAX_VOCAB_SIZE = 2**31  # the product with a 32-bit random word fits int64


def most_selected(length: int, mask_p: float) -> int:
    """Upper bound on the tokens that `span_mask` selects in a row of `length`; the last span may exceed k."""
    return min(length, int(length * mask_p) + DEFAULT_MAX_SPAN_LENGTH)


def span_mask(
    tokens: Tensor,
    *,
    mask_p: float,
    random_p: float,
    keep_p: float,
    mask_token_id: int,
    vocab_size: int,
    num_special_tokens: int,
    max_span_length: int = DEFAULT_MAX_SPAN_LENGTH,
    seed: int,
    row_ids: Tensor,
    mask_counts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask spans of a batch of rows (docs/model.md#masked-objective), as a pure function of (seed, row id, position).

    All backends use integer arithmetic and agree to the bit. No device sync, and no value of a number makes Triton
    recompile. `torch.compile` recompiles for each new probability (floats are constants to it), so where they change
    from step to step, as in the trainer, call this outside compiled code.

    Args:
        tokens: [B, T] int8, int16, int32 or int64; ids below `num_special_tokens` are never selected. Rows longer
            than 4,096 tokens, and spans above 16, are computed by PyTorch on every backend.
        mask_p: expected fraction of the selectable tokens that are selected, in [0, 1].
        random_p: fraction of the selected tokens that are replaced by a random non-special token.
        keep_p: fraction of the selected tokens that stay unchanged; the rest becomes `mask_token_id`.
        mask_token_id: id of `<mask>`.
        vocab_size: random tokens are drawn from num_special_tokens … vocab_size − 1; at most 2³¹.
        num_special_tokens: ids below this number are special.
        max_span_length: span lengths are uniform in 1 … max_span_length.
        seed: 64-bit key of the random numbers, 0 … 2⁶⁴ − 1.
        row_ids: [B] int64, unique per row under this seed.
        mask_counts: [B, T] non-negative integers of any dtype, how often each token was masked before; tokens masked
            more often are selected later. None disables this.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        `inputs` and `labels`, both [B, T] in the dtype of `tokens`, unshifted; labels are −100 where not selected. On
        Triton there may be padding between their rows: `reshape` works, `view` may not.

    Raises:
        ValueError: a probability is outside [0, 1], the seed has more than 64 bits, there are no tokens to draw from,
            ids do not fit the dtype of `tokens`, or shapes, dtypes or devices do not match.
    """
    if not (0 <= mask_p <= 1 and random_p >= 0 and keep_p >= 0 and random_p + keep_p <= 1):
        raise ValueError(f"mask_p {mask_p}, random_p {random_p}, keep_p {keep_p}: shares lie in [0, 1]")
    if vocab_size <= num_special_tokens:
        raise ValueError(f"vocab_size {vocab_size} leaves no token beside {num_special_tokens} special ones")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed}: expected 64 bits, 0 … 2⁶⁴ − 1")
    if max_span_length < 1:
        raise ValueError(f"max_span_length {max_span_length}: a span has at least one token")
    _check_tensors(tokens, row_ids, mask_counts)
    largest_id = min(torch.iinfo(tokens.dtype).max, _MAX_VOCAB_SIZE - 1)
    if max(vocab_size - 1, mask_token_id) > largest_id:
        raise ValueError(
            f"vocab_size {vocab_size}, mask_token_id {mask_token_id}: the largest id in {tokens.dtype} is {largest_id}"
        )
    return op.span_mask(
        tokens,
        row_ids,
        mask_counts,
        mask_p,
        random_p,
        keep_p,
        mask_token_id,
        vocab_size,
        num_special_tokens,
        max_span_length,
        (seed + 2**63) % 2**64 - 2**63,  # the same 64 bits, signed
        choose_backend(backend, tokens.device),
    )


def _check_tensors(tokens: Tensor, row_ids: Tensor, mask_counts: Tensor | None) -> None:
    if tokens.ndim != 2 or tokens.dtype not in op.TOKEN_TYPES:
        raise ValueError(f"tokens: {tokens.dtype} {list(tokens.shape)}; expected signed integers [B, T]")
    if row_ids.shape != tokens.shape[:1] or row_ids.dtype != torch.int64 or row_ids.device != tokens.device:
        expected = f"int64 [{len(tokens)}] on {tokens.device}"
        raise ValueError(f"row_ids: {row_ids.dtype} {list(row_ids.shape)} on {row_ids.device}; expected {expected}")
    if mask_counts is None:
        return
    is_integer = mask_counts.dtype != torch.bool and not mask_counts.dtype.is_floating_point
    if mask_counts.shape != tokens.shape or not is_integer or mask_counts.device != tokens.device:
        found = f"{mask_counts.dtype} {list(mask_counts.shape)} on {mask_counts.device}"
        raise ValueError(f"mask_counts: {found}; expected integers {list(tokens.shape)} on {tokens.device}")
