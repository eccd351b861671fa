"""Attention against its reference: the operation with its gradients, and the softmax kernels alone."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.attention_context import attention_context, cpp, eager, fused_attention, gated_attention, reference
from kernels.attention_context.fused import LENGTHS, distance_tables, dtype_on, tile_size
from kernels.backend import triton_kernel
from kernels.dropout import dropout
from kernels.gated_norm import reference as gated_reference
from kernels.linear import Packed
from kernels.numerics import Comparison, compare_all, compare_exactly, compare_function, random_bf16
from kernels.run import Run
from kernels.wanted import VARIANTS as VARIANTS_OF

_SEED = torch.tensor([77, -5], dtype=torch.int32)
_DROPOUT = 0.3
_EPS = 1e-5
VARIANTS = VARIANTS_OF["attention_context"]


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Forward and backward, with and without dropout, at odd sizes.

    Args:
        device: where the Triton kernels run; the others run on the CPU.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check the Triton kernels only for this run's heads and row lengths; None checks several of each.
    """
    if backend == "triton":
        yield from _fused_kernels(device, run)
        return
    for length in (1, 19, 150) if backend == "cpp" else ():
        yield from _kernels(length)
    for seed in (None, _SEED):
        yield from _operation(seed, backend)


def _fused_kernels(device: torch.device, run: Run | None) -> Iterator[Comparison]:
    """Whole and partial tiles, one and several of them, every head size; rows of both objectives."""
    if run is not None:
        repeats = 2 if device.type == "cpu" else 8
        num_heads, head_size, num_position_vectors = run.attention
        lengths = {length - 1 for length in (*run.row_lengths, run.validation_length)}.intersection(LENGTHS)
        for length in sorted(lengths):  # few rows, then more tiles than a head has programs
            sizes = (num_heads, head_size, length, num_position_vectors)
            yield from compare_fused(device, *sizes, None, variant=run.attention_variant)
            yield from compare_fused(device, *sizes, _SEED, repeats, run.attention_variant)
        return
    cases = triton_kernel("attention_context").CHECKED
    is_gpu = device.type == "cuda"  # the interpreter is slow
    for variant in VARIANTS:
        for heads, size, length, vectors, has_dropout in cases if is_gpu or variant == VARIANTS[0] else cases[2::3]:
            seed = _SEED if has_dropout else None
            yield from compare_fused(device, heads, size, length, vectors, seed, variant=variant)
        if is_gpu:
            heads, size, length, vectors, _ = cases[0]
            yield from compare_fused(device, heads, size, length, vectors, repeats=100, variant=variant)


def compare_fused(
    device: torch.device,
    num_heads: int,
    head_size: int,
    length: int,
    num_position_vectors: int,
    seed: Tensor | None = _SEED,
    repeats: int = 1,
    variant: str = VARIANTS[0],
) -> Iterator[Comparison]:
    """The fused kernels at one size; dropout with a seed.

    Three rows, two of them causal: of many short documents, of two, and of one with padding; or `repeats` of them.
    """
    dtype = dtype_on(device)
    width, positions = num_heads * head_size, torch.arange(length)
    documents = torch.stack([positions // 7, positions // (length - 5), torch.where(positions < length - 3, 2, -1)])
    documents, is_causal = documents.repeat(repeats, 1), torch.tensor([False, True, True]).repeat(repeats)
    buckets = buckets_by_distance(length, num_position_vectors)
    projection = random_bf16(3 * repeats, length, 4 * width)  # the last quarter, gates, is not used
    inputs = {"projection": projection, "vectors": random_bf16(num_position_vectors, 2 * width, 3)[..., 0]}
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    scale, dropout_prob = (3 * head_size) ** -0.5, 0.0 if seed is None else _DROPOUT
    seed = None if seed is None else seed.to(device)
    documents, is_causal, buckets = documents.int().to(device), is_causal.to(device), buckets.to(device)

    rest: tuple[Any, ...] = (documents, is_causal, seed, dropout_prob)
    settings: dict[str, Any] = {"scale": scale, "num_heads": num_heads}
    is_short = length <= 256 and repeats == 1
    attention = reference.attention_context if is_short else functools.partial(attention_context, backend="torch")

    def tensors(projection: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        query, key, value, _ = projection.chunk(4, -1)
        position_query, position_key = vectors.chunk(2, -1)
        return query, key, position_query, position_key, value

    def fused(**inputs: Tensor) -> Tensor:
        return fused_attention(*tensors(**inputs), tables, *rest, **settings)

    def by_definition(**inputs: Tensor) -> Tensor:
        return reference.fused_attention(*tensors(**inputs), buckets, *rest, **settings, attention=attention)

    tables = distance_tables(buckets, num_position_vectors, dtype, variant)
    name = f"B={len(documents)} H={num_heads} d={head_size} T={length} P={num_position_vectors}"
    name += "" if seed is None else " dropout"
    name += "" if variant == VARIANTS[0] else f", {variant}"
    yield from compare_function(f"fused {name}", fused, by_definition, inputs)
    if not is_short or (device.type == "cpu" and length > tile_size(length)):  # the interpreter is slow
        return

    def gated(weight: Tensor, **inputs: Tensor) -> Tensor:
        rows = (tables, *rest, Packed.of([weight], dtype))
        return gated_attention(inputs["projection"], inputs["vectors"], *rows, **settings, eps=_EPS)

    def gated_by_definition(weight: Tensor, **inputs: Tensor) -> Tensor:
        gate = inputs["projection"][..., 3 * width :]
        return gated_reference.gated_norm(gate, by_definition(**inputs), weight, approximate="none", eps=_EPS)

    def plain(weight: Tensor, **inputs: Tensor) -> Tensor:
        return gated_by_definition(weight.to(dtype), **inputs)

    inputs["weight"] = random_bf16(24, width, 5)[..., 0].float().to(device) / 4
    yield from compare_function(f"gated {name}", gated, gated_by_definition, inputs, plain)


def buckets_by_distance(length: int, num_position_vectors: int) -> Tensor:
    """[2T − 1] int64: wider with distance; the last vector is padding."""
    distances = torch.arange(1 - length, length)
    buckets = (distances.sign() * (distances.abs() + 1).float().log2().mul(4).ceil().long()).clamp(-8, 8) + 8
    return buckets.clamp(max=num_position_vectors - 2)


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
    rest: dict[str, Any] = {
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
    by_query, by_key = random_bf16(heads, batch, length, buckets), random_bf16(heads, buckets, batch, length)
    inputs: tuple[Any, ...] = (scores, by_query, by_key)
    masked: tuple[Any, ...] = (bucket_of, mask, _SEED, _DROPOUT)
    actual = cpp.attention_weights(*inputs, *masked)
    exact = eager.attention_weights(*tuple(tensor.double() for tensor in inputs), *masked)
    plain = eager.attention_weights(*inputs, *masked)
    yield from compare_all(f"T={length}: probabilities, dropped", actual, exact, plain)
    yield compare_exactly(f"T={length}: mask", actual[1], dropout(actual[0], _SEED, _DROPOUT))
    rest: tuple[Any, ...] = (bucket_of, buckets, _SEED, _DROPOUT)
    results = [
        function(*tensors, *rest)
        for function, tensors in (
            (cpp.attention_weights_backward, (grad, actual[0])),
            (eager.attention_weights_backward, (grad.double(), actual[0].double())),
            (eager.attention_weights_backward, (grad, actual[0])),
        )
    ]
    yield from compare_all(f"T={length}: ∂scores, ∂by_query, ∂by_key, dropped again", *results)
