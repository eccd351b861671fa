"""Bias, dropout, residual connection, mix and LayerNorm in one pass, in Triton: registered operations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import wanted, whole_rows
from kernels.backend import triton_kernel
from kernels.first_order import first_order

GROUP = 6  # mixes
MOST_MIXES = 127  # the weights' gradients are tiles of all representations


def is_fused(device: torch.device, dtype: torch.dtype, size: int, num_mixes: int, backend: str | None = None) -> bool:
    """Whether mixes of these sizes run in the fused kernels: wanted, backend "triton".

    Args:
        device: of the representations.
        dtype: of the sub-layers' outputs.
        size: D.
        num_mixes: M.
        backend: see `kernels.backend.choose_backend`.
    """
    return (
        wanted.runs("depth_mix", device, backend)
        and whole_rows.supports(dtype, device)
        and size <= whole_rows.WIDEST
        and num_mixes <= MOST_MIXES
    )


class FusedMixes:
    """The mixes of one forward and its backward, in order of depth.

        y_n = x_{n−1} + dropout(out_n + bias_n),  x_n = Σ_{m≤n} α_{n,m}·y_m,  h_n = LayerNorm(x_n),  y_0 = x_0

    Older y_m are kept in the dtype of the outputs, y_n itself is mixed in fp32. Each x_n may be used by the next mix,
    and each h_n, anywhere. A forward has one backward. No atomics: the same input gives the same bits.

    Args:
        alphas: weights of the mixes n = 1 … M, [n + 1] fp32 each.
        dtype: of out_n and h_n: bf16, or fp32.
        dropout_prob: probability of a zero in dropout.
        eps: LayerNorm's.
    """

    def __init__(self, alphas: Sequence[Tensor], dtype: torch.dtype, dropout_prob: float, eps: float) -> None:
        self.num_mixes = len(alphas)
        self.count = 0  # mixes so far
        self._next_backward = self.num_mixes
        self._alpha = torch.cat(list(alphas))
        self._dtype = dtype
        self._dropout_prob = dropout_prob
        self._eps = eps

    def start(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """y_0 [..., D] to x_0, which equals it, and h_0."""
        size, num_partials = first.numel(), GROUP + 1 if self.num_mixes > GROUP else 0
        self.values = first.new_empty(self.num_mixes + 1 + GROUP, size, dtype=self._dtype)
        self.partials = first.new_empty(num_partials, size, dtype=torch.float32)
        self.grad_alpha = torch.empty_like(self._alpha)
        return _Start.apply(first, self._alpha, self)

    def mix(self, out: Tensor, bias: Tensor | None, x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """One mix.

        Args:
            out: a sub-layer's output, [..., D].
            bias: [D], to be added to it, or None.
            x: x_{n−1} [..., D] fp32, from the last mix.
            seed: [2] int32, of dropout, or None; the mask is that of `kernels.dropout` for [..., D].

        Returns:
            x_n [..., D] fp32, and h_n [..., D].

        Raises:
            ValueError: there are more mixes than weights.
        """
        if self.count == self.num_mixes:
            raise ValueError(f"mix {self.count + 1} of {self.num_mixes}")
        self.count += 1
        return _Mix.apply(out, bias, x, self, self.count, seed if self._dropout_prob else None)

    def run_forward(
        self, depth: int, out: Tensor | None, bias: Tensor | None, x: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_n (empty for n = 0), h_n, and LayerNorm's 1/σ [R]."""
        rows = x.reshape(-1, x.shape[-1])
        mixed = torch.empty_like(rows) if depth else rows.new_empty(0, rows.shape[1])
        normalized, inverse_std = torch.empty_like(rows, dtype=self._dtype), rows.new_empty(len(rows))
        forward(
            None if out is None else out.reshape(rows.shape).contiguous(),
            bias,
            rows.contiguous(),
            self._alpha.detach(),
            seed,
            self.values,
            self.partials,
            mixed,
            normalized,
            inverse_std,
            depth,
            self.num_mixes,
            self._dropout_prob,
            self._eps,
        )
        return mixed, normalized, inverse_std

    def run_backward(
        self,
        depth: int,
        grad_x: Tensor | None,
        grad_h: Tensor | None,
        normalized: Tensor,
        inverse_std: Tensor,
        seed: Tensor | None,
        *,
        has_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """∂y_n, which is also ∂x_{n−1}, ∂out_n and ∂bias, [R, D] and [D]; called in descending order of depth."""
        if depth != self._next_backward:
            raise RuntimeError("depth_mix: a forward has one backward, through its last mix")
        self._next_backward = depth - 1
        grad_newest = torch.empty_like(normalized, dtype=torch.float32)
        grad_out = torch.empty_like(normalized) if depth else None
        grad_bias = normalized.new_empty(normalized.shape[1], dtype=torch.float32) if has_bias else None
        backward(
            *(None if grad is None else grad.reshape(normalized.shape).contiguous() for grad in (grad_x, grad_h)),
            normalized,
            inverse_std,
            self._alpha.detach(),
            seed,
            self.values,
            self.partials,
            grad_newest,
            grad_out,
            grad_bias,
            self.grad_alpha,
            depth,
            self.num_mixes,
            self._dropout_prob,
        )
        if depth == 0:
            del self.values, self.partials  # free them now: this object may live as long as the loss
        return grad_newest, grad_out, grad_bias


class _Start(torch.autograd.Function):
    """(y_0, α) to x_0 and h_0. Its backward is the last of all, and returns the gradient of all weights."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, alpha: Tensor, mixes: FusedMixes) -> tuple[Tensor, Tensor]:
        del alpha
        ctx.set_materialize_grads(False)
        x = first.float()
        _, normalized, inverse_std = mixes.run_forward(0, None, None, x, None)
        ctx.save_for_backward(normalized, inverse_std)
        ctx.mixes, ctx.dtype = mixes, first.dtype
        return x.view_as(x), normalized.view(first.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor, Tensor, None]:
        grad, _, _ = ctx.mixes.run_backward(0, grad_x, grad_h, *ctx.saved_tensors, None, has_bias=False)
        given: Any = grad_x if grad_h is None else grad_h
        return grad.view(given.shape).to(ctx.dtype), ctx.mixes.grad_alpha, None


class _Mix(torch.autograd.Function):
    """(out_n, bias, x_{n−1}) to x_n and h_n."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, bias: Tensor | None, x: Tensor, mixes: FusedMixes, depth: int, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        mixed, normalized, inverse_std = mixes.run_forward(depth, out, bias, x, seed)
        ctx.save_for_backward(normalized, inverse_std)
        ctx.mixes, ctx.depth, ctx.seed, ctx.has_bias, ctx.shape = mixes, depth, seed, bias is not None, x.shape
        return mixed.view(x.shape), normalized.view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_newest, grad_out, grad_bias = ctx.mixes.run_backward(
            ctx.depth, grad_x, grad_h, *ctx.saved_tensors, ctx.seed, has_bias=ctx.has_bias
        )
        return grad_out.view(ctx.shape), grad_bias, grad_newest.view(ctx.shape), None, None, None


@torch.library.custom_op(
    "kernels::depth_mix", mutates_args={"values", "partials", "mixed", "normalized", "inverse_std"}
)
def forward(
    out: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    values: Tensor,
    partials: Tensor,
    mixed: Tensor,
    normalized: Tensor,
    inverse_std: Tensor,
    depth: int,
    num_mixes: int,
    dropout_prob: float,
    eps: float,
) -> None:
    """One mix; depth 0 has no `out` and leaves `mixed`, which is x.

    Args:
        out: [R, D] in the dtype of `values`, or None.
        bias: [D] fp32, or None.
        x: x_{n−1} [R, D] fp32.
        alpha: all weights, [M(M + 3)/2] fp32.
        seed: [2] int32, of dropout, or None.
        values: [M + 1 + GROUP, R·D]; row m is y_m for m < n; y_n is written.
        partials: [GROUP + 1, R·D] fp32; empty if M ≤ GROUP; written by the first mix of a group.
        mixed: x_n [R, D] fp32, written.
        normalized: h_n [R, D] in the dtype of `values`, written.
        inverse_std: [R] fp32, written.
        depth: n.
        num_mixes: M.
        dropout_prob: probability of a zero.
        eps: LayerNorm's.
    """
    triton_kernel("depth_mix").forward(
        out, bias, x, alpha, seed, values, partials, mixed, normalized, inverse_std, depth, num_mixes, dropout_prob, eps
    )


@torch.library.custom_op(
    "kernels::depth_mix_backward",
    mutates_args={"values", "partials", "grad_newest", "grad_out", "grad_bias", "grad_alpha"},
)
def backward(
    grad_x: Tensor | None,
    grad_h: Tensor | None,
    normalized: Tensor,
    inverse_std: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    values: Tensor,
    partials: Tensor,
    grad_newest: Tensor,
    grad_out: Tensor | None,
    grad_bias: Tensor | None,
    grad_alpha: Tensor,
    depth: int,
    num_mixes: int,
    dropout_prob: float,
) -> None:
    """The gradients of one mix; in descending order of depth.

    Args:
        grad_x: ∂x_n [R, D] fp32 from the next mix, or None.
        grad_h: ∂h_n [R, D] in the dtype of `values`, or None.
        normalized: h_n, of the forward.
        inverse_std: of the forward.
        alpha: see `forward`.
        seed: see `forward`.
        values: row m is y_m for m ≤ n + GROUP, and ∂x_{m−GROUP} above; ∂x_n is written.
        partials: written by the last mix of a group.
        grad_newest: ∂y_n = ∂x_{n−1} [R, D] fp32, written.
        grad_out: ∂out_n [R, D] in the dtype of `values`, written; None for depth 0.
        grad_bias: [D] fp32, written, or None.
        grad_alpha: like `alpha`; the first mix of a group writes all of its group.
        depth: n.
        num_mixes: M.
        dropout_prob: see `forward`.
    """
    triton_kernel("depth_mix").backward(
        grad_x, grad_h, normalized, inverse_std, alpha, seed, values, partials, grad_newest, grad_out, grad_bias,
        grad_alpha, depth, num_mixes, dropout_prob,
    )  # fmt: skip


@forward.register_fake
@backward.register_fake
def _(*args) -> None:  # noqa: ANN002
    del args  # all outputs are written in place
