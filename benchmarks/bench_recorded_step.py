"""What is left to the host of a recorded step: rows to the device, masking, scales, and what the graphs read.

The replays are replaced by nothing, so this measures a GPU's host on a CPU. The bar is 2 ms.
"""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_train_step import Case, random_trainer, training
from gptbert.config import ModelConfig
from gptbert.data import objectives
from gptbert.distributed.world import World
from gptbert.training.cuda_graph import Recorded

STEPS = 40
README_MODEL = ModelConfig.from_json("configs/base_32k.json")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize("masking", ["pytorch", "none"])
@pytest.mark.parametrize("rows", [32, 256])
def test_host(benchmark: BenchmarkFixture, rows: int, masking: str) -> None:
    """One step of a hybrid with rows of 128 tokens.

    Args:
        benchmark: pytest-benchmark's.
        rows: per step.
        masking: "pytorch": computed, with PyTorch; "none": left out, as it is a single launch on a GPU.
    """
    config = training(Case("hybrid", 128, rows), steps=STEPS, compile=False, cuda_graph="on")
    model_config = dataclasses.replace(README_MODEL, **TINY)  # the model is not run
    trainer = random_trainer(config, model_config, World(0, 1, torch.device("cpu")))
    loaded = [trainer.loader.load(step) for step in range(STEPS)]
    steps = iter(range(10**9))

    def step() -> None:
        trainer.step = next(steps) % STEPS
        trainer.train_step(loaded[trainer.step])

    span_mask = objectives.span_mask if masking == "pytorch" else lambda tokens, **_: (tokens, tokens)
    with patch.object(Recorded, "__call__", lambda _: None), patch.object(objectives, "span_mask", span_mask):
        benchmark.pedantic(step, rounds=200, warmup_rounds=5)
    if benchmark.stats:
        benchmark.extra_info["ms"] = 1e3 * benchmark.stats["median"]
