"""Fine-tune an exported model with transformers' Trainer, to classify texts or to tag words.

    python -m gptbert.export checkpoints/RUN exported
    python examples/finetune.py --task classify --model exported --train train.jsonl --validation valid.jsonl \
        --output classifier

A line of data is `{"text": "…", "label": "…"}`, or with `--task tag` `{"words": ["…", …], "tags": ["…", …]}`. The
output loads with `AutoModelForSequenceClassification` or `AutoModelForTokenClassification`, and in `pipeline`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

IGNORE_INDEX = -100
MODELS = {"classify": AutoModelForSequenceClassification, "tag": AutoModelForTokenClassification}
COLLATORS = {"classify": DataCollatorWithPadding, "tag": DataCollatorForTokenClassification}


@dataclass(frozen=True)
class Settings:
    """Fine-tune a text classifier or a word tagger."""

    task: Literal["classify", "tag"]
    """classify: one label per text. tag: one per word."""
    model: str
    """An exported folder, or the name it was published under."""
    train: Path
    """JSONL of texts and labels, or of words and tags."""
    validation: Path
    """The same, to choose the best epoch."""
    output: Path
    """Folder for the new model."""
    epochs: int = 10
    """Passes over the training data."""
    batch_size: int = 32
    """Lines per step."""
    learning_rate: float = 5e-5
    """Peak, after a warmup of 6 %; it falls linearly."""
    max_length: int = 512
    """Texts are truncated to this many tokens."""
    causal: bool = False
    """Attend only to earlier tokens, and classify a text by its last one: GPT-BERT's causal mode."""
    seed: int = 42
    """Seed of the new head, dropout and the order of lines."""


def finetune(settings: Settings) -> dict[str, float]:
    """Train, keep the best epoch, write it to `settings.output`; returns its metrics on the validation data."""
    data = {name: read_jsonl(path) for name, path in (("train", settings.train), ("validation", settings.validation))}
    if settings.task == "tag":
        labels = sorted({tag for line in data["train"] for tag in line["tags"]})
    else:
        labels = sorted({str(line["label"]) for line in data["train"]})
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=True)
    encode = encode_words if settings.task == "tag" else encode_text
    datasets = {
        name: [encode(tokenizer, line, labels, settings.max_length) for line in lines] for name, lines in data.items()
    }
    trainer = Trainer(
        model_init=lambda: MODELS[settings.task].from_pretrained(
            settings.model,
            trust_remote_code=True,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            is_decoder=settings.causal,
        ),
        args=TrainingArguments(
            output_dir=str(settings.output / "checkpoints"),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=0.06,
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=COLLATORS[settings.task](tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model(str(settings.output))
    tokenizer.save_pretrained(str(settings.output))
    return trainer.evaluate()


def encode_text(tokenizer: PreTrainedTokenizerBase, line: dict, labels: list[str], max_length: int) -> dict:
    """A text's tokens and its label."""
    encoding = tokenizer(line["text"], truncation=True, max_length=max_length)
    return {**encoding, "labels": labels.index(str(line["label"]))}


def encode_words(tokenizer: PreTrainedTokenizerBase, line: dict, tags: list[str], max_length: int) -> dict:
    """A sentence's tokens, and as labels the tag of each word on its first token, −100 elsewhere.

    The words are joined by spaces, as in the model's training: word tokens include the preceding space. A tag that the
    training data lacks is not a label.
    """
    words = line["words"]
    encoding = tokenizer(" ".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True)
    ends = [end for _, end in encoding.pop("offset_mapping")]
    labels, token, start = [IGNORE_INDEX] * len(ends), 0, 0
    for word, tag in zip(words, line["tags"], strict=True):
        while token < len(ends) and ends[token] <= start:
            token += 1
        if token < len(ends) and tag in tags:
            labels[token] = tags.index(tag)
        start += len(word) + 1
    return {**encoding, "labels": labels}


def read_jsonl(path: Path) -> list[dict]:
    """All lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of texts or words whose likeliest label is correct."""
    labeled = prediction.label_ids != IGNORE_INDEX
    right = prediction.predictions.argmax(-1)[labeled] == prediction.label_ids[labeled]
    return {"accuracy": float(np.mean(right))}


if __name__ == "__main__":
    print(finetune(tyro.cli(Settings)))
