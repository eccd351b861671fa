"""Attention against its reference: the operation with its gradients, and the softmax kernels alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention_context import attention_context, cpp, eager, reference
from kernels.dropout import dropout
from kernels.numerics import Comparison, compare_all, compare_exactly, compare_function, random_bf16
from kernels.run import Run

_SEED = torch.tensor([77, -5], dtype=torch.int32)
_DROPOUT = 0.3


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Forward and backward in bf16, with and without dropout, at odd sizes; always on the CPU."""
    del device, run
    for length in (1, 19, 150) if backend == "cpp" else ():
        yield from _kernels(length)
    for seed in (None, _SEED):
        yield from _operation(seed, backend)


def _buckets(length: int) -> Tensor:
    """[T, T] int64, seven buckets: i − j clamped to ±3."""
    position = torch.arange(length)
    return (position[:, None] - position[None, :]).clamp(-3, 3) + 3


def _operation(seed: Tensor | None, backend: str) -> Iterator[Comparison]:
    """H = 2, B = 3, T = 21, d = 8; the last positions of two rows see no key."""
    heads, batch, length, width = 2, 3, 21, 8
    positions = torch.arange(length).expand(batch, length)
    documents = torch.where(positions >= torch.tensor([[21], [20], [13]]), -1, positions // 8)
    mask = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, None, :]
    shapes = {
        "query": (heads, batch, length, width),
        "key": (heads, batch, length, width),
        "position_query": (heads, 7, width),
        "position_key": (heads, 7, width),
        "value": (heads, batch, length, width),
    }
    inputs = {name: random_bf16(*shape, index)[..., 0] for index, (name, shape) in enumerate(shapes.items(), start=1)}
    rest = {
        "buckets": _buckets(length),
        "mask": mask,
        "seed": seed,
        "dropout_prob": _DROPOUT if seed is not None else 0.0,
    }
    yield from compare_function(
        f"bf16 {'with' if seed is not None else 'without'} dropout",
        lambda **tensors: attention_context(**tensors, **rest, backend=backend),
        lambda **tensors: reference.attention_context(**tensors, **rest),
        inputs,
    )


def _kernels(length: int) -> Iterator[Comparison]:
    """The C++ kernels: H = 3, P = 7; two rows, of several documents, and of one and padding."""
    heads, batch, buckets = 3, 2, 7
    position, bucket_of = torch.arange(length), _buckets(length)
    documents = torch.stack([position // 7, torch.where(position < 4, 0, -1)])
    mask = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, None, :]
    scores, grad = random_bf16(heads, batch, length, length), random_bf16(heads, batch, length, length) / 8
    inputs = (scores, random_bf16(heads, batch, length, buckets), random_bf16(heads, buckets, batch, length))
    rest = (bucket_of, mask, _SEED, _DROPOUT)
    actual = cpp.attention_weights(*inputs, *rest)
    exact = eager.attention_weights(*(tensor.double() for tensor in inputs), *rest)
    plain = eager.attention_weights(*inputs, *rest)
    yield from compare_all(f"T={length}: probabilities, dropped", actual, exact, plain)
    yield compare_exactly(f"T={length}: mask", actual[1], dropout(actual[0], _SEED, _DROPOUT))
    rest = (bucket_of, buckets, _SEED, _DROPOUT)
    results = [
        function(*tensors, *rest)
        for function, tensors in (
            (cpp.attention_weights_backward, (grad, actual[0])),
            (eager.attention_weights_backward, (grad.double(), actual[0].double())),
            (eager.attention_weights_backward, (grad, actual[0])),
        )
    ]
    yield from compare_all(f"T={length}: ∂scores, ∂by_query, ∂by_key, dropped again", *results)
