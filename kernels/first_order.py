"""Derivatives that kernels lack, of backwards and in forward mode: an error, instead of a part of them or zeros."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses `create_graph=True`.

    What it reads was made without a graph, so a derivative of its gradients would be taken as if that were constant:
    too small, and without a word. (torch.autograd.function.once_differentiable is silent where `grad_output` requires
    no gradient, as that of a loss.)

    Raises:
        RuntimeError: when the backward runs with `create_graph=True`.
    """

    @functools.wraps(backward)
    def checked(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{backward.__module__} has no second derivative, which create_graph=True would prepare")
        return backward(*arguments)

    return checked


def refuse_tangents(*inputs: Tensor | None) -> None:
    """Raise RuntimeError if an input has a tangent, as in torch.func.jvp, which a registered operation would drop.

    PyTorch then takes the result for a constant; of a torch.autograd.Function it refuses a tangent itself.
    """
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise RuntimeError("kernels have no derivative in forward mode, as of torch.func.jvp")
