"""How many rows go through the model at once."""

import torch

from gptbert.config import TrainConfig

_TOKENS = 1024  # that a CPU takes at once for each thread, two of them at least


def micro_batch_rows(config: TrainConfig, length: int, device: torch.device) -> int:
    """Most rows of a micro-batch: a process cuts its share of a step into such, and adds their gradients up.

    On a GPU, `--local_batch_size` of them; longer rows are fewer, so that tokens stay the same. A CPU takes no more
    tokens than its threads share well: on two cores, 2,048 at a time took as long as 4,096, in less memory. Below that,
    steps are slower.

    Args:
        config: with the row length at the run's start, and the most rows of that length that fit into memory.
        length: tokens of each row in this step.
        device: that computes.
    """
    rows = config.local_batch_size * config.seq_length // length
    if device.type == "cpu":
        rows = min(rows, max(2, torch.get_num_threads()) * _TOKENS // length)
    return max(1, rows)
