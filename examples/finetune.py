"""Fine-tune an exported model with transformers' Trainer: to classify or rate texts or pairs of them, or to tag words.

    python -m gptbert.export checkpoints/RUN exported
    python examples/finetune.py --task classify --model exported --train train.jsonl --validation valid.jsonl \
        --output classifier

A line of data is `{"text": "…", "label": "…"}`, and of pairs also has `"text_pair": "…"`; with `--task regress`, labels
are numbers; with `--task tag`, it is `{"words": ["…", …], "tags": ["…", …]}`. Files with other fields, such as GLUE's
and BabyLM's, are read as they are with `--text_fields`. The output loads with `AutoModelForSequenceClassification` or
`AutoModelForTokenClassification`, and in `pipeline`.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import tyro

try:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        EarlyStoppingCallback,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainingArguments,
        set_seed,
    )
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install transformers accelerate")

IGNORE_INDEX = -100
METRICS = {  # of each task, the default one first
    "classify": ("accuracy", "f1", "mcc", "loss"),
    "regress": ("pearson", "spearman", "loss"),
    "tag": ("accuracy", "loss"),
}


class InputError(Exception):
    """A flag or a line of data cannot be used; the message says which, in one line."""


@dataclass(frozen=True)
class Settings:
    """Fine-tune a classifier of texts, a rater of texts or a tagger of words."""

    task: Literal["classify", "regress", "tag"]
    """classify: one label per text or pair. regress: one number. tag: one label per word."""
    model: str
    """An exported folder, or the name it was published under."""
    train: Path
    """JSONL of texts and labels, or of words and tags."""
    validation: Path
    """The same, to choose the best epoch."""
    output: Path
    """New folder: the model and results.json; of several seeds, a model each in seed_1, seed_2 and so on."""
    text_fields: tuple[str, ...] = ()
    """Fields of the text and of its pair, or templates such as "Question: {question} Answer: {answer}". Default: text,
    and text_pair if there is one."""
    label_field: str = "label"
    """Field of the label."""
    epochs: int = 10
    """Passes over the training data."""
    patience: int = 0
    """End early, after this many epochs without a better one; 0: never."""
    metric: Literal["accuracy", "f1", "mcc", "pearson", "spearman", "loss"] | None = None
    """What the best epoch is chosen by, on the validation data. Default: accuracy, or with regress pearson."""
    batch_size: int = 32
    """Lines per step."""
    learning_rate: float = 5e-5
    """Peak, after a warmup of 6 %; it falls linearly. LoRA takes a higher one, such as 5e-4."""
    max_length: int = 512
    """Texts are truncated to this many tokens; of a pair, the longer text first."""
    causal: bool = False
    """Attend only to earlier tokens, and classify a text by its last one: GPT-BERT's causal mode."""
    lora: int = 0
    """Train low-rank adapters of this rank and the new head only, with peft; 0: all weights."""
    seeds: tuple[int, ...] = (42,)
    """Train once with each: the seed of the new head, dropout and the order of lines."""

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS[self.task]:
            raise InputError(f"--metric {self.metric}: --task {self.task} has {', '.join(METRICS[self.task])}")
        if len(self.text_fields) > 2:
            raise InputError(f"--text_fields: {len(self.text_fields)} of them, expected one, or two for pairs")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds: expected one or more numbers, each once")
        if min(self.patience, self.lora) < 0 or min(self.epochs, self.batch_size) < 1:
            raise InputError("--epochs and --batch_size are at least 1, --patience and --lora at least 0")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise InputError(f"--output {self.output}: exists; name a new folder")

    @property
    def best_by(self) -> str:
        """The metric that chooses the best epoch and the best seed."""
        return self.metric or METRICS[self.task][0]


