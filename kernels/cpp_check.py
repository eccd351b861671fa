"""C++ kernels against plain PyTorch in fp64, in a moment: what `python -m kernels.check --backend cpp` runs.

A compiled run on a CPU does it before its first step.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_context, cpp, gated_norm
from kernels.attention_context import reference as attention
from kernels.column_sums import column_sums
from kernels.depth_mix import PIECE, depth_mix, depth_mix_backward
from kernels.dropout import dropout
from kernels.lamb import check as lamb_check
from kernels.masked_cross_entropy import cpp_rows, rows
from kernels.numerics import Comparison, compare, compare_exactly, sum_rounding

_SEED = torch.tensor([77, -5], dtype=torch.int32)
_DROPOUT, _EPS = 0.3, 1e-5


def comparisons() -> Iterator[Comparison]:
    """Of each operation, forward and backward, at sizes that do not fit vectors."""
    cpp.library()
    for length in (1, 19, 150):
        yield from _attention(length)
    for size in (3, 40, 1280):
        for with_linear in (False, True):
            yield from _gated_norm(size, with_linear=with_linear)
    for size in (5, 3 * PIECE + 77):
        yield from _depth_mix(size)
    for classes in (131, 4500):
        yield from _cross_entropy(classes)
    yield from _accumulated_product()
    x = _random(45, 300)
    yield from compare("column_sums", column_sums(x), x.double().sum(0), x.sum(0, dtype=torch.float32))
    with cpp.serving():
        steps = list(lamb_check.comparisons(torch.device("cpu"), "torch"))
    yield from steps


def _random(*shape: int) -> Tensor:
    """In bf16; the same for each shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def _compare_all(names: str, *results: tuple[Tensor, ...]) -> Iterator[Comparison]:
    """Named results of the kernel, of the reference in fp64, and of plain PyTorch in the kernel's precision."""
    for name, *tensors in zip(names.split(", "), *results, strict=True):
        yield from compare(name, *tensors)


