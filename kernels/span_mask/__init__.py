"""Span masking for masked next-token prediction: which tokens become labels, and what the model sees in their place."""

from torch import Tensor

from kernels.backend import choose_backend
from kernels.span_mask import reference

DEFAULT_MAX_SPAN_LENGTH = 3


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
    """Mask spans of a batch of rows (spec.md §3), as a pure function of (seed, row id, position).

    Args:
        tokens: [B, T] signed integers; ids below `num_special_tokens` are never selected.
        mask_p: expected share of the selectable tokens that are selected, in [0, 1].
        random_p: share of the selected tokens that are replaced by a random non-special token.
        keep_p: share of the selected tokens that stay as they are; the rest becomes `mask_token_id`.
        mask_token_id: id of `<mask>`.
        vocab_size: random tokens are drawn from num_special_tokens … vocab_size − 1.
        num_special_tokens: ids below this number are special.
        max_span_length: span lengths are uniform in 1 … max_span_length.
        seed: 64-bit key of the random numbers.
        row_ids: [B] int64, a number per row that no other row under this seed shares.
        mask_counts: [B, T] integers, how often each token was masked before; tokens masked more often are selected
            later. None switches this off.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        `inputs` and `labels`, both [B, T] of `tokens`' type and unshifted; labels are −100 where nothing was selected.

    Raises:
        ValueError: a share is outside [0, 1], or no token is left to draw from.
    """
    choose_backend(backend, tokens.device)
    if not 0 <= mask_p <= 1 or random_p < 0 or keep_p < 0 or random_p + keep_p > 1:
        raise ValueError(f"mask_p {mask_p}, random_p {random_p}, keep_p {keep_p}: shares lie in [0, 1]")
    if vocab_size <= num_special_tokens:
        raise ValueError(f"vocab_size {vocab_size} leaves no token beside {num_special_tokens} special ones")
    return reference.span_mask(
        tokens,
        mask_p=mask_p,
        random_p=random_p,
        keep_p=keep_p,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        num_special_tokens=num_special_tokens,
        max_span_length=max_span_length,
        seed=seed,
        row_ids=row_ids,
        mask_counts=mask_counts,
    )
