"""Training records: losses, schedule values and speed since the last record."""

import torch
from torch import Tensor

from gptbert import schedules
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.memory import peak_memory
from gptbert.distributed.world import World
from gptbert.model.objective import Objective
from gptbert.monitoring.flops import measure_matmul_flops, training_flops
from gptbert.monitoring.metrics import Throughput, training_losses


class TrainingRecord:
    """Builds the records of a run.

    Measures the device's matmul rate once, for model FLOP utilization.
    """

    def __init__(self, config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> None:
        self._config = config
        self._model_config = model_config
        self._plan = plan
        self._world = world
        dtype = torch.bfloat16 if config.mixed_precision else torch.float32
        self._matmul_flops = measure_matmul_flops(world.device, dtype, quick=True)

    def __call__(
        self,
        step: int,
        means: dict[Objective, dict[str, float]],
        labels: float,
        gradient_norm: Tensor,
        throughput: Throughput,
    ) -> dict[str, float]:
        """The record after `step` steps; syncs with the device.

        Args:
            step: steps completed.
            means: means since the last record; see `LossSums.means`.
            labels: since the last record, or since the run's start or resume if that is later.
            gradient_norm: the last step's gradient norm before clipping.
            throughput: the run's token counter and timer.
        """
        weights = {objective: self._plan.weight(objective) for objective in means}
        if self._config.token_weighted_loss:
            weights = {objective: values["count"] for objective, values in means.items()}
        tokens = self._plan.tokens_before(step)
        return (
            training_losses(means, weights)
            | {"train/gradient_norm": gradient_norm.item(), "train/tokens": tokens}
            | {f"train/{name}": value for name, value in schedules.values(self._config, step - 1).items()}
            | self._speed(step, tokens, labels, throughput)
        )

    def _speed(self, step: int, tokens: int, labels: float, throughput: Throughput) -> dict[str, float]:
        before = throughput.tokens
        rate, waiting = throughput.since_last(tokens)
        length = schedules.sequence_length(self._config, step - 1)
        flops = training_flops(self._model_config, length, labels / max(1, tokens - before))
        return {
            "train/tokens_per_second": rate,
            "train/mfu": rate * flops / (self._world.world_size * self._matmul_flops),
            "train/waiting_share": waiting,
            "train/peak_memory_gb": peak_memory(self._world.device) / 1e9,
        }