def finetune(settings: Settings) -> dict[str, Any]:
    """Train once per seed, write the models and `results.json`, and return what the latter holds.

    Raises:
        InputError: a line of data, or a flag, cannot be used.
    """
    train, validation = read_jsonl(settings.train), read_jsonl(settings.validation)
    labels = labels_of(train, settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=True)
    if not settings.text_fields:
        has_pairs = any("text_pair" in line.fields for line in (*train, *validation))
        settings = replace(settings, text_fields=("text", "text_pair") if has_pairs else ("text",))

    def encode(line: Line) -> dict:
        if settings.task == "tag":
            return encode_words(tokenizer, line, labels, settings.max_length)
        return encode_text(tokenizer, line, labels, settings)

    data = {"train_dataset": list(map(encode, train)), "eval_dataset": list(map(encode, validation))}
    if settings.task == "tag" and not any(set(line["labels"]) - {IGNORE_INDEX} for line in data["eval_dataset"]):
        raise InputError(f"{settings.validation}: has no tag of the training data within --max_length")
    print(figures(data, tokenizer, settings.max_length))
    found, file = {}, settings.output / "results.json"
    settings.output.mkdir(parents=True, exist_ok=True)
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        raise InputError(f"--output {settings.output}: another process writes to it; name a new folder") from None
    try:
        for seed in settings.seeds:
            folder = settings.output / f"seed_{seed}" if len(settings.seeds) > 1 else settings.output
            found[seed] = train_once(settings, seed, folder, tokenizer, labels, data)
        results = {"settings": vars(settings), "labels": labels} | summary(found, settings.best_by)
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    except BaseException:
        file.unlink()
        raise
    return results


def figures(data: dict[str, list[dict]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """What would show a mistake in the data: validation on training's texts, texts that are cut, unknown tokens."""
    train, validation = ([tuple(line["input_ids"]) for line in lines] for lines in data.values())
    texts, trained_on = train + validation, set(train)
    repeated = np.mean([text in trained_on for text in validation])
    full = np.mean([len(text) >= max_length for text in texts])
    unknown = sum(text.count(tokenizer.unk_token_id) for text in texts) / sum(map(len, texts))
    return (
        f"{len(train):,} texts to train on and {len(validation):,} to validate on, of which {repeated:.1%} are "
        f"among the first; {full:.1%} of all fill --max_length or are cut; {unknown:.1%} unknown tokens"
    )


def train_once(
    settings: Settings,
    seed: int,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str],
    data: dict[str, list[dict]],
) -> dict[str, float]:
    """Train with one seed and write the best epoch's model to `folder`; returns that epoch and its metrics."""
    set_seed(seed)  # of the new head
    steps = settings.epochs * math.ceil(len(data["train_dataset"]) / settings.batch_size)
    collator = DataCollatorForTokenClassification if settings.task == "tag" else DataCollatorWithPadding
    metrics = {"classify": classification_metrics, "regress": regression_metrics, "tag": tagging_metrics}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="checkpoints_") as checkpoints:
        trainer = Trainer(
            model=new_model(settings, labels),
            args=TrainingArguments(
                output_dir=checkpoints,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                warmup_steps=round(0.06 * steps),
                weight_decay=0.01,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model=settings.best_by,
                greater_is_better=settings.best_by != "loss",
                label_names=["labels"],
                report_to="none",
                seed=seed,
            ),
            **data,
            data_collator=collator(tokenizer),
            compute_metrics=metrics[settings.task],
            callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience else [],
        )
        trainer.train()
        found = trainer.evaluate()
    best = f"eval_{settings.best_by}"
    epochs = [entry["epoch"] for entry in trainer.state.log_history if entry.get(best) == trainer.state.best_metric]
    if not epochs:
        raise InputError(f"training diverged: {settings.best_by} is not a number; --learning_rate is too high")
    model = trainer.model.merge_and_unload() if settings.lora else trainer.model
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return {"epoch": epochs[0]} | {name: found[f"eval_{name}"] for name in METRICS[settings.task]}


