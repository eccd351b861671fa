"""Attention in one Triton kernel forward and two backward, as registered operations; no [H, B, T, T] is stored."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import wanted
from kernels.backend import computes_as_gpu, triton_kernel
from kernels.first_order import refuse_tangents

TILE = 64  # queries and keys at a time; shorter rows have smaller tiles
HEAD_SIZES = (32, 64, 128)
LENGTHS = range(16, 2049)
POSITION_VECTORS = (16, 32, 64, 128)


class DistanceTables(NamedTuple):
    """Buckets by distance; the same for all layers. 2L distances: L is T rounded up to whole tiles.

    Attributes:
        buckets: [2L] int64, for "load" int32, the bucket of the distances 1 − L … L (beyond ±(T − 1): any).
        bucket_rows: [2L, P], 0-1: whether a distance, −L … L − 1, is in a bucket.
        variant: of the kernels, "gather" or "load": how they find the position scores of a tile.
    """

    buckets: Tensor
    bucket_rows: Tensor
    variant: str


def dtype_on(device: torch.device) -> torch.dtype:
    """The kernels' dtype: bf16, interpreted fp32."""
    return torch.bfloat16 if device.type != "cpu" or computes_as_gpu(device) else torch.float32


def is_fused(
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    head_size: int,
    num_position_vectors: int,
    backend: str | None = None,
) -> bool:
    """Whether attention of these sizes runs in the fused kernels: wanted, backend "triton", bf16 (interpreted: fp32).

    Args:
        device: of queries, keys and values.
        dtype: theirs.
        length: T.
        head_size: d.
        num_position_vectors: P.
        backend: see `kernels.backend.choose_backend`.
    """
    return (
        wanted.runs("attention_context", device, backend)
        and not torch.version.hip  # the kernels have a line of PTX
        and dtype == dtype_on(device)
        and length in LENGTHS
        and head_size in HEAD_SIZES
        and num_position_vectors in POSITION_VECTORS
    )


def tile_size(length: int) -> int:
    """Queries and keys in a tile of rows of this length: a power of two, at least 16."""
    return min(TILE, max(16, 1 << (length - 1).bit_length()))


def distance_tables(
    buckets: Tensor, num_position_vectors: int, dtype: torch.dtype, variant: str | None = None
) -> DistanceTables:
    """The tables of a row length.

    Args:
        buckets: [2T − 1] integers, the bucket of the distances 1 − T … T − 1.
        num_position_vectors: P.
        dtype: of the queries.
        variant: of the kernels; None for the one that this process wants, see `kernels.wanted`.
    """
    variant = variant or wanted.variant("attention_context")
    length = (len(buckets) + 1) // 2
    missing = -length % tile_size(length)
    # 1 − L … L, and −L … L − 1, in no bucket where a distance does not occur
    of_distance, shifted = F.pad(buckets, (missing, missing + 1)), F.pad(buckets, (missing + 1, missing), value=-1)
    columns = torch.arange(num_position_vectors, device=buckets.device)
    of_distance = of_distance.int() if variant == "load" else of_distance  # those kernels read it
    return DistanceTables(of_distance, (shifted[:, None] == columns).to(dtype), variant)


def fused_attention(
    query: Tensor,
    key: Tensor,
    position_query: Tensor,
    position_key: Tensor,
    value: Tensor,
    tables: DistanceTables,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    *,
    scale: float,
    num_heads: int,
) -> Tensor:
    """As `kernels.attention_context`, from what the projections leave, for sizes of which `is_fused` is true.

    The score of query i and key j is scale · (q_i·k_j + q_i·pk_β(i,j) + pq_β(i,j)·k_j) if both are of one document, and
    in causal rows j ≤ i. The backward computes scores again. The same input gives the same bits: no atomics.

    Args:
        query: [B, T, D], not scaled; rows may stand apart, as halves of a projection do.
        key: [B, T, D].
        position_query: [P, D], not scaled.
        position_key: [P, D].
        value: [B, T, D].
        tables: `distance_tables` of T, P and the dtype.
        document_ids: [B, T] int32, −1 for padding.
        is_causal: [B] bool.
        seed: [2] int32, of dropout, or None; masks are those of `kernels.dropout` for weights [H, B, T, T].
        dropout_prob: probability of a zero.
        scale: factor of the scores.
        num_heads: H.

    Returns:
        [H, B, T, d], a view of [B, T, D].
    """
    refuse_tangents(query, key, position_query, position_key, value)
    tensors = (query, key, position_query, position_key, value, *tables, document_ids, is_causal)
    seed = seed if dropout_prob else None
    output = forward(*tensors, seed, dropout_prob, scale, num_heads)[0]
    return output.unflatten(-1, (num_heads, -1)).movedim(-2, 0)


