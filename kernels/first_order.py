"""Backwards have no derivative of their own: whoever asks for one gets an error, instead of a part of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch


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