def new_model(settings: Settings, labels: list[str]) -> PreTrainedModel:
    """The exported model with a new head, and with adapters where these are asked for."""
    auto = AutoModelForTokenClassification if settings.task == "tag" else AutoModelForSequenceClassification
    if settings.task == "regress":
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        head = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    model = auto.from_pretrained(settings.model, trust_remote_code=True, is_decoder=settings.causal, **head)
    if not settings.lora:
        return model
    try:
        import peft  # noqa: PLC0415  only this needs it
    except ImportError:
        raise InputError("--lora needs peft: pip install peft") from None
    kind = "TOKEN_CLS" if settings.task == "tag" else "SEQ_CLS"
    adapters = {"r": settings.lora, "lora_alpha": 2 * settings.lora, "target_modules": "all-linear"}
    return peft.get_peft_model(model, peft.LoraConfig(task_type=kind, modules_to_save=["head"], **adapters))


@dataclass(frozen=True)
class Line:
    """A line of data: its fields, and where it is."""

    fields: dict[str, Any]
    where: str

    def text(self, name: str) -> str:
        """The text in a field."""
        if not isinstance(self.fields.get(name), str):
            raise self.error(name, "a text")
        return self.fields[name]

    def texts(self, name: str) -> list[str]:
        """The list of texts in a field."""
        texts = self.fields.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.error(name, "a list of texts")
        return texts

    def label(self, settings: Settings) -> str | float:
        """The label: a class's name, or with `--task regress` a number."""
        label, is_number = self.fields.get(settings.label_field), settings.task == "regress"
        if is_number and (isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label)):
            raise self.error(settings.label_field, "a number")
        if not is_number and not isinstance(label, str | int):
            raise self.error(settings.label_field, "a text or an integer (--task regress takes other numbers)")
        return float(label) if is_number else str(label)

    def error(self, name: str, expected: str) -> InputError:
        """An error that says what a field is, and what it should be."""
        has = f"is {json.dumps(self.fields[name])[:50]}" if name in self.fields else "is missing"
        return InputError(f"{self.where}: `{name}` {has}, expected {expected}")


def read_jsonl(path: Path) -> list[Line]:
    """All lines of a file, but for empty ones."""
    lines = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            fields = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise InputError(f"{path}:{number}: is no JSON ({error})") from None
        if isinstance(fields, dict):
            lines.append(Line(fields, f"{path}:{number}"))
        elif line.strip():
            raise InputError(f"{path}:{number}: is no JSON object")
    if not lines:
        raise InputError(f"{path}: has no lines")
    return lines


def labels_of(lines: list[Line], settings: Settings) -> list[str]:
    """The training data's labels, ordered as numbers if they are, else as words; none with `--task regress`."""
    if settings.task == "regress":
        return []
    if settings.task == "tag":
        found = {tag for line in lines for tag in line.texts("tags")}
    else:
        found = {line.label(settings) for line in lines}
    if len(found) < 2:
        raise InputError(f"{settings.train}: has {len(found)} different labels, expected at least 2")
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)


def encode_text(tokenizer: PreTrainedTokenizerBase, line: Line, labels: list[str], settings: Settings) -> dict:
    """The tokens of a text or a pair, `<s>` in front of each, and the label; GPT-BERT has no types of tokens."""
    texts = [filled(template, line) for template in settings.text_fields]
    length = {"truncation": "longest_first", "max_length": settings.max_length}
    encoding = tokenizer(*texts, **length, return_token_type_ids=False)
    label = line.label(settings)
    if labels and label not in labels:
        raise line.error(settings.label_field, f"a label of the training data ({', '.join(labels[:10])})")
    return {**encoding, "labels": labels.index(label) if labels else label}


def filled(template: str, line: Line) -> str:
    """The text of the field of this name; or of a template, with the fields that it names in braces."""
    if "{" not in template:
        return line.text(template)
    return re.sub(r"\{([^{}]*)\}", lambda name: line.text(name[1]), template)


