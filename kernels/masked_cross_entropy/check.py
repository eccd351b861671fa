"""Masked cross-entropy against its fp64 reference: its part of `python -m kernels.check`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.masked_cross_entropy import cpp, cross_entropy_from_logits, eager, masked_cross_entropy, op, reference
from kernels.masked_cross_entropy.reference import MaskedCrossEntropy
from kernels.numerics import Comparison, compare, compare_exactly, random_bf16
from kernels.run import Run

_IGNORED = -100
_Z_LOSS_WEIGHT = 0.1  # large, so that a missing z-loss shows even in bf16
_VOCAB_SIZES = (5, 131, 2048, 4500, 16384, 32769)  # every number of pieces; rows of odd V begin and end inside words
_SCALES = (0.5, 3.0, 7.0, 0.3)  # of four segments, of which the third has no rows
_SUMS = ("total", "loss", "z_loss")
_COUNTS = ("correct", "count")


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Both public functions, forward and backward, over dtypes and vocabularies.

    Args:
        device: where to run.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check only `masked_cross_entropy` with this run's vocabulary and dtype; None checks everything.
    """
    if run is not None:
        yield from _from_hidden(device, backend, run.logits_type, run.vocab_size, has_segments=True)
        return
    if backend == "cpp":
        for vocab_size in (131, 4500):
            yield from _cpp_rows(vocab_size)
        yield from _accumulated_product()
        yield from _from_logits(device, backend, torch.bfloat16, 131)
        yield from _from_logits(device, backend, torch.bfloat16, 131, has_segments=True)
        yield from _from_hidden(device, backend, torch.bfloat16)
        yield from _from_hidden(device, backend, torch.bfloat16, has_segments=True)
        return
    for num_rows in (0, 4096, 9001):
        yield from _sums(device, backend, num_rows)
        yield from _sums(device, backend, num_rows, has_segments=True)
    yield from _multiplied(device, backend)
    for dtype in (torch.float32, torch.bfloat16):
        for vocab_size in _VOCAB_SIZES:
            yield from _from_logits(device, backend, dtype, vocab_size)
    yield from _from_logits(device, backend, torch.float16, 4500)
    for row_size in (160, 165):
        yield from _from_logits(device, backend, torch.bfloat16, 131, row_size)
    yield from _from_logits(device, backend, torch.bfloat16, 4500, has_segments=True)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _from_hidden(device, backend, dtype)
        yield from _from_hidden(device, backend, dtype, has_segments=True)


