"""What the implementations of a step of LAMB are called with; for their meaning see `kernels.lamb_step`."""

from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup


class Tensors(NamedTuple):
    """One tensor for each parameter in each list; `averages` may be empty."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    averages: list[Tensor]


class Clipping(NamedTuple):
    """How gradients are scaled; not at all if nothing is given.

    Attributes:
        max_norm: the largest global norm; `norm` is computed and written. None: there is nothing to compute.
        norm: scalar, the gradients' norm before clipping, or None.
        factor: scalar in the parameters' dtype, of all gradients, if it is known already; negative: skip the step.
    """

    max_norm: float | None = None
    norm: Tensor | None = None
    factor: Tensor | None = None


class Settings(NamedTuple):
    """Numbers of a step.

    Attributes:
        lr: learning rate; a tensor is an fp32 scalar on the device.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the square root.
        weight_decays: one for each tensor.
        average_decay: share of the old moving average.
        seed: of stochastic rounding; None: to nearest even.
        group: the processes over which the tensors are sharded; None: they are whole.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decays: list[float]
    average_decay: float
    seed: int | None = None
    group: ProcessGroup | None = None
