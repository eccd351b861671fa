"""The files beside saved weights: the model's shape, the run's settings, the tokenizer."""

import shutil
from dataclasses import asdict
from pathlib import Path

from gptbert.config import ModelConfig, TrainConfig
from gptbert.io.json_file import write_json

MODEL_CONFIG = "model_config.json"
TRAIN_CONFIG = "train_config.json"
TOKENIZER = "tokenizer.json"  # in a run's folder too


def write_settings(folder: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """Write the model's shape, the run's settings, and the tokenizer that the run's folder holds."""
    write_json(folder / MODEL_CONFIG, asdict(model_config))
    write_json(folder / TRAIN_CONFIG, config.to_dict())
    shutil.copyfile(config.run_dir / TOKENIZER, folder / TOKENIZER)
