"""The registered operation: what it accepts, and which implementation runs."""

import importlib

import torch
from torch import Tensor

from kernels.span_mask import reference

TOKEN_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


@torch.library.custom_op("kernels::span_mask", mutates_args=())
def span_mask(
    tokens: Tensor,
    row_ids: Tensor,
    mask_counts: Tensor | None,
    mask_p: float,
    random_p: float,
    keep_p: float,
    mask_token_id: int,
    vocab_size: int,
    num_special_tokens: int,
    max_span_length: int,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See `kernels.span_mask`; here the seed's 64 bits are a signed number, as an operation's integers are."""
    if not tokens.numel():
        return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)
    implementation = reference.span_mask
    if backend == "triton":
        kernel = importlib.import_module("kernels.span_mask.kernel")  # not above, since Triton may be missing
        if kernel.supports(tokens.shape[1], max_span_length):
            implementation = kernel.launch
    inputs, labels = implementation(
        tokens,
        row_ids=row_ids,
        mask_counts=mask_counts,
        mask_p=mask_p,
        random_p=random_p,
        keep_p=keep_p,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        num_special_tokens=num_special_tokens,
        max_span_length=max_span_length,
        seed=seed,
    )
    return inputs.contiguous(), labels.contiguous()


@span_mask.register_fake
def _(tokens, *_):  # noqa: ANN002
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)
