"""Softmax of scores, and its backward, by the C++ kernels: registered operations in bf16."""

from torch import Tensor

from kernels import cpp
from kernels.dropout import check_seed, keep_threshold


def _fake_attention_weights(scores, by_query, by_key, buckets, mask, seed, dropout_prob):
    return _weights(scores, seed)


@cpp.operation(_fake_attention_weights)
def attention_weights(
    scores: Tensor,
    by_query: Tensor,
    by_key: Tensor,
    buckets: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
) -> tuple[Tensor, Tensor]:
    """See `eager.attention_weights`; without a seed the second result is empty."""
    heads, batch, length, _ = scores.shape
    _check_buckets(buckets, length, by_query.shape[-1])
    mask = mask.expand(batch, length, length)
    probabilities, dropped = _weights(scores, seed)
    inputs = [tensor.contiguous() for tensor in (scores, by_query, by_key, buckets, mask)]
    outputs = (probabilities, dropped)
    sizes = (heads, batch, length, by_query.shape[-1])
    cpp.call("attention_weights", (*inputs, *_dropout(seed, dropout_prob), *outputs, *sizes))
    return outputs


def _fake_attention_weights_backward(grad, probabilities, buckets, num_buckets, seed, dropout_prob):
    return _gradients(grad, num_buckets, seed)


@cpp.operation(_fake_attention_weights_backward)
def attention_weights_backward(
    grad: Tensor,
    probabilities: Tensor,
    buckets: Tensor,
    num_buckets: int,
    seed: Tensor | None,
    dropout_prob: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `eager.attention_weights_backward`; without a seed the last result is empty."""
    heads, batch, length, _ = grad.shape
    outputs = _gradients(grad, num_buckets, seed)
    inputs = [tensor.contiguous() for tensor in (grad, probabilities, buckets)]
    sizes = (heads, batch, length, num_buckets)
    cpp.call("attention_weights_backward", (*inputs, *_dropout(seed, dropout_prob), *outputs, *sizes))
    return outputs


def _weights(scores: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty(0 if seed is None else scores.shape)


def _gradients(grad: Tensor, num_buckets: int, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, batch, length, _ = grad.shape
    by_query = grad.new_empty(heads, batch, length, num_buckets)
    by_key = grad.new_empty(heads, num_buckets, batch, length)
    return grad.new_empty(grad.shape), by_query, by_key, grad.new_empty(0 if seed is None else grad.shape)


def _check_buckets(buckets: Tensor, length: int, num_buckets: int) -> None:
    """Raise ValueError if the kernel, which reads the first row and column, would read past the position scores."""
    if buckets.shape != (length, length):
        raise ValueError(f"buckets: {list(buckets.shape)}; expected {[length, length]}")
    for numbers in (buckets[:1], buckets[:, :1]):
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_buckets:
            raise ValueError(f"buckets: one is not in 0 … {num_buckets - 1}")


def _dropout(seed: Tensor | None, dropout_prob: float) -> tuple[Tensor | None, int, float]:
    if seed is not None:
        check_seed(seed)
    return seed, keep_threshold(dropout_prob), 1 / (1 - dropout_prob)
