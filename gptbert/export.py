"""`python -m gptbert.export RUN OUT`: a folder that Hugging Face's transformers loads."""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import jinja2
import tyro
from safetensors.torch import save_file
from torch import Tensor

from gptbert import huggingface
from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import (
    list_word_checkpoints,
    newest_in,
    run_dir_of,
    saved_step,
    settings_if_any,
    tokenizer_of,
)
from gptbert.checkpoint.saved_model import note_on_average, read_full_weights, require_weights, tokens_seen
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.errors import InputError, prefix_errors
from gptbert.huggingface.tokenizer_files import write_tokenizer_files
from gptbert.io.json_file import read_object, write_json
from gptbert.io.names import MANIFEST, MEASURES, METRICS, MODEL_CONFIG, RUN_CONFIG, WORDS
from gptbert.io.outputs import new_folder
from gptbert.io.screen import log
from gptbert.monitoring.records import read_records
from gptbert.text.special_tokens import BOS_ID, EOS_ID, MASK_ID, PAD_ID
from gptbert.text.tokenizer import load_tokenizer, ordinary_ids
from gptbert.upstream import TIED_WEIGHT, to_upstream

CLASSES = {
    "AutoModel": "GPTBertModel",
    "AutoModelForMaskedLM": "GPTBertForMaskedLM",
    "AutoModelForCausalLM": "GPTBertForCausalLM",
    "AutoModelForSequenceClassification": "GPTBertForSequenceClassification",
    "AutoModelForTokenClassification": "GPTBertForTokenClassification",
    "AutoModelForQuestionAnswering": "GPTBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "GPTBertForMultipleChoice",
}
_CODE = Path(huggingface.__file__).parent
_CODE_FILES = tuple(f"{name}_gptbert.py" for name in ("configuration", "layers", "heads", "pretrained", "modeling"))
# of each flag for the model card: its pattern and what it is, as Hugging Face's hub accepts them
_METADATA = {
    "license": (r"[a-z0-9]+([.-][a-z0-9]+)*", "a name in lower case such as apache-2.0, mit, cc-by-4.0 or other"),
    "language": (
        r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code",
        "codes of two or three letters such as en nb, one after the other, or multilingual",
    ),
    "datasets": (r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", "names on Hugging Face's hub such as USER/CORPUS"),
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as a folder for Hugging Face's transformers, 4.51 and newer.

    The folder has weights, tokenizer, code for `trust_remote_code=True` and a model card, README.md.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, for its newest checkpoint, or a checkpoint's folder."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder to write; must not exist yet."""
    weights: Literal["ema", "model"] = "ema"
    """ema: the weights' moving average. model: the weights themselves."""
    shift_masked_logits: bool = True
    """Whether AutoModelForMaskedLM returns the scores of token t at position t, as users of masked language models
    expect. False: at the position before, where the model computes them, for evaluations that shift by themselves
    ("mntp" in BabyLM's evaluation, whose "mlm" needs the default). Also a key of config.json."""
    babylm: bool = False
    """Write what BabyLM's evaluation reads of the published models: masked logits where the model computes them, for
    --backend mntp (and causal), and the checkpoints by words, if the run has any (as with --words)."""
    words: bool = False
    """Export the run's checkpoints by words as well (--checkpoint_words), into output/chck_1M, output/chck_2M and so
    on; published, each becomes the branch of that name."""
    license: str | None = None
    """The weights' licence on the model card, as Hugging Face writes it, such as apache-2.0, cc-by-4.0 or other."""
    language: tuple[str, ...] = ()
    """Codes of the texts' languages on the model card, such as en nb, or multilingual."""
    datasets: tuple[str, ...] = ()
    """Hugging Face's names of the training data on the model card, such as USER/CORPUS."""

    def __post_init__(self) -> None:
        for flag, values in self.metadata.items():
            pattern, expected = _METADATA[flag]
            for value in [values] if isinstance(values, str) else values:
                if not re.fullmatch(pattern, value):
                    raise InputError(f"--{flag} {value!r}: expected {expected}")

    @property
    def metadata(self) -> dict[str, str | tuple[str, ...]]:
        """What the command line says of licence, languages and data."""
        given = {"license": self.license, "language": self.language, "datasets": self.datasets}
        return {flag: value for flag, value in given.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Origin:
    """The provenance of a checkpoint.

    Attributes:
        checkpoint: its folder.
        train: the run's settings.
        run: contents of the run's config.json: hardware, world_size, versions; empty if missing.
        records: the run's records up to this checkpoint, oldest first; empty if missing.
        step: the checkpoint's step, or None if unknown.
        words: words seen, or None if not counted.
    """

    checkpoint: Path
    train: dict[str, Any]
    run: dict[str, Any]
    records: list[dict[str, Any]]
    step: int | None
    words: float | None

    @classmethod
    def of(cls, checkpoint: Path) -> "Origin":
        """Collect it from a checkpoint's folder, in its run's folder or anywhere else; by content, not by names."""
        run_dir, step = run_dir_of(checkpoint), saved_step(checkpoint)
        records = read_records(run_dir / METRICS) if run_dir and step is not None else []
        return cls(
            checkpoint,
            settings_if_any(checkpoint),
            read_object(run_dir / RUN_CONFIG) if run_dir else {},
            [record for record in records if record["step"] <= step],
            step,
            _words_of(checkpoint),
        )


def _words_of(checkpoint: Path) -> float | None:
    """The words that a checkpoint has seen; None if it does not say."""
    words = read_object(checkpoint / WORDS).get("words") if (checkpoint / WORDS).is_file() else None
    return words if _is_number(words) else None


def export(config: ExportConfig) -> None:
    """Write the folder.

    Raises:
        InputError: the checkpoint is missing or damaged, or the output cannot be written.
    """
    checkpoint = newest_in(config.run)
    shift = config.shift_masked_logits and not config.babylm
    by_words = []
    if config.words or config.babylm:
        by_words = sorted(map(newest_in, list_word_checkpoints(config.run)), key=lambda path: _words_of(path) or 0)
        if config.words and not by_words:
            raise InputError(f"--words: {config.run} has no checkpoints by words (train with --checkpoint_words)")
    with new_folder(config.output, "OUTPUT") as folder:
        write_export(checkpoint, folder, config.weights, shift, config.metadata)
        for path in by_words:
            (folder / path.name).mkdir()
            write_export(path, folder / path.name, config.weights, shift, config.metadata)
    print(f"wrote {checkpoint} ({config.weights} weights) to {config.output}")
    if by_words:
        print(f"and {len(by_words)} checkpoints by words, {by_words[0].name} to {by_words[-1].name}, into it")
    right, wrong, where = ("mlm", "mntp", "its own") if shift else ("mntp", "mlm", "the previous")
    print(
        f"masked logits of a token are at {where} position: BabyLM's evaluation needs --backend {right} (or causal); "
        f"{wrong} would read those of another token"
    )
    for path in (checkpoint, *by_words) if config.weights == "ema" else ():
        if note := note_on_average(path):
            log(f"{path.name}: {note}")
            break  # the same is true of all folders by words up to some number


def write_export(
    checkpoint: Path,
    folder: Path,
    weights: str = "ema",
    shift_masked_logits: bool = True,
    metadata: Mapping[str, str | tuple[str, ...]] = MappingProxyType({}),
) -> None:
    """Fill a folder with the files that transformers loads.

    Args:
        checkpoint: a checkpoint's folder.
        folder: exists, and is empty.
        weights: "ema" or "model".
        shift_masked_logits: see `ExportConfig`.
        metadata: see `ExportConfig.metadata`.

    Raises:
        InputError: the checkpoint is damaged.
        OSError: writing fails.
    """
    config = ModelConfig.from_json(checkpoint / MODEL_CONFIG)
    save_file(published_weights(checkpoint, weights, config), folder / "model.safetensors", metadata={"format": "pt"})
    origin = Origin.of(checkpoint)
    tokenizer = load_tokenizer(tokenizer_of(checkpoint))
    longest = max(config.max_position_embeddings, int(_number(origin.train, "seq_length")))
    write_tokenizer_files(tokenizer, folder, longest)
    for name in _CODE_FILES:
        shutil.copyfile(_CODE / name, folder / name)
    never = sorted(set(range(config.vocab_size)).difference(ordinary_ids(tokenizer)))
    special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    files = {
        "config.json": {
            "model_type": "gptbert",
            "architectures": [CLASSES["AutoModelForMaskedLM"]],
            "auto_map": {"AutoConfig": "configuration_gptbert.GPTBertConfig"}
            | {auto: f"modeling_gptbert.{name}" for auto, name in CLASSES.items()},
            **asdict(config),
            **special,
            "mask_token_id": MASK_ID,
            "tie_word_embeddings": True,
            "shift_masked_logits": shift_masked_logits,
            "masked_logits_alignment": "token" if shift_masked_logits else "previous",
            "tokenizer_class": "PreTrainedTokenizerFast",  # without it pipelines of transformers 4.51 to 4.53 have none
            "torch_dtype": "float32",
        },
        "generation_config.json": {**special, "suppress_tokens": never},  # as in gptbert.generate
    }
    for name, content in files.items():
        write_json(folder / name, content)
    card = model_card(origin, config, weights, shift_masked_logits, folder.name, metadata)
    (folder / "README.md").write_text(card, encoding="utf-8")


def published_weights(checkpoint: Path, weights: str, config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's weights under the published names, the tied one once, as transformers writes them, in fp32."""
    require_weights(checkpoint, weights, "; --weights {other} exports that")
    with prefix_errors(str(checkpoint)):
        published = to_upstream(read_full_weights(checkpoint, weights, config))
    del published[TIED_WEIGHT]
    return {name: tensor.float().contiguous() for name, tensor in published.items()}


def model_card(
    origin: Origin,
    config: ModelConfig,
    weights: str,
    shift: bool,
    name: str,
    metadata: Mapping[str, str | tuple[str, ...]] = MappingProxyType({}),
) -> str:
    """README.md of an exported folder, from what is known about the run and `ExportConfig.metadata`."""
    markdown = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701  no HTML
    template = markdown.from_string((_CODE / "card.md.jinja").read_text(encoding="utf-8"))
    prefix = "validation_ema" if weights == "ema" else "validation"
    validated = [record for record in origin.records if f"{prefix}/mlm/loss" in record]
    losses, losses_origin = [], ""
    if validated:
        for key, objective in (("mlm", "masked"), ("clm", "causal")):
            values = [validated[-1].get(f"{prefix}/{key}/{metric}") for metric in MEASURES]
            if all(map(_is_number, values)):
                losses.append((objective, *values))
        losses_origin = f"On {_name_of(origin.train.get('valid_path'))}, after step {validated[-1]['step']:,}."
    is_average = weights == "ema" and not _are_one(origin.checkpoint)
    own_name, last = origin.train.get("name"), int(_number(origin.train, "max_steps"))
    return template.render(
        metadata=metadata,
        name=own_name if isinstance(own_name, str) and own_name else name,
        num_parameters=config.num_parameters,
        vocab_size=config.vocab_size,
        step=origin.step,
        words=origin.words,
        max_steps=last if last >= (origin.step or 0) else 0,
        weights_name="the weights' moving average" if is_average else "the weights themselves",
        shift=shift,
        facts=list(_facts(origin).items()),
        losses=losses,
        losses_origin=losses_origin,
    )


def _are_one(checkpoint: Path) -> bool:
    """Whether the weights and their average are the same, by the manifest: imported weights have no average."""
    entries = manifest.read(checkpoint) if (checkpoint / MANIFEST).is_file() else {}
    return "ema.safetensors" in entries and entries["ema.safetensors"] == entries.get("model.safetensors")


def _facts(origin: Origin) -> dict[str, str]:
    """Rows of the card's table; unknown facts are omitted."""
    train, run = origin.train, origin.run
    recorded = (record["train/tokens"] for record in reversed(origin.records) if "train/tokens" in record)
    tokens = tokens_seen(origin.checkpoint) or next(recorded, None)
    processes = run.get("world_size")
    growth = ", and longer ones at the end" if train.get("seq_length_growth") else ""
    facts = {
        "data": _data(train),
        "tokens seen": f"{tokens:,}" if _is_number(tokens) and tokens else "",
        "masked share": _said(train, "{hybrid_numerator}/{hybrid_denominator}, the rest causal"),
        "rows in a step": _said(train, "{global_batch_size} at the end, of {seq_length} tokens" + growth),
        "optimizer": _said(train, "{optimizer}, learning rate {learning_rate}, weight decay {weight_decay}"),
        "masked tokens": _said(train, "{mask_p_start} of them at first, {mask_p_end} at the end"),
        "precision": {True: "bf16 autocast, fp32 weights", False: "fp32"}.get(train.get("mixed_precision"), ""),  # type: ignore[arg-type]  # None is no key
        "seed": _said(train, "{seed}"),
        "hardware": _said(run, "{hardware}, {world_size} process") + ("es" if processes != 1 else ""),
        "software": _said(run, "torch {torch}"),
    }
    facts["hardware"] = facts["hardware"] if _said(run, "{hardware}{world_size}") else ""
    return {name: value for name, value in facts.items() if value}


def _said(settings: dict[str, Any], sentence: str) -> str:
    """A sentence with settings in it; empty if one of them is unknown."""
    try:
        return sentence.format_map(
            {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
        )
    except KeyError:
        return ""


def _number(settings: dict[str, Any], name: str) -> float:
    """A setting that is a number; 0 if it is unknown."""
    return settings[name] if _is_number(settings.get(name)) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _data(train: dict[str, Any]) -> str:
    """Names of the token files, with their weights if given."""
    paths, weights = (train.get(name) or [] for name in ("train_path", "train_weights"))
    names = [_name_of(path) for path in (paths if isinstance(paths, list) else [paths])]
    if isinstance(weights, list) and len(weights) == len(names) > 1 and all(map(_is_number, weights)):
        return ", ".join(f"{name} (weight {weight:g})" for name, weight in zip(names, weights, strict=True))
    return ", ".join(names)


def _name_of(path: Any) -> str:
    return Path(path).name if isinstance(path, str) else "?"


def main() -> None:
    """Entry point."""
    run_command(ExportConfig, export)


if __name__ == "__main__":
    main()
