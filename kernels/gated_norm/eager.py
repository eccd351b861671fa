"""LayerNorm(linear · GELU(gate)) in PyTorch operations that compiled code fuses, differentiated by autograd."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.normalize import normalize


def gated_norm(linear: Tensor, gate: Tensor, approximate: str, eps: float) -> Tensor:
    """See `kernels.gated_norm`; linear and gate [..., D] to [..., D]."""
    normalized = normalize(linear * (gelu_tanh(gate) if approximate == "tanh" else F.gelu(gate)), eps)
    return normalized if torch.is_autocast_enabled(gate.device.type) else normalized.to(gate.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh") by (1 + tanh z)/2 = sigmoid(2z): half the time in code compiled for CPUs.

    Computed and returned in fp32 or wider, as under autocast.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
