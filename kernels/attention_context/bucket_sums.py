"""Sums of score gradients by bucket: the backward of gathering position scores.

A scatter-add is scalar code on a CPU, and has no fixed order on a GPU. Instead rows are skewed so that a column is a
distance i − j: in a matrix with R columns, reinterpreted with R + 1, row r has moved r places to the left. Then a
product with the 0-1 matrix "distance is in bucket" sums each bucket.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# elements per chunk of skewed rows; fewer on a CPU, to fit the cache
_CHUNK, _CHUNK_ON_CPU = 2**26, 2**21
_ALIGNMENT = 32  # of a row, in elements


@torch.library.custom_op("kernels::bucket_sums", mutates_args=())
def bucket_sums(grad: Tensor, buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    """Sum gradients of scores by bucket, per query and per key.

    Args:
        grad: [B, H, T, T], of query i and key j.
        buckets: [T, T] int64, β(i, j), a function of i − j.
        num_buckets: P.

    Returns:
        [B, H, T of i, P], Σ_j grad[i, j]·[β(i, j) = p], and [B, H, T of j, P], Σ_i grad[i, j]·[β(i, j) = p].
    """
    length = grad.shape[-1]
    matrices = grad.reshape(-1, length, length)
    width = -(-(2 * length + 1) // _ALIGNMENT) * _ALIGNMENT  # R + 1
    # 1. 0-1 matrices [R + 1, P], distance × bucket.
    of_distance = torch.cat([buckets[0, 1:].flip(0), buckets[:, 0]])  # i − j = −(T − 1) … T − 1
    is_in_bucket = F.one_hot(of_distance, num_buckets).to(grad.dtype)  # [2T − 1, P]
    # 2. Column c of row r is entry r + c − T: over c = 1 … 2T − 1, distances descend for queries and ascend for keys.
    padding = (0, 0, 1, width - 2 * length)
    for_queries, for_keys = F.pad(is_in_bucket.flip(0), padding), F.pad(is_in_bucket, padding)
    by_query, by_key = (grad.new_empty(len(matrices) * length, num_buckets) for _ in range(2))
    # 3. Scratch [chunk, T · (R + 1)] of zeros, and its view as rows of R columns, whose entries T … 2T − 1 are written.
    chunk = max(1, (_CHUNK_ON_CPU if grad.device.type == "cpu" else _CHUNK) // (length * width))
    memory = grad.new_zeros(min(chunk, len(matrices)), length * width)
    rows = memory[:, : length * (width - 1)].unflatten(1, (length, width - 1))[:, :, length : 2 * length]
    for first in range(0, len(matrices), chunk):
        part = matrices[first : first + chunk]
        by_distance = memory[: len(part)].view(-1, width)
        place = slice(first * length, (first + len(part)) * length)
        # 4. Skewed rows [chunk · T, R + 1] × [R + 1, P]: by query, then by key from the transposed gradient.
        rows[: len(part)] = part
        torch.mm(by_distance, for_queries, out=by_query[place])
        rows[: len(part)] = part.transpose(1, 2)
        torch.mm(by_distance, for_keys, out=by_key[place])
    shape = (*grad.shape[:-1], num_buckets)
    return by_query.view(shape), by_key.view(shape)


@bucket_sums.register_fake
def _(grad: Tensor, buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    shape = (*grad.shape[:-1], num_buckets)
    return grad.new_empty(shape), grad.new_empty(shape)
