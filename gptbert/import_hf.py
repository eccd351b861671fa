"""`python -m gptbert.import_hf SOURCE OUT`: published weights as a folder to start a run from.

`load_model` loads them, or a model of this trainer, in Python.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tokenizers import Tokenizer
from torch import Tensor

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import differences
from gptbert.checkpoint.foreign import find_weights, index_of, read_foreign
from gptbert.checkpoint.weights import fitting, write_weights
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.errors import InputError, listed
from gptbert.huggingface.tokenizer_files import check_tokenizer_files
from gptbert.io.json_file import read_object, write_json
from gptbert.io.names import CHECKPOINTS, MODEL_CONFIG, TOKENIZER, TRAIN_CONFIG
from gptbert.io.outputs import new_folder
from gptbert.io.screen import log
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.tokenizer import load_tokenizer, tokenizer_hash
from gptbert.upstream import TIED_WEIGHT

_ROLES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}
_OTHER_KEYS = {"num_layers": "num_hidden_layers"}  # of BabyLM's baselines of 2025, whose code reads both
_CONFIGS = ("config.json", MODEL_CONFIG)  # beside the weights
_MOST_NAMED = 20  # keys that are left out


@dataclass(frozen=True)
class ImportConfig:
    """Convert published weights to a folder for --initial_weights.

    `generate`, `fill_mask`, `score`, `evaluate` and `export` read it too.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder for Hugging Face's transformers, from `gptbert.export` or as published by upstream or for BabyLM
    (config.json, tokenizer.json and weights), or a file of weights: safetensors or torch.save, alone or in a training
    state, with the prefixes of any wrappers."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder to write; must not exist yet."""
    config_file: Path | None = None
    """JSON file with the model's shape, if it is not config.json next to the weights."""
    tokenizer_path: Path | None = None
    """Tokenizer JSON file, if it is not tokenizer.json next to the weights."""
    weights_key: str | None = None
    """Which weights to take from a file that holds several: the keys that lead to them, with dots."""


def import_hf(config: ImportConfig) -> None:
    """Write the folder, and say so; raises as `convert`."""
    print(convert(config))


def convert(config: ImportConfig) -> str:
    """Write the folder.

    Returns:
        What was written, in a line.

    Raises:
        InputError: a file is missing, damaged, contradicts another, or is of a different kind of model; or the output
            cannot be written.
    """
    files, folder = find_files(config.source)
    config_file = config.config_file or _beside(folder, _CONFIGS)
    tokenizer_path = config.tokenizer_path or folder / "tokenizer.json"
    for flag, path in (("--config_file", config_file), ("--tokenizer_path", tokenizer_path)):
        if not path.is_file():
            raise InputError(f"{path}: no such file; name the one that goes with {files[0]} with {flag}")
    model_config = read_shape(config_file)
    tokenizer = load_tokenizer(tokenizer_path)
    check_tokenizer(tokenizer, tokenizer_path, model_config, config_file)
    check_tokenizer_files(tokenizer, tokenizer_path)
    other = folder / "tokenizer.json"
    if other.is_file() and tokenizer_hash(other) != tokenizer_hash(tokenizer_path):
        log(f"--tokenizer_path {config.tokenizer_path} is taken, not {other}, which is another one")
    for other in [folder / name for name in _CONFIGS if config.config_file]:
        with suppress(InputError):  # the flag may be given because the file beside the weights is of no use
            if other.is_file() and (changes := differences(read_shape(other), model_config)):
                log(f"--config_file {config_file} is taken, not {other}, which differs: {changes}")
    foreign = read_foreign(files, config.weights_key)
    check_tied(config_file, foreign.model)
    both = ((foreign.model, foreign.model_keys), (foreign.ema, foreign.ema_keys))
    read = [_fitting(*weights, model_config, files[0], config_file) for weights in both]
    with new_folder(config.output, "OUTPUT") as written:
        for name, weights in zip(("model", "ema"), read, strict=True):
            write_weights(written / f"{name}.safetensors", weights, model_config)
        for name, content in (
            (MODEL_CONFIG, asdict(model_config)),
            (
                TRAIN_CONFIG,
                {"name": config.source.resolve().stem if config.source.is_file() else config.source.resolve().name},
            ),
        ):
            write_json(written / name, content)
        shutil.copyfile(tokenizer_path, written / TOKENIZER)
        manifest.write(written)
    left_out = foreign.left_out
    note = f", without {listed(left_out, _MOST_NAMED)}" if left_out else ""
    return f"wrote {files[0]} to {config.output}{note}; train_distributed.py --initial_weights {config.output}"


def find_files(source: Path) -> tuple[list[Path], Path]:
    """The files of weights that `source` names, and their folder.

    Raises:
        InputError: there are no weights.
    """
    if source.is_file():
        if (index := index_of(source)) and index.is_file():
            raise InputError(f"{source}: is a part of the weights; name {index}, or the folder")
        return [source], source.parent
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder")
    if (source / MODEL_CONFIG).is_file() or (source / CHECKPOINTS).is_dir():
        raise InputError(f"{source}: is a run or checkpoint of this trainer: --initial_weights takes it as it is")
    return find_weights(source), source


