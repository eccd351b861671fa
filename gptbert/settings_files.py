"""The settings that lie beside saved weights: the model's shape, the run's settings, the tokenizer."""

import shutil
from dataclasses import asdict
from pathlib import Path

from gptbert.config import ModelConfig, TrainConfig
from gptbert.json_file import write_json


def write_settings(folder: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """Write the model's shape, the run's settings, and the tokenizer that the run's folder holds."""
    write_json(folder / "model_config.json", asdict(model_config))
    write_json(folder / "train_config.json", config.to_dict())
    shutil.copyfile(config.run_dir / "tokenizer.json", folder / "tokenizer.json")
