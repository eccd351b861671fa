"""Parameter groups, LAMB, and the moving average of the weights."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from gptbert.config import TrainConfig
from gptbert.distributed.fsdp import full_tensor, local
from gptbert.muon import MuonWithAdamW, hidden_matrices
from kernels import lamb_step, torch_private
from kernels.backend import choose_backend, chosen_by_name
from kernels.lamb import PreparedStep


class Lamb(Optimizer):
    """LAMB (You et al. 2020), with the trust ratio only for groups with weight decay, and never clamped.

    State per parameter, on its device: `step` (fp32 scalar, updates so far), `exp_avg` and `exp_avg_sq` (like the
    parameter). Parameters are fp32 or fp64, and either all unsharded or all sharded over the same processes (DTensors
    of fully_shard, as are the moments then), which must all take every step. Norms are those of full tensors. For CUDA
    graphs, `lr` may be an fp32 scalar tensor on the parameters' device.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
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
        self._forget_calls()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, which leaves `step` where it was saved: the CPU in older checkpoints."""
        super().__setstate__(state)
        for param, values in self.state.items():
            if values:
                values["step"] = torch.as_tensor(values["step"]).to(param.device, torch.float32)
        self._forget_calls()

    def _forget_calls(self) -> None:
        self._calls: list[_Call] = []
        self._idle: list[int] = []
        self._cache_key: tuple[Any, ...] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.no_grad()
    def clip_step_average(
        self,
        max_grad_norm: float,
        averages: Mapping[Tensor, Tensor],
        decay: float,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Clip the gradients to a global norm, `step`, and update the parameters' averages, in a single pass.

        If the gradient norm is not finite, parameters, state and averages are unchanged. Gradients are not modified.
        Copies are written in that pass by the backend "triton", and after it by others.

        Args:
            max_grad_norm: as in torch.nn.utils.clip_grad_norm_.
            averages: the exponential moving average of every parameter.
            decay: of the averages.
            copies: copies of some parameters, like them or all in bf16, which follow them; none of sharded ones.

        Returns:
            The gradient norm before clipping, a scalar on the device.
        """
        return self._update(max_grad_norm, averages, decay, copies)

    def _update(
        self,
        max_grad_norm: float | None = None,
        averages: Mapping[Tensor, Tensor] | None = None,
        average_decay: float = 0.0,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """One call of the kernel for all parameters whose settings differ at most in weight decay.

        Returns the gradient norm; None without `max_grad_norm`.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        calls, idle = self._find_calls(params, grads, averages or {}, copies or {})
        gradient_norm = None
        if len(calls) != 1 and max_grad_norm is not None:  # the global norm spans the calls, so it is computed first
            gradient_norm = full_tensor(get_total_norm([grads[index] for call in calls for index in call.indices]))
        for call in calls:
            norm = call.step(  # returns the global norm, given or computed
                [grads[index] for index in call.indices],
                lr=call.group["lr"],
                beta1=call.group["betas"][0],
                beta2=call.group["betas"][1],
                eps=call.group["eps"],
                max_grad_norm=max_grad_norm,
                gradient_norm=gradient_norm,
                average_decay=average_decay,
            )
            gradient_norm = norm if gradient_norm is None else gradient_norm
        if averages:
            _move_averages({params[index]: averages[params[index]] for index in idle}, average_decay, gradient_norm)
        return gradient_norm

    def _find_calls(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        averages: Mapping[Tensor, Tensor],
        copies: Mapping[Tensor, Tensor],
    ) -> tuple[list["_Call"], list[int]]:
        """The calls, and the indices of parameters without a gradient; cached from the last step while still valid.

        A hundred parameters have some 600 tensors: collecting them takes longer than the step itself on a GPU.
        """
        shared = [
            (id(lr) if isinstance(lr := group["lr"], Tensor) else lr, *group["betas"], group["eps"])
            for group in self.param_groups
        ]
        kinds = [shared.index(settings) for settings in shared]  # groups of one kind share a call
        arguments = (kinds, params, grads, averages, copies)
        if self._cache_key != self._key_of(*arguments):
            self._calls = self._make_calls(*arguments)
            self._idle = [index for index, grad in enumerate(grads) if grad is None]
            self._cache_key = self._key_of(*arguments)  # with states created just now
        return self._calls, self._idle

    def _key_of(
        self,
        kinds: list[int],
        params: list[Tensor],
        grads: list[Tensor | None],
        averages: Mapping[Tensor, Tensor],
        copies: Mapping[Tensor, Tensor],
    ) -> tuple[Any, ...]:
        """What the calls depend on, in values fast to compare; calls hold their tensors, so ids stay unique."""
        states = self.state.values()
        tensors = chain(params, averages, averages.values(), self.state, chain.from_iterable(map(dict.values, states)))
        groups = [(len(group["params"]), group["weight_decay"]) for group in self.param_groups]
        ids = [list(map(id, each)) for each in (tensors, chain(copies, copies.values()))]
        return kinds, groups, chosen_by_name(), [grad is None for grad in grads], ids

    def _make_calls(
        self,
        kinds: list[int],
        params: list[Tensor],
        grads: list[Tensor | None],
        averages: Mapping[Tensor, Tensor],
        copies: Mapping[Tensor, Tensor],
    ) -> list["_Call"]:
        group_of_shards = _shard_group(params)
        owners = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        members = defaultdict(list)
        for index, (param, owner) in enumerate(zip(params, owners, strict=True)):
            if grads[index] is not None:
                members[kinds[owner], param.device, param.dtype].append(index)
        calls = []
        for indices in members.values():
            own = [params[index] for index in indices]
            states = [self._state_of(param) for param in own]
            moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            exp_avgs, exp_avg_sqs, steps = moments
            lists = (own, exp_avgs, exp_avg_sqs, steps)
            own_averages = [averages[param] for param in own] if averages else []
            own_copies = [copies.get(param) for param in own]
            decays = [self.param_groups[owners[index]]["weight_decay"] for index in indices]
            is_whole = group_of_shards is None and own[0].dtype == torch.float32
            if is_whole and choose_backend(None, own[0].device) == "triton":
                step: Callable[..., Tensor | None] = PreparedStep(*lists, own_averages, decays, own_copies)
            else:
                step = partial(_plain_step, lists, own_averages, decays, own_copies, group_of_shards)
            calls.append(_Call(self.param_groups[owners[indices[0]]], indices, step))
        return calls

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


@dataclass(frozen=True)
class _Call:
    """Parameters that one call of the kernel updates.

    Attributes:
        group: the parameter group with their learning rate, betas and eps.
        indices: theirs, among the parameters of all groups.
        step: called with their gradients and settings.
    """

    group: dict[str, Any]
    indices: list[int]
    step: Callable[..., Tensor | None]


def _plain_step(
    lists: tuple[list[Tensor], ...],
    averages: list[Tensor],
    weight_decays: list[float],
    copies: list[Tensor | None],
    group: ProcessGroup | None,
    grads: list[Tensor],
    **settings: Any,
) -> Tensor | None:
    params, *state = ([local(tensor) for tensor in tensors] for tensors in lists)
    gradient_norm = lamb_step(
        params,
        [local(grad).contiguous() for grad in grads],
        *state,
        weight_decay=weight_decays,
        averages=[local(average) for average in averages],
        group=group,
        **settings,
    )
    copied = {copy: param for copy, param in zip(copies, params, strict=True) if copy is not None}
    torch_private.copy_each(list(copied), list(copied.values()))
    return gradient_norm


class WeightAverage:
    """Exponential moving average of a model's parameters in fp32, kept as a separate model.

    Attributes:
        model: a copy of the model, in eval mode, whose parameters are the average.
        decay: weight of the old average in each update.

    Args:
        model: provides the initial weights; not sharded yet. If you shard it, shard the average's model too.
        decay: see above.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._pairs_of: nn.Module | None = None
        self._pairs: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, gradient_norm: Tensor | None = None) -> None:
        """Set average ← decay · average + (1 − decay) · weights, unless a norm is given and is not finite."""
        _move_averages(self.by_parameter(model), self.decay, gradient_norm)

    def by_parameter(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """The average of each of the model's parameters, sharded alike.

        Cached: only FSDP replaces the parameter objects of the two models.
        """
        if self._pairs_of is not model or isinstance(model, FSDPModule):
            if isinstance(self.model, FSDPModule):
                self.model.reshard()
            self._pairs = dict(zip(model.parameters(), self.model.parameters(), strict=True))
            self._pairs_of = model
        return self._pairs


def _move_averages(averages: Mapping[Tensor, Tensor], decay: float, gradient_norm: Tensor | None) -> None:
    if not averages:
        return
    weight = 1 - decay if gradient_norm is None else torch.where(gradient_norm.isfinite(), 1 - decay, 0.0)
    for param, average in averages.items():
        values = local(average)
        values.lerp_(local(param), weight.to(values) if isinstance(weight, Tensor) else weight)


def _shard_group(params: Iterable[Tensor]) -> ProcessGroup | None:
    """The processes that parameters are sharded over; None if they are not sharded.

    Raises:
        ValueError: the processes are not the same for all, or a placement is not supported.
    """
    groups = set()
    for param in params:
        placements = param.placements if isinstance(param, DTensor) else ()
        spread = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        if len(spread) > 1 or not all(isinstance(placements[dim], Shard) for dim in spread):
            raise ValueError(f"Lamb: a parameter is placed {placements}; at most one dimension of a mesh may shard it")
        groups.add(param.device_mesh.get_group(spread[0]) if isinstance(param, DTensor) and spread else None)
    if len(groups) > 1:
        raise ValueError("Lamb: parameters are spread over different processes; give each kind its own optimizer")
    return groups.pop() if groups else None


def update_weights(
    optimizer: Optimizer,
    model: nn.Module,
    average: WeightAverage,
    max_grad_norm: float,
    copies: Mapping[Tensor, Tensor] | None = None,
) -> Tensor:
    """Clip the gradients to a global norm, step, and update the average and the copies of the weights.

    If that norm is not finite, weights, average and optimizer state are unchanged; decided without a device sync.

    Args:
        optimizer: from `build_optimizer`, over all parameters of the model.
        model: its parameters have gradients.
        average: the model's.
        max_grad_norm: larger gradients are scaled down to this norm.
        copies: see `Lamb.clip_step_average`.

    Returns:
        The gradient norm before clipping, finite or not, a scalar on the device.
    """
    if isinstance(optimizer, Lamb):
        return optimizer.clip_step_average(max_grad_norm, average.by_parameter(model), average.decay, copies)
    gradient_norm = full_tensor(clip_grad_norm_(model.parameters(), max_grad_norm))
    if optimizer.defaults.get("fused") is False:  # it knows no way to skip a step: a device sync
        if gradient_norm.isfinite():
            optimizer.step()
    else:
        # how GradScaler makes fused optimizers skip a step
        optimizer.found_inf = (~gradient_norm.isfinite()).float()  # type: ignore[attr-defined]  # none declares it
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]  # likewise
    average.update(model, gradient_norm)
    if copies:
        with torch.no_grad():
            torch_private.copy_each(list(copies.values()), list(copies))
    return gradient_norm


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: all parameters except biases and LayerNorm's have weight decay (docs/model.md#lamb)."""
    named = list(model.named_parameters())
    decays = [not ("bias" in name or "layer_norm" in name) for name, _ in named]
    return [
        {"params": [param for (_, param), yes in zip(named, decays, strict=True) if yes], "weight_decay": weight_decay},
        {"params": [param for (_, param), yes in zip(named, decays, strict=True) if not yes], "weight_decay": 0.0},
    ]


def build_optimizer(config: TrainConfig, model: nn.Module, *, capturable: bool = False) -> Optimizer:
    """The optimizer that `--optimizer` names.

    Args:
        config: the run's settings.
        model: its parameters are updated.
        capturable: whether a CUDA graph records the steps.
    """
    settings: dict[str, Any] = {
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
    if config.optimizer == "lamb":
        return Lamb(groups, **settings)
    is_fused = next(model.parameters()).device.type != "mps"  # where fused ones may ignore `found_inf`
    return AdamW(groups, fused=is_fused, capturable=capturable and is_fused, **settings)
