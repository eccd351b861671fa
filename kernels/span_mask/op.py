"""The registered operation: dispatch to an implementation."""

import torch
from torch import Tensor

from kernels.backend import triton_kernel
from kernels.padding import padded_rows
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
    """See `kernels.span_mask`; the seed's 64 bits are signed here, like all integers of an operation's schema."""
    if not tokens.numel():
        return _empty_output(tokens, backend), _empty_output(tokens, backend)
    implementation = reference.span_mask
    if backend == "triton":
        kernel = triton_kernel("span_mask")
        if kernel.supports(tokens.shape[1], max_span_length):
            implementation = kernel.launch
    results = implementation(
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
    inputs, labels = (_as_declared(result, tokens, backend) for result in results)
    return inputs, labels


@span_mask.register_fake
def _(tokens, *arguments):  # noqa: ANN002
    return _empty_output(tokens, arguments[-1]), _empty_output(tokens, arguments[-1])


def _empty_output(tokens: Tensor, backend: str) -> Tensor:
    return padded_rows(tokens) if backend == "triton" else tokens.new_empty(tokens.shape)


def _as_declared(result: Tensor, tokens: Tensor, backend: str) -> Tensor:
    """The result in the dtype and strides that `register_fake` declares, for every implementation."""
    declared = _empty_output(tokens, backend)
    is_declared = (result.dtype, result.stride()) == (declared.dtype, declared.stride())
    return result if is_declared else declared.copy_(result)