def read_shape(path: Path) -> ModelConfig:
    """A model's shape from a config.json; unrelated keys are ignored.

    Raises:
        InputError: the file cannot be read, a key is missing, a value is invalid, or two keys contradict each other.
    """
    values = read_object(path, unique_keys=True)
    for other, key in _OTHER_KEYS.items():
        if other in values and values.setdefault(key, values[other]) != values[other]:
            raise InputError(f"{path}: {key} {values[key]} and {other} {values[other]} are the same, and differ")
    return ModelConfig.from_values(
        {field.name: values[field.name] for field in dataclasses.fields(ModelConfig) if field.name in values}, path
    )


def check_tokenizer(tokenizer: Tokenizer, path: Path, model_config: ModelConfig, config_file: Path) -> None:
    """Compare what the tokenizer and the model's config.json both say: the vocabulary, and ids of special tokens.

    Raises:
        InputError: they differ; names both.
    """
    if tokenizer.get_vocab_size() > model_config.vocab_size:
        raise InputError(
            f"tokenizer {path} has {tokenizer.get_vocab_size()} tokens, more than vocab_size {model_config.vocab_size} "
            f"in {config_file}"
        )
    values = read_object(config_file)
    for role, token in _ROLES.items():
        said, has = values.get(f"{role}_token_id"), tokenizer.token_to_id(token)
        said_ids = said if isinstance(said, list) else [said]  # of transformers' `eos_token_id`
        if said is not None and has is not None and has not in said_ids:
            raise InputError(
                f"{config_file} says {role}_token_id {said}, and tokenizer {path} gives {token} the id {has}"
            )


def check_tied(config_file: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse a model whose embedding and output layer are two weights, of which its file has only one.

    Raises:
        InputError: `tie_word_embeddings` is false; weights that are both there are compared elsewhere.
    """
    if read_object(config_file).get("tie_word_embeddings") is False and TIED_WEIGHT not in weights:
        raise InputError(
            f"{config_file}: tie_word_embeddings is false, and the weights have no {TIED_WEIGHT}; a GPT-BERT has one "
            "weight for embedding and output"
        )


def _fitting(
    published: dict[str, Tensor], keys: Mapping[str, str], config: ModelConfig, file: Path, config_file: Path
) -> dict[str, Tensor]:
    """Weights under the model's own names, fp32."""
    try:
        return {name: tensor.float() for name, tensor in fitting(published, config, keys).items()}
    except InputError as error:
        raise InputError(f"{file}: {error} (shape by {config_file})") from error


def _beside(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there, or the first name; they must say the same of the model's shape."""
    there = [folder / name for name in names if (folder / name).is_file()]
    shapes = [read_shape(file) for file in there]
    for file, shape in zip(there[1:], shapes[1:], strict=True):
        if changes := differences(shapes[0], shape):
            raise InputError(
                f"{there[0]} and {file.name} differ: {changes}; name the one that is meant (--config_file)"
            )
    return there[0] if there else folder / names[0]


def load_model(
    path: str | Path, weights: Literal["ema", "model"] = "ema", device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
) -> TrainedModel:
    """Load a trained model and its tokenizer, in Python.

    Args:
        path: a run's folder, for its newest checkpoint; a checkpoint's; or one for transformers, from `gptbert.export`
            or as published, whose weights pass through a temporary folder.
        weights: "ema" for the moving average of the weights, "model" for the weights themselves.
        device: "auto" for a GPU if there is one.

    Raises:
        InputError: a model is missing, damaged or of a different kind, or the device does not exist.
    """
    devices = ("auto", "cuda", "mps", "cpu")
    for name, value, choices in (("weights", weights, ("ema", "model")), ("device", device, devices)):
        if value not in choices:
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    choice = ModelChoice(run=Path(path), weights=weights, device=device)
    run = choice.run
    if (run / "config.json").is_file() and not (run / MODEL_CONFIG).is_file() and not (run / CHECKPOINTS).is_dir():
        return load_converted(choice)
    trained = TrainedModel.load(choice)
    trained.explain()
    return trained


def load_converted(choice: ModelChoice) -> TrainedModel:
    """Load a model from a folder for transformers, by way of a temporary folder.

    Raises:
        InputError: see `convert` and `TrainedModel.load`.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, choice.run.resolve().name)
        convert(ImportConfig(choice.run, converted))
        trained = TrainedModel.load(dataclasses.replace(choice, run=converted))
    return dataclasses.replace(trained, path=choice.run)


def main() -> None:
    """Entry point."""
    run_command(ImportConfig, import_hf)


if __name__ == "__main__":
    main()