def random_segments(num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Arguments `segments` [N], not in order, and `scales` [4] of four segments; the third has no rows."""
    segments = torch.tensor([0, 1, 3])[torch.randint(3, (num_rows,), generator=torch.Generator().manual_seed(num_rows))]
    return {"segments": segments.to(device), "scales": torch.tensor(_SCALES, device=device)}


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N] that expose typical mistakes.

    Labels include the first and the last class and `ignore_index`; the last class is likely; in one row the first class
    is the maximum and the label; in one the label ties with the first class for the maximum.
    """
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[::4] = _IGNORED
    logits[:, -1] += 4 + vocab_size**0.25
    labels[1:4] = torch.tensor([vocab_size - 1, 0, vocab_size - 1])
    logits[2, 0] = 4.0 + logits[2].max()
    logits[3, 0] = logits[3, -1] = 12.0 + logits[3].max().round()  # a tie: the first class wins
    return logits.to(dtype).to(device), labels.to(device)


def _from_logits(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    vocab_size: int,
    row_size: int | None = None,
    *,
    has_segments: bool = False,
) -> Iterator[Comparison]:
    """Contiguous logits, or the first columns of a matrix with rows of `row_size` elements."""
    logits, labels = random_logits(9, vocab_size, dtype, device)
    segments: dict[str, Any] = random_segments(9, device) if has_segments else {}
    results: dict[str, MaskedCrossEntropy] = {}
    gradients: dict[str, Any] = {}
    for kind, run_dtype in (("actual", dtype), ("reference", torch.float64), ("plain", dtype)):
        function = cross_entropy_from_logits if kind == "actual" else reference.cross_entropy_from_logits
        memory = torch.empty(len(logits), row_size or vocab_size, dtype=run_dtype, device=device)
        inputs = memory[:, :vocab_size].copy_(logits).requires_grad_()
        options: dict[str, Any] = {"backend": backend} if kind == "actual" else {}
        results[kind] = function(inputs, labels, z_loss_weight=_Z_LOSS_WEIGHT, **segments, **options)
        (results[kind].total * 3).backward()
        gradients[kind] = inputs.grad
    name = f"from_logits {str(dtype).removeprefix('torch.')} V={vocab_size}{f' of {row_size}' if row_size else ''}"
    name += " segments" if has_segments else ""
    yield from _compare_sums(name, results)
    off_target = torch.arange(vocab_size, device=device) != labels[:, None]
    yield from compare(f"{name} gradient", **gradients, off_target=off_target)
    options = {"z_loss_weight": _Z_LOSS_WEIGHT, "backend": backend}
    loss_only = cross_entropy_from_logits(logits, labels, **segments, **options)
    yield compare_exactly(f"{name} loss without gradient", loss_only.loss, results["actual"].loss)
    inputs = logits.clone().requires_grad_()
    factor = segments | {"scales": 3 * segments["scales"]} if has_segments else {"scale": 3.0}
    in_place = cross_entropy_from_logits(inputs * 1, labels, **factor, reuse_logits=True, **options)
    in_place.total.backward()
    yield from compare(f"{name} in place", **{**gradients, "actual": inputs.grad}, off_target=off_target)


def _from_hidden(
    device: torch.device, backend: str, dtype: torch.dtype, vocab_size: int = 1009, *, has_segments: bool = False
) -> Iterator[Comparison]:
    hidden_size = 32
    segments: dict[str, Any] = random_segments(64, device) if has_segments else {}
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "hidden": torch.randn(64, hidden_size, generator=generator),
        "weight": 0.3 * torch.randn(vocab_size, hidden_size, generator=generator),
        "bias": torch.randn(vocab_size, generator=generator),
    }
    labels = torch.randint(vocab_size, (64,), generator=generator)
    labels[::3] = _IGNORED
    labels = labels.to(device)
    results, gradients = {}, {}
    functions: dict[str, tuple[Callable[..., MaskedCrossEntropy], torch.dtype]] = {
        "actual": (functools.partial(masked_cross_entropy, backend=backend), dtype),
        "reference": (reference.masked_cross_entropy, torch.float64),
        "plain": (_with_rounded_products if backend == "cpp" else reference.masked_cross_entropy, dtype),
    }
    for kind, (function, run_dtype) in functions.items():
        inputs = {
            name: tensor.to(dtype).to(device=device, dtype=run_dtype, copy=True).requires_grad_()
            for name, tensor in tensors.items()
        }
        results[kind] = function(**inputs, labels=labels, z_loss_weight=_Z_LOSS_WEIGHT, **segments)
        (results[kind].total * 3).backward()
        gradients[kind] = {name: tensor.grad for name, tensor in inputs.items()}
    name = f"masked {str(dtype).removeprefix('torch.')} V={vocab_size}{' segments' if has_segments else ''}"
    yield from _compare_sums(name, results)
    for tensor in tensors:
        yield from compare(f"{name} gradient of {tensor}", *(all_[tensor] for all_ in gradients.values()))
    with torch.no_grad():  # a different variant of the kernels, which validation launches
        inputs = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        options = {"z_loss_weight": _Z_LOSS_WEIGHT, "backend": backend, **segments}
        results["actual"] = functions["actual"][0](**inputs, labels=labels, **options)
    yield from _compare_sums(f"{name} without gradient", results)


def _with_rounded_products(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any
) -> reference.MaskedCrossEntropy:
    """The reference, rounding where C++ does: products to bf16, then the bias in fp32."""
    logits = F.linear(hidden, weight).float() + bias.float()
    return reference.cross_entropy_from_logits(logits, labels, **options)


