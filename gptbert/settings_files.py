"""The settings that lie beside saved weights: the model's shape, the run's settings, the tokenizer."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptbert.config import ModelConfig, TrainConfig


def write_settings(folder: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """Write the model's shape, the run's settings, and the tokenizer that the run's folder holds."""
    write_json(folder / "model_config.json", asdict(model_config))
    write_json(folder / "train_config.json", config.to_dict())
    shutil.copyfile(config.run_dir / "tokenizer.json", folder / "tokenizer.json")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as people can read it."""
    path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
