"""Dropout's random state: one rank's PyTorch generators."""

from typing import Any

import torch
from torch import Tensor

from gptbert.distributed.world import World


class RandomState:
    """Seeds the generators differently on each rank, and saves and restores their state."""

    def __init__(self, seed: int, world: World) -> None:
        self._seed = seed
        self._world = world

    def start(self) -> None:
        """Seed the generators, with a different seed on each rank."""
        torch.manual_seed((self._seed << 20) + self._world.rank)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """This rank's {"random": the state of each generator, uint8 on the CPU}."""
        state = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._world.device)
        return {"random": state}

    def load_rank_states(self, states: list[dict[str, Any]], step: int) -> None:
        """Restore a checkpoint's generator state; reseed if the number of ranks or the devices differ.

        Args:
            states: `state_dict` of each rank of the run that saved.
            step: steps completed; part of the new seed.
        """
        generators = {"cpu", "cuda"} if self._world.device.type == "cuda" else {"cpu"}
        if [set(state["random"]) for state in states] == [generators] * self._world.world_size:
            mine = states[self._world.rank]["random"]
            torch.set_rng_state(mine["cpu"])
            if self._world.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"], self._world.device)
        else:
            torch.manual_seed((self._seed << 20) + (step << 10) + self._world.rank)
