"""LAMB's Triton kernels for the same tensors at every step: what stays the same is checked once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.backend import triton_kernel
from kernels.lamb import chunk_table, op
from kernels.lamb.arguments import Settings, Tensors


class PreparedStep:
    """`kernels.lamb_step` with backend "triton" for the same tensors at every step, in a tenth of its host time.

    The kernels are launched with the same arguments, so the results are bit-identical. It skips the registered
    operation, which converts and checks some 800 tensors per call. Tensors are checked at the first step, and again
    when an address changes. Use `lamb_step` in code that torch.compile traces, and for meta or fake tensors.

    It also writes copies of the new parameters in another dtype, which `lamb_step` does not: 2 bytes a parameter in
    bf16, where a copy made after the step reads and writes 6. A skipped step leaves them as they are.

    Args:
        params: fp32, of any shapes; the other lists are as for `lamb_step`. The lists must not change afterwards.
        exp_avgs: see `lamb_step`.
        exp_avg_sqs: see `lamb_step`.
        steps: see `lamb_step`.
        weight_decays: one per parameter.
        averages: see `lamb_step`; may be empty.
        copies: of each parameter, like it or all bf16, rounded to nearest even; None where there is none. May be empty.

    Raises:
        ValueError: at the first step; see `lamb_step`.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        averages: list[Tensor],
        weight_decays: Sequence[float],
        copies: Sequence[Tensor | None] = (),
    ) -> None:
        self._params, self._state, self._averages = params, (exp_avgs, exp_avg_sqs, steps), averages
        self._copies = copies
        self._used_elsewhere = [*params, *(copy for copy in copies if copy is not None)]
        self._decays = list(weight_decays)
        self._sizes = [param.numel() for param in params]
        self._checked: tuple[Any, ...] | None = None  # addresses of the state, and the gradients' dtypes and devices
        self._launch = triton_kernel("lamb").launch

    @torch.no_grad()
    def __call__(
        self,
        grads: list[Tensor],
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        max_grad_norm: float | None = None,
        gradient_norm: Tensor | None = None,
        average_decay: float = 0.999,
    ) -> Tensor | None:
        """One step of `lamb_step` with these gradients and numbers, and its result.

        Gradients need not be contiguous.
        """
        tensors = Tensors(self._params, list(map(Tensor.contiguous, grads)), *self._state, self._averages)
        op.check_numbers(beta1, beta2, max_grad_norm, gradient_norm)
        op.check_lr(lr, self._params[0].device)
        addresses = chunk_table.addresses(*tensors, self._copies)
        self._check(tensors, addresses)
        clipping = op.clipping(gradient_norm, max_grad_norm, self._params[0])
        settings = Settings(lr, beta1, beta2, eps, self._decays, average_decay)
        # so that a backward that saved the old values raises
        torch.autograd.graph.increment_version(self._used_elsewhere)
        self._launch(tensors, clipping, settings, copies=self._copies, addresses=addresses)
        return clipping.norm

    def _check(self, tensors: Tensors, addresses: chunk_table.Addresses) -> None:
        """Check all tensors if an address of the state changed, or a size, dtype or device of the gradients."""
        state = [column for index, column in enumerate(addresses) if index != chunk_table.GRAD]
        kinds = {grad.dtype for grad in tensors.grads}, set(map(Tensor.get_device, tensors.grads))
        if list(map(Tensor.numel, tensors.grads)) != self._sizes or self._checked != (state, kinds):
            op.check_lengths(tensors)
            op.check_tensors(tensors)
            op.check_copies(self._params, self._copies)
            self._checked = state, kinds
