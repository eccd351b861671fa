"""Parameter groups, LAMB, and the moving average of the weights."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gptbert.config import TrainConfig
from kernels import lamb_step


class Lamb(Optimizer):
    """LAMB (You et al. 2020), with the trust ratio only where there is weight decay, and never clamped.

    State per parameter: `step` (fp32 scalar on the CPU, updates so far), `exp_avg` and `exp_avg_sq` (like it).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
            ages = [int(self.state[param]["step"]) for param in params]
            for step in sorted(set(ages)):
                same_age = [param for param, age in zip(params, ages, strict=True) if age == step]
                lamb_step(
                    same_age,
                    [param.grad for param in same_age],
                    [self.state[param]["exp_avg"] for param in same_age],
                    [self.state[param]["exp_avg_sq"] for param in same_age],
                    step=step,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return loss


class WeightAverage:
    """Exponential moving average of a model's parameters in fp32, kept as a model of its own.

    Attributes:
        model: a copy of the model, in eval mode, that holds the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    def update(self, model: nn.Module) -> None:
        """Set average ← decay · average + (1 − decay) · weights."""
        self._average(list(self.model.parameters()), list(model.parameters()), None)


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
    return Lamb(groups, **settings) if config.optimizer == "lamb" else AdamW(groups, fused=True, **settings)