def encode_words(tokenizer: PreTrainedTokenizerBase, line: Line, tags: list[str], max_length: int) -> dict:
    """A sentence's tokens, and as labels the tag of each word on its first token, −100 elsewhere.

    The words are joined by spaces, as in the model's training: word tokens include the preceding space. A tag that the
    training data lacks is not a label.
    """
    words, own_tags = line.texts("words"), line.texts("tags")
    if len(words) != len(own_tags):
        raise InputError(f"{line.where}: has {len(words)} words and {len(own_tags)} tags")
    encoding = tokenizer(" ".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True)
    ends = [end for _, end in encoding.pop("offset_mapping")]
    labels, token, start = [IGNORE_INDEX] * len(ends), 0, 0
    for word, tag in zip(words, own_tags, strict=True):
        while token < len(ends) and ends[token] <= start:
            token += 1
        if token < len(ends) and tag in tags:
            labels[token] = tags.index(tag)
        start += len(word) + 1
    return {**encoding, "labels": labels}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of the likeliest labels.

    F1 is that of the last of two labels, such as 1 of 0 and 1, and the mean over the labels where there are more.
    """
    classes = prediction.predictions.shape[-1]
    counts = np.zeros((classes, classes))  # [label, prediction]
    np.add.at(counts, (prediction.label_ids, prediction.predictions.argmax(-1)), 1)
    right, labels, predictions, total = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    f1 = 2 * right / np.maximum(labels + predictions, 1)
    spread = math.sqrt((total**2 - (labels**2).sum()) * (total**2 - (predictions**2).sum()))
    return {
        "accuracy": float(right.sum() / total),
        "f1": float(f1[1] if classes == 2 else f1.mean()),
        "mcc": float((right.sum() * total - labels @ predictions) / spread) if spread else 0.0,
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson's correlation of predictions and labels, and Spearman's, which is Pearson's of their ranks."""
    both = np.stack([prediction.predictions.reshape(-1), prediction.label_ids.reshape(-1)]).astype(float)
    return {"pearson": correlation(both), "spearman": correlation(np.stack([ranks(values) for values in both]))}


def correlation(both: np.ndarray) -> float:
    """Of two rows of numbers; 0 if those of one row are all the same."""
    return float(np.corrcoef(both)[0, 1]) if (both.min(1) < both.max(1)).all() else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Each number's place in their order; equal ones share the mean of their places."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def tagging_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of words whose likeliest tag is correct."""
    labeled = prediction.label_ids != IGNORE_INDEX
    right = prediction.predictions.argmax(-1)[labeled] == prediction.label_ids[labeled]
    return {"accuracy": float(np.mean(right))}


def summary(found: dict[int, dict[str, float]], best_by: str) -> dict[str, Any]:
    """Each seed's metrics, their means and standard deviations (over seeds − 1), and the best seed."""
    columns = {name: [row[name] for row in found.values()] for name in next(iter(found.values()))}
    sign = -1 if best_by == "loss" else 1
    return {
        "seeds": {str(seed): row for seed, row in found.items()},
        "mean": {name: float(np.mean(values)) for name, values in columns.items()},
        "std": {name: float(np.std(values, ddof=1)) for name, values in columns.items()} if len(found) > 1 else None,
        "best_seed": max(found, key=lambda seed: sign * found[seed][best_by]),
    }


def table(results: dict[str, Any]) -> str:
    """The metrics of each seed, a line each, and below them their means and standard deviations."""
    rows = {f"seed {seed}": row for seed, row in results["seeds"].items()}
    if results["std"]:
        rows |= {"mean": results["mean"], "std": results["std"]}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>10}" for name in results["mean"])]
    lines += [f"{name:{width}}" + "".join(f"{value:10.4f}" for value in row.values()) for name, row in rows.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        results = finetune(tyro.cli(Settings, args=arguments, use_underscores=True))
    except InputError as error:
        sys.exit(f"error: {error}")
    print(table(results))


if __name__ == "__main__":
    main()
