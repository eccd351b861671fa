"""Dropout's random numbers: different on each rank, and resumed from a checkpoint."""

import torch

from gptbert.distributed.random_state import RandomState
from gptbert.distributed.world import World

CPU = torch.device("cpu")


def drawn():
    return torch.rand(4)


def test_ranks_draw_different_numbers_and_a_seed_the_same():
    draws = []
    for rank, seed in ((0, 1), (1, 1), (0, 2), (0, 1)):
        RandomState(seed, World(rank, 2, CPU)).start()
        draws.append(drawn())
    assert torch.equal(draws[0], draws[3])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


def test_a_rank_goes_on_with_its_own_numbers():
    states, expected = [], []
    for rank in range(2):
        state = RandomState(7, World(rank, 2, CPU))
        state.start()
        drawn()
        states.append(state.state_dict())
        expected.append(drawn())
    for rank in range(2):
        RandomState(7, World(rank, 2, CPU)).load_rank_states(states, step=5)
        assert torch.equal(drawn(), expected[rank])


def test_other_ranks_or_devices_go_on_with_new_numbers_that_depend_on_the_step():
    state = RandomState(7, World(0, 1, CPU))
    state.start()
    alone = [state.state_dict()]
    of_gpu = [{"random": alone[0]["random"] | {"cuda": torch.zeros(16, dtype=torch.uint8)}}]
    draws = []
    for rank, world_size, states, step in ((0, 2, alone, 5), (1, 2, alone, 5), (0, 2, alone, 6), (0, 1, of_gpu, 5)):
        RandomState(7, World(rank, world_size, CPU)).load_rank_states(states, step)
        draws.append(tuple(drawn().tolist()))
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3
