"""Muon for a model's hidden matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The parameters for Muon: matrices between hidden states, which excludes the embedding."""
    return [param for name, param in model.named_parameters() if param.ndim == 2 and not name.startswith("embedding.")]


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) and AdamW, both PyTorch's own.

    Muon's update is the semi-orthogonal matrix nearest to the momentum, by Newton–Schulz in bf16, scaled to the usual
    size of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both share one learning rate and weight
    decay. Matrices that the model fuses, such as query and key, are treated as one.

    Every rank takes the full step; the ranks' weights stay equal as long as their devices compute matrix products
    alike. Newton–Schulz amplifies the small components of a gradient, so the rounding of sums, and with it the number
    of ranks, shows more than with AdamW: in the fourth digit of a loss, not the seventh.

    State per parameter: Muon's `momentum_buffer`; AdamW's `step`, `exp_avg` and `exp_avg_sq`. An attribute `found_inf`,
    a scalar on the device that is 1 to skip a step, works for both as it does for PyTorch's fused AdamW.

    Args:
        matrices: Muon's parameters, 2-D and not sharded.
        groups: AdamW's parameters, with each group's weight decay.
        lr: for all parameters.
        weight_decay: for the matrices.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        self._muon = Muon(list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        found_inf = getattr(self, "found_inf", None)
        matrices, *groups = self.param_groups  # re-read: load_state_dict replaces the group dicts
        self._muon.state = self._adamw.state = self.state
        for matrix in matrices["params"]:
            if matrix.grad is not None:
                self._step_matrix(matrix, matrices, found_inf)
        self._adamw.param_groups = groups
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]  # as GradScaler does
        self._adamw.step()

    def _step_matrix(self, matrix: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """One matrix at a time, since Muon cannot skip a step: it is undone where needed, without a device sync."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        changing = (matrix, state["momentum_buffer"])
        before = [tensor.clone() for tensor in changing]
        self._muon.param_groups = [group | {"params": [matrix]}]
        self._muon.step()
        if found_inf is not None:
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(torch.where(found_inf > 0, old, tensor))