def _attention(length: int) -> Iterator[Comparison]:
    """Three heads, two rows of two documents and padding, seven buckets."""
    heads, batch, buckets = 3, 2, 7
    position = torch.arange(length)
    bucket_of = (position[:, None] - position[None, :]).clamp(-3, 3) + 3
    documents = torch.stack([position // 7, torch.where(position < 4, 0, -1)])
    mask = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, None, :]
    scores, grad = _random(heads, batch, length, length), _random(heads, batch, length, length) / 8
    inputs = (scores, _random(heads, batch, length, buckets), _random(heads, buckets, batch, length))
    rest = (bucket_of, mask, _SEED, _DROPOUT)
    actual = attention_context.op.attention_weights(*inputs, *rest)
    exact = attention.attention_weights(*(tensor.double() for tensor in inputs), *rest)
    plain = attention.attention_weights(*inputs, *rest)
    yield from _compare_all(f"attention T={length}: probabilities, dropped", actual, exact, plain)
    yield compare_exactly(f"attention T={length}: mask", actual[1], dropout(actual[0], _SEED, _DROPOUT))
    rest = (bucket_of, buckets, _SEED, _DROPOUT)
    results = [
        function(*tensors, *rest)
        for function, tensors in (
            (attention_context.op.attention_weights_backward, (grad, actual[0])),
            (attention.attention_weights_backward, (grad.double(), actual[0].double())),
            (attention.attention_weights_backward, (grad, actual[0])),
        )
    ]
    yield from _compare_all(f"attention T={length}: ∂scores, ∂by_query, ∂by_key, dropped again", *results)


def _gated_norm(size: int, *, with_linear: bool) -> Iterator[Comparison]:
    """Three rows of five positions, whose gate is part of something wider; four heads where `linear` has some."""
    approximate = "none" if with_linear else "tanh"
    name = f"gated_norm D={size} {approximate}"
    if with_linear:
        gate, linear = _random(3, 5, 4 * size + 3)[..., 3:], _random(4, 3, 5, size)
    else:
        gate, linear = _random(3, 5, 2 * size + 3)[..., 3:], None
    inputs = [gate] if linear is None else [gate, linear]
    width = gate.shape[-1] if with_linear else size
    grad = _random(3, 5, width)

    def formula(gate: Tensor, linear: Tensor | None = None) -> Tensor:
        if linear is None:
            linear, gate = gate.chunk(2, dim=-1)
        else:
            linear = linear.permute(1, 2, 0, 3).flatten(2)
        return F.layer_norm(linear * F.gelu(gate, approximate=approximate), (width,), eps=_EPS)

    results = []
    for convert in (Tensor.double, Tensor.float):
        leaves = [convert(tensor).requires_grad_() for tensor in inputs]
        normalized = formula(*leaves)
        gradients = torch.autograd.grad(normalized, leaves, convert(grad))
        results.append([normalized.detach(), *gradients])
    exact, plain = results[0], [tensor.bfloat16() for tensor in results[1]]
    normalized, mean, inverse_std = gated_norm.op.gated_norm(gate, linear, not with_linear, _EPS)
    of_gate, of_linear, again = gated_norm.op.gated_norm_backward(
        grad, gate, linear, mean, inverse_std, not with_linear
    )
    actual = [normalized, of_gate, of_linear][: 1 + len(inputs)]
    yield from compare(f"{name}: normalized again", again, exact[0], plain[0])
    names = ", ".join(f"{name}: {part}" for part in ("normalized", "∂gate", "∂linear")[: 1 + len(inputs)])
    yield from _compare_all(names, actual, exact, plain)


def _depth_mix(size: int) -> Iterator[Comparison]:
    """Four representations, of which bf16 holds the older ones, and back."""
    count, name = 4, f"depth_mix N={size}"
    y = [_random(size, m + 2).float().sum(1) for m in range(count)]  # which bf16 does not hold exactly
    alphas = _random(count, count + 1)[:, :count].float().tril().contiguous()
    values = torch.full((-(-size // PIECE), count, PIECE), torch.nan, dtype=torch.bfloat16)
    old = [values_of.bfloat16().double() for values_of in y]
    for n in range(count):
        expected = sum(alphas[n, m].double() * old[m] for m in range(n)) + alphas[n, n].double() * y[n].double()
        mixed = depth_mix(values, y[n], alphas[n, : n + 1])
        yield from compare(f"{name}: x_{n}", mixed, expected, expected.float())
    grads: dict[int, Tensor] = {}
    for n in reversed(range(count)):
        grad = _random(size, 9 + n).float()[:, 0]
        later = sum(alphas[k, n].double() * grads[k].bfloat16().double() for k in grads)
        expected = alphas[n, n].double() * grad.double() + later
        terms = torch.stack([old[m] * grad.double() for m in range(n + 1)])
        plain = torch.stack([old[m].float() @ grad for m in range(n + 1)])
        of_newest, of_alpha = depth_mix_backward(values, grad, alphas, n, count)
        yield from compare(f"{name}: ∂y_{n}", of_newest, expected, expected.float())
        yield from compare(f"{name}: ∂α_{n}", of_alpha, terms.sum(-1), plain, rounding=sum_rounding(terms))
        grads[n] = grad


def _cross_entropy(classes: int) -> Iterator[Comparison]:
    """Seven rows, one without a label, two where two classes are the largest, first and last of which is the label."""
    logits, labels = 3 * _random(7, classes), torch.arange(7) % classes
    labels[2] = -100
    logits[4, [4, 9]] = logits[5, [2, 5]] = 30.0
    bias = _random(classes).float()
    bias[[2, 4, 5, 9]] = 0.5
    is_label = torch.arange(classes) == labels[:, None]
    for name, addend in (("", None), (" with bias", bias)):
        results = []
        for function, dtype in ((cpp_rows.rows, None), (rows.rows, torch.float64), (rows.rows, torch.float32)):
            x = logits if dtype is None else logits.to(dtype) + (0 if addend is None else addend)
            gradient = torch.full_like(x, torch.nan)
            options = {"bias": addend} if dtype is None else {}
            loss, z_loss, correct = function(x, labels, gradient, torch.tensor(0.7), -100, 0.1, **options)
            results.append((loss, z_loss, gradient.to(torch.bfloat16 if dtype == torch.float32 else x.dtype), correct))
        for index, part in enumerate(("loss", "z_loss", "gradient")):
            off_target = ~is_label if part == "gradient" else None
            tensors = (result[index] for result in results)
            yield from compare(f"cross-entropy V={classes}{name}: {part}", *tensors, off_target)
        yield compare_exactly(f"cross-entropy V={classes}{name}: correct", results[0][3], results[1][3])


def _accumulated_product() -> Iterator[Comparison]:
    """Of two products in bf16, the first of which finds memory that holds no numbers."""
    products, total = (_random(3, 2999), _random(3, 2999).flip(0)), torch.full((3, 2999), torch.nan)
    for index, product in enumerate(products):
        cpp_rows.accumulate_product(total, product, is_first=index == 0)
    exact = products[0].double() + products[1].double()
    yield from compare("accumulated product", total, exact, exact.float())
