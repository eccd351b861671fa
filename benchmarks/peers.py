"""Cross-entropy of other libraries, with one signature, and each implementation's requirements."""

import importlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from kernels.backend import interpreted

PACKAGES = {
    "triton": "triton",
    "triton_packed": "triton",
    "triton_load": "triton",
    "liger": "liger_kernel",
    "cut_cross_entropy": "cut_cross_entropy",
}


def skip_unless_possible(impl: str) -> None:
    """Skip an implementation that cannot run here, with the reason."""
    if reason := reason_against(impl):
        pytest.skip(reason)


def reason_against(impl: str) -> str | None:
    """The reason why an implementation cannot run here, or None."""
    if impl == "cpp" and machine.device().type != "cpu":
        return "cpp: kernels for CPUs"
    if impl.startswith("linear_cross_entropy") and not hasattr(F, "linear_cross_entropy"):
        return f"{impl} needs a newer PyTorch than {torch.__version__}"
    return _reason_against_package(impl, PACKAGES[impl]) if impl in PACKAGES else None


def _reason_against_package(impl: str, package: str) -> str | None:
    if machine.device().type != "cuda":
        return f"{impl} needs a GPU (Triton's interpreter says nothing about time)"
    if importlib.util.find_spec(package) is None:
        return f"{impl} is not installed: pip install -e '.[bench]'"
    if interpreted():
        return "TRITON_INTERPRET=1 is set: Triton's interpreter says nothing about time"
    return None


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, z_loss_weight: float) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy; with z-loss and accuracy, and sums in fp32 like ours."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return functional.liger_fused_linear_cross_entropy(
        hidden,
        weight.bfloat16(),
        labels,
        bias.bfloat16(),
        lse_square_scale=z_loss_weight,
        reduction="sum",
        return_z_loss=True,
        accum_dtype=torch.float32,
        return_token_accuracy=True,
    ).loss


def liger_from_logits(logits: Tensor, labels: Tensor, z_loss_weight: float) -> Tensor:
    """Liger-Kernel's cross-entropy; with z-loss and accuracy. The gradient overwrites the logits."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return functional.liger_cross_entropy(
        logits,
        labels,
        lse_square_scale=z_loss_weight,
        reduction="sum",
        return_z_loss=True,
        return_token_accuracy=True,
    ).loss


def cut_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, z_loss_weight: float
) -> Tensor:
    """Cut Cross-Entropy, without its gradient filter; it has no bias, z-loss or accuracy."""
    del bias, z_loss_weight
    package = importlib.import_module("cut_cross_entropy")
    return package.linear_cross_entropy(hidden, weight.bfloat16(), labels, reduction="sum", filter_eps=None)


def eager_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, z_loss_weight: float
) -> Tensor:
    """PyTorch's linear layer and cross-entropy; no z-loss or accuracy."""
    del z_loss_weight
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, z_loss_weight: float) -> Tensor:
    """PyTorch's with default settings: all logits at once; no z-loss or accuracy."""
    del z_loss_weight
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction="sum")


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, z_loss_weight: float
) -> Tensor:
    """PyTorch's in chunks, to which autocast does not apply, with sums in fp32; no z-loss or accuracy.

    No bias either: it rounds the bias gradient to bf16 after every chunk, beyond the tolerance rule.
    """
    del bias, z_loss_weight
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="accurate")
    return F.linear_cross_entropy(hidden, weight.bfloat16(), labels, reduction="sum", options=options)