def _multiplied(device: torch.device, backend: str) -> Iterator[Comparison]:
    """One and two tensors, fewer than the three of hidden, weight and bias; whole and partial blocks."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.tensor(0.3, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.randn(70, 117, generator=generator).to(device, dtype)
        wide = torch.randn(8192, generator=generator).to(device)
        for tensors in ([narrow], [narrow, wide]):
            for index, actual in enumerate(op.multiplied(tensors, scale, backend)):
                exact, name = tensors[index].double() * scale, f"{str(dtype).removeprefix('torch.')} {len(tensors)}"
                yield from compare(f"multiplied {name}: {index}", actual, exact, exact.to(actual.dtype))


def _sums(device: torch.device, backend: str, num_rows: int, *, has_segments: bool = False) -> Iterator[Comparison]:
    """Sums over more rows than the other comparisons have."""
    generator = torch.Generator().manual_seed(num_rows)
    loss, z_loss = (torch.rand(num_rows, generator=generator, dtype=torch.float64) for _ in range(2))
    correct = torch.randint(2, (num_rows,), generator=generator, dtype=torch.int32).to(device)
    labels = torch.randint(11, (num_rows,), generator=generator)
    labels[::3] = _IGNORED
    labels = labels.to(device)
    segments, scales = None, torch.tensor([0.7], device=device)
    if has_segments:
        segments, scales = random_segments(num_rows, device).values()
    results: list[Any] = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        rows = (loss.float().to(device, dtype), z_loss.float().to(device, dtype), correct)
        chosen = "torch" if results else backend
        total, sums, counts = op.sum_rows(
            *rows, labels, segments, scales, [], [], _IGNORED, _Z_LOSS_WEIGHT, 11, False, chosen
        )
        results.append((total, sums[0], sums[1], counts))
    name = f"of {num_rows} rows{' in segments' if has_segments else ''}"
    for index, field in enumerate(_SUMS):
        yield from compare(f"{field} {name}", *(result[index] for result in results))
    yield compare_exactly(f"counts {name}", results[0][3], results[1][3])


def _compare_sums(name: str, results: dict[str, reference.MaskedCrossEntropy]) -> Iterator[Comparison]:
    for field in _SUMS:
        tensors = {kind: getattr(result, field).detach() for kind, result in results.items()}
        yield from compare(f"{name} {field}", **tensors)
    for field in _COUNTS:
        yield compare_exactly(f"{name} {field}", getattr(results["actual"], field), getattr(results["plain"], field))


def _cpp_rows(classes: int) -> Iterator[Comparison]:
    """The C++ kernel: seven rows, one ignored, two with a tie whose first or last class is the label."""
    logits, labels = 3 * random_bf16(7, classes), torch.arange(7) % classes
    labels[2] = -100
    logits[4, [4, 9]] = logits[5, [2, 5]] = 30.0
    bias = random_bf16(classes).float()
    bias[[2, 4, 5, 9]] = 0.5
    is_label = torch.arange(classes) == labels[:, None]
    segments, scales = torch.tensor([0, 3, 0, 1, 3, 0, 1]), torch.tensor(_SCALES)
    for name, addend in (("", None), (" with bias", bias)):
        results = []
        for function, dtype in ((cpp.rows, None), (eager.rows, torch.float64), (eager.rows, torch.float32)):
            x = logits if dtype is None else logits.to(dtype) + (0 if addend is None else addend)
            gradient = torch.full_like(x, torch.nan)
            options = {"bias": addend} if dtype is None else {}
            loss, z_loss, correct = function(x, labels, segments, scales, gradient, -100, 0.1, **options)
            results.append((loss, z_loss, gradient.to(torch.bfloat16 if dtype == torch.float32 else x.dtype), correct))
        for index, part in enumerate(("loss", "z_loss", "gradient")):
            off_target = ~is_label if part == "gradient" else None
            actual, exact, plain = (result[index] for result in results)
            yield from compare(f"rows V={classes}{name}: {part}", actual, exact, plain, off_target)
        yield compare_exactly(f"rows V={classes}{name}: correct", results[0][3], results[1][3])


def _accumulated_product() -> Iterator[Comparison]:
    """The C++ kernel: two bf16 products, the first into a total of NaN."""
    products, total = (random_bf16(3, 2999), random_bf16(3, 2999).flip(0)), torch.full((3, 2999), torch.nan)
    for index, product in enumerate(products):
        cpp.accumulate_product(total, product, is_first=index == 0)
    exact = products[0].double() + products[1].double()
    yield from compare("accumulated product", total, exact, exact.float())