@torch.library.custom_op("kernels::distance_attention", mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    position_query: Tensor,
    position_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    bucket_rows: Tensor,
    variant: str,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, D]; for the backward log-sum-exp of the scores [H, B, T], and the table of position scores."""
    del bucket_rows
    position = torch.cat([position_query, position_key], dim=-1)
    inputs = (*map(_readable, (query, key, value)), position, buckets, variant)
    return triton_kernel("attention_context").forward(
        *inputs, document_ids, is_causal, seed, dropout_prob, scale, num_heads
    )


def empty_table(query: Tensor, position: Tensor, buckets: Tensor, variant: str, num_heads: int) -> Tensor:
    """A tensor like the third result of `kernel.forward`, whose arguments these are."""
    if variant == "gather":
        return position.new_empty(len(buckets), position.shape[1])
    return query.new_empty(2, num_heads, query.shape[0] * query.shape[1], len(position))


@forward.register_fake
def _(
    query,
    key,
    position_query,
    position_key,
    value,
    buckets,
    bucket_rows,
    variant,
    document_ids,
    is_causal,
    seed,
    dropout_prob,
    scale,
    num_heads,
):
    rows, length, width = query.shape
    lse = query.new_empty(num_heads, rows, length, dtype=torch.float32)
    position = position_query.new_empty(len(position_query), 2 * width)
    return query.new_empty(rows, length, width), lse, empty_table(query, position, buckets, variant, num_heads)


@torch.library.custom_op("kernels::distance_attention_backward", mutates_args=())
def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    position_query: Tensor,
    position_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    bucket_rows: Tensor,
    variant: str,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    table: Tensor,
    dropout_prob: float,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key [B, T, D], position_query, position_key [P, D] and value [B, T, D], in their dtypes."""
    tensors = tuple(map(_readable, (query, key, value)))
    gradients = tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors)
    of_positions = triton_kernel("attention_context").backward(
        contiguous(grad),
        *tensors,
        torch.cat([position_query, position_key], dim=-1),
        buckets,
        bucket_rows,
        variant,
        document_ids,
        is_causal,
        seed,
        output,
        lse,
        table,
        dropout_prob,
        scale,
        num_heads,
        gradients,
    )
    of_query, of_key, of_value = (gradient.contiguous() for gradient in gradients)
    return (
        of_query,
        of_key,
        *(sums.to(query.dtype, copy=True).contiguous() for sums in of_positions.chunk(2, dim=-1)),
        of_value,
    )


@backward.register_fake
def _(
    grad,
    query,
    key,
    position_query,
    position_key,
    value,
    buckets,
    bucket_rows,
    variant,
    document_ids,
    is_causal,
    seed,
    output,
    lse,
    table,
    dropout_prob,
    scale,
    num_heads,
):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, position_query, position_key, value))


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.variant, document_ids, is_causal, seed, ctx.dropout_prob, ctx.scale, ctx.num_heads = inputs
    context, lse, table = output
    ctx.mark_non_differentiable(lse, table)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, document_ids, is_causal, seed, context, lse, table)


def _gradients(ctx, grad, of_lse, of_table):
    del of_lse, of_table
    saved = ctx.saved_tensors
    gradients = backward(grad, *saved[:7], ctx.variant, *saved[7:], ctx.dropout_prob, ctx.scale, ctx.num_heads)
    return *gradients, *[None] * 9


forward.register_autograd(_gradients, setup_context=_keep_inputs)


def _readable(x: Tensor) -> Tensor:
    """X [B, T, D], or a copy if the kernels cannot read it: rows equally far apart, from an address of 16 bytes on."""
    is_regular = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if is_regular and x.stride(1) * x.element_size() % 16 == 0 and _is_aligned(x) else contiguous(x)


def contiguous(x: Tensor) -> Tensor:
    """The tensor, or a copy unless it is contiguous and its address a multiple of 16 bytes, as wide loads require."""
    x = x.contiguous()
    return x if _is_aligned(x) else x.clone()


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0
