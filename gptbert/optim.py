"""Parameter groups, LAMB, and the moving average of the weights."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from gptbert.config import TrainConfig
from gptbert.muon import MuonWithAdamW, hidden_matrices
from gptbert.sharding import let_go, local, whole
from kernels import lamb_step


class Lamb(Optimizer):
    """LAMB (You et al. 2020), with the trust ratio only where there is weight decay, and never clamped.

    State per parameter: `step` (fp32 scalar, updates so far), `exp_avg` and `exp_avg_sq` (like it), all on its device.
    Parameters are fp32 or fp64, and all whole or all sharded over the same processes (DTensors, as fully_shard makes
    them; then the moments are too), which must all take each step. Norms are those of whole tensors. For CUDA graphs,
    `lr` may be an fp32 scalar tensor on the parameters' device.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                raise ValueError(f"{name}: {value} is not a number from 0")
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: {beta} is not in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also part of `load_state_dict`, which leaves `step` where it was saved: the CPU, in older checkpoints."""
        super().__setstate__(state)
        for param, values in self.state.items():
            if values:
                values["step"] = torch.as_tensor(values["step"]).to(param.device, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.no_grad()
    def clip_step_average(self, max_grad_norm: float, averages: Mapping[Tensor, Tensor], decay: float) -> Tensor:
        """Clip the gradients of all parameters together, `step`, and move averages of the parameters; in one pass.

        Where the gradients' norm is not finite, parameters, state and averages stay as they are. Gradients are only
        read.

        Args:
            max_grad_norm: as of torch.nn.utils.clip_grad_norm_.
            averages: of every parameter, its exponential moving average.
            decay: of the averages.

        Returns:
            The gradients' norm before clipping, a scalar on the device.
        """
        return self._update(max_grad_norm, averages, decay)

    def _update(
        self,
        max_grad_norm: float | None = None,
        averages: Mapping[Tensor, Tensor] | None = None,
        average_decay: float = 0.0,
    ) -> Tensor | None:
        """One call of the operation for all parameters that share everything but the weight decay."""
        group_of_shards = _shard_group(param for group in self.param_groups for param in group["params"])
        calls, idle = defaultdict(list), []
        for group in self.param_groups:
            lr = group["lr"]
            shared = (id(lr) if isinstance(lr, Tensor) else lr, *group["betas"], group["eps"])
            for param in group["params"]:
                if param.grad is None:
                    idle.append(param)
                else:
                    calls[shared, param.device, param.dtype].append((param, group))
        gradient_norm = None
        if len(calls) != 1 and max_grad_norm is not None:  # the norm is of all, so it comes first
            grads = [param.grad for members in calls.values() for param, _ in members]
            gradient_norm = whole(get_total_norm(grads))
        for members in calls.values():
            params, (_, group) = [param for param, _ in members], members[0]
            states = [self._state_of(param) for param in params]
            norm = lamb_step(  # that of all gradients, whether it is given or computed
                [local(param) for param in params],
                [local(param.grad).contiguous() for param in params],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=[group["weight_decay"] for _, group in members],
                max_grad_norm=max_grad_norm,
                gradient_norm=gradient_norm,
                averages=[local(averages[param]) for param in params] if averages else None,
                average_decay=average_decay,
                group=group_of_shards,
            )
            gradient_norm = norm if gradient_norm is None else gradient_norm
        if averages:
            _move_averages({param: averages[param] for param in idle}, average_decay, gradient_norm)
        return gradient_norm

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


class WeightAverage:
    """Exponential moving average of a model's parameters in fp32, kept as a model of its own.

    Attributes:
        model: a copy of the model, in eval mode, that holds the average.
        decay: what is left of the average after a step.

    Args:
        model: whose weights the average begins with; whole. To shard it, shard the average's model too.
        decay: see above.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, gradient_norm: Tensor | None = None) -> None:
        """Set average ← decay · average + (1 − decay) · weights, unless the norm is given and not finite."""
        _move_averages(self.of(model), self.decay, gradient_norm)

    def of(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """The average of each parameter of the model, sharded as it is."""
        let_go(self.model)
        return dict(zip(model.parameters(), self.model.parameters(), strict=True))


def _move_averages(averages: Mapping[Tensor, Tensor], decay: float, gradient_norm: Tensor | None) -> None:
    weight = 1 - decay if gradient_norm is None else torch.where(gradient_norm.isfinite(), 1 - decay, 0.0)
    for param, average in averages.items():
        values = local(average)
        values.lerp_(local(param), weight.to(values) if isinstance(weight, Tensor) else weight)


def _shard_group(params: Iterable[Tensor]) -> ProcessGroup | None:
    """The processes over which parameters are spread; None if they are whole.

    Raises:
        ValueError: it is not the same for all, or some are spread in ways that are not supported.
    """
    groups = set()
    for param in params:
        placements = param.placements if isinstance(param, DTensor) else ()
        spread = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        if len(spread) > 1 or not all(isinstance(placements[dim], Shard) for dim in spread):
            raise ValueError(f"Lamb: a parameter is placed {placements}; at most one dimension of a mesh may shard it")
        groups.add(param.device_mesh.get_group(spread[0]) if spread else None)
    if len(groups) > 1:
        raise ValueError("Lamb: parameters are spread over different processes; give each kind its own optimizer")
    return groups.pop() if groups else None


def update_weights(optimizer: Optimizer, model: nn.Module, average: WeightAverage, max_grad_norm: float) -> Tensor:
    """What a step does with its gradients: clip them to a global norm, step, and move the average of the weights.

    Where that norm is not finite, weights, average and the optimizer's state stay as they are; nothing waits to know.

    Args:
        optimizer: from `build_optimizer`, over all parameters of the model.
        model: whose parameters have gradients.
        average: of the model.
        max_grad_norm: what longer gradients are scaled down to.

    Returns:
        The gradients' norm before clipping, finite or not, a scalar on the device.
    """
    if isinstance(optimizer, Lamb):
        return optimizer.clip_step_average(max_grad_norm, average.of(model), average.decay)
    gradient_norm = whole(clip_grad_norm_(model.parameters(), max_grad_norm))
    optimizer.found_inf = (~gradient_norm.isfinite()).float()  # as GradScaler tells fused optimizers to skip
    optimizer.step()
    del optimizer.found_inf
    average.update(model, gradient_norm)
    return gradient_norm


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: all parameters but biases and LayerNorm's decay (spec.md §4)."""
    named = list(model.named_parameters())
    decays = [not ("bias" in name or "layer_norm" in name) for name, _ in named]
    return [
        {"params": [param for (_, param), yes in zip(named, decays, strict=True) if yes], "weight_decay": weight_decay},
        {"params": [param for (_, param), yes in zip(named, decays, strict=True) if not yes], "weight_decay": 0.0},
    ]


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer that `--optimizer` names."""
    settings = {
        "lr": config.learning_rate,
        "betas": (config.optimizer_beta1, config.optimizer_beta2),
        "eps": config.optimizer_eps,
    }
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "muon":
        matrices = hidden_matrices(model)
        taken = {id(matrix) for matrix in matrices}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        return MuonWithAdamW(matrices, rest, weight_decay=config.weight_decay, **settings)
    return Lamb(groups, **settings) if config.optimizer == "lamb" else AdamW(groups, fused=True, **settings)
