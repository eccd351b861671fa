"""`python -m gptbert.import_hf SOURCE OUT`: published weights as a folder to start a run from."""

import dataclasses
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import MODEL_CONFIG, TOKENIZER, TRAIN_CONFIG
from gptbert.checkpoint.weights import fitting, write_weights
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.errors import InputError, first_line
from gptbert.io.files import new_folder
from gptbert.io.json_file import read_object, write_json
from gptbert.io.torch_file import load_torch_file
from gptbert.text.tokenizer import load_tokenizer

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class ImportConfig:
    """Convert published weights to a folder for --initial_weights.

    `generate`, `fill_mask`, `score`, `evaluate` and `export` read it too.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A folder for Hugging Face's transformers, from `gptbert.export` or as published by upstream (config.json,
    tokenizer.json and weights), or a file of weights that upstream's script wrote (.bin)."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder to write; must not exist yet."""
    config_file: Path | None = None
    """JSON file with the model's shape, if it is not config.json next to the weights."""
    tokenizer_path: Path | None = None
    """Tokenizer JSON file, if it is not tokenizer.json next to the weights."""


def import_hf(config: ImportConfig) -> None:
    """Write the folder.

    Raises:
        InputError: a file is missing, damaged, or of a different kind of model; or the output cannot be written.
    """
    weights_file, folder = find_weights(config.source)
    config_file = config.config_file or folder / "config.json"
    tokenizer_path = config.tokenizer_path or folder / "tokenizer.json"
    for flag, path in (("--config_file", config_file), ("--tokenizer_path", tokenizer_path)):
        if not path.is_file():
            raise InputError(f"{path}: no such file; name the one that goes with {weights_file} with {flag}")
    model_config = read_shape(config_file)
    vocab_size = load_tokenizer(tokenizer_path).get_vocab_size()
    if vocab_size > model_config.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer_path} has {vocab_size} tokens, more than vocab_size {model_config.vocab_size} in "
            f"{config_file}"
        )
    model, ema, left_out = read_published(weights_file, model_config)
    with new_folder(config.output, "OUTPUT") as written:
        for name, weights in (("model", model), ("ema", ema)):
            write_weights(written / f"{name}.safetensors", weights, model_config)
        for name, content in (
            (MODEL_CONFIG, asdict(model_config)),
            (TRAIN_CONFIG, {"name": config.source.absolute().name}),
        ):
            write_json(written / name, content)
        shutil.copyfile(tokenizer_path, written / TOKENIZER)
        manifest.write(written)
    note = f", without {', '.join(left_out[:3])}{' and others' if len(left_out) > 3 else ''}" if left_out else ""
    print(f"wrote {weights_file} to {config.output}{note}; train_distributed.py --initial_weights {config.output}")


def find_weights(source: Path) -> tuple[Path, Path]:
    """The file of weights that `source` names, and its folder.

    Raises:
        InputError: there are no weights.
    """
    if source.is_file():
        return source, source.parent
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder")
    if (source / MODEL_CONFIG).is_file() or (source / "checkpoints").is_dir():
        raise InputError(f"{source}: is a run or checkpoint of this trainer: --initial_weights takes it as it is")
    for name in _WEIGHT_FILES:
        if (source / name).is_file():
            return source / name, source
    raise InputError(f"{source}: holds neither {' nor '.join(_WEIGHT_FILES)}; name the file of weights")


def read_shape(path: Path) -> ModelConfig:
    """A model's shape from a config.json; unrelated keys are ignored.

    Raises:
        InputError: the file cannot be read, a key is missing, or a value is invalid.
    """
    values = read_object(path)
    return ModelConfig.from_values(
        {field.name: values[field.name] for field in dataclasses.fields(ModelConfig) if field.name in values}, path
    )


def read_published(file: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights and their average under the model's own names, fp32, and the names of tensors foreign to a GPT-BERT.

    The average is the weights themselves if the file has none. Heads for other tasks (`head.…`) are omitted.

    Raises:
        InputError: the file is damaged, or its model is not the one that `config` describes.
    """
    read, left_out = [], []
    try:
        for state in _states(load_file(file) if file.suffix == ".safetensors" else load_torch_file(file)):
            left_out = [name for name in state if name.startswith("head.")]
            weights = fitting({name: state[name] for name in state if name not in left_out}, config)
            read.append({name: tensor.float() for name, tensor in weights.items()})
    except (InputError, SafetensorError, OSError) as error:
        raise InputError(f"{file}: {first_line(error)}") from error
    return read[0], read[-1], left_out


def _states(content: Any) -> list[dict[str, Tensor]]:
    """The weights in a file: alone, or from an upstream training state, followed by their average."""
    if not isinstance(content, dict):
        raise InputError("expected a dictionary of weights")
    states = [content[key] for key in ("model", "ema_model") if isinstance(content.get(key), dict)] or [content]
    for name, tensor in [item for state in states for item in state.items()]:
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{str(name)[:100]} is no tensor with a name; expected a dictionary of weights")
    return states


if __name__ == "__main__":
    run_command(ImportConfig, import_hf)
