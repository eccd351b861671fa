"""The fine-tuning example, on small generated data and with transformers' own Trainer."""

import json
import random
import unicodedata

import pytest
from transformers import AutoTokenizer, pipeline

from examples.finetune import IGNORE_INDEX, Settings, encode_words, finetune
from gptbert.export import ExportConfig, export
from gptbert.huggingface.tokenizer_files import write_tokenizer_files
from tests.runs import train, write_inputs
from tests.texts import GREEK, HINDI
from tests.tokenizer_kinds import SPLITTINGS
from tokenize_scripts.train_tokenizer import learn

ANIMALS, PLACES, VERBS = ("cat", "dog", "horse", "mouse"), ("house", "garden", "river"), ("saw", "left", "liked")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model trained for a few steps, exported."""
    folder = tmp_path_factory.mktemp("finetune")
    write_inputs(folder, train_characters=20_000)
    train(folder, "base", config_file=folder / "no_dropout.json", max_steps=30, validate_every=0)
    export(ExportConfig(folder / "runs" / "base", folder / "exported"))
    return folder / "exported"


def sentences(count, seed):
    """Sentences of who did what to where or whom; the label is whether an animal comes first."""
    generator = random.Random(seed)
    for _ in range(count):
        nouns = [generator.choice(generator.choice((ANIMALS, PLACES))) for _ in range(2)]
        words = ["the", nouns[0], generator.choice(VERBS), "the", nouns[1]]
        kinds = ["animal" if noun in ANIMALS else "place" for noun in nouns]
        yield words, ["other", kinds[0], "other", "other", kinds[1]], kinds[0]


def write_data(folder, task):
    for name, count, seed in (("train", 300, 1), ("validation", 80, 2)):
        lines = [
            {"words": words, "tags": tags} if task == "tag" else {"text": " ".join(words), "label": label}
            for words, tags, label in sentences(count, seed)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("task", "causal"), [("classify", False), ("classify", True), ("tag", False)])
def test_the_example_learns_its_task(exported, tmp_path, task, causal):
    write_data(tmp_path, task)
    settings = Settings(
        task=task,
        model=str(exported),
        train=tmp_path / "train.jsonl",
        validation=tmp_path / "validation.jsonl",
        output=tmp_path / "out",
        learning_rate=3e-3,
        epochs=6,
        causal=causal,
    )
    metrics = finetune(settings)
    assert metrics["eval_accuracy"] > 0.95
    kind = {"classify": "text-classification", "tag": "token-classification"}[task]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded = pipeline(kind, model=str(tmp_path / "out"), tokenizer=tokenizer, trust_remote_code=True)
    answers = loaded("the mouse left the garden")
    if task == "classify":
        assert answers[0]["label"] == "animal"
    else:
        assert {answer["entity"] for answer in answers} >= {"animal", "place", "other"}


def test_labels_stand_on_the_first_token_of_each_word(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    words, tags = ["Zürich", "is", "x", "unbelievably", "far"], ["a", "b", "a", "unseen", "b"]
    encoding = encode_words(tokenizer, {"words": words, "tags": tags}, ["a", "b"], max_length=100)
    tokens = [tokenizer.decode([token]) for token in encoding["input_ids"]]
    labeled = [(tokens[place], label) for place, label in enumerate(encoding["labels"]) if label != IGNORE_INDEX]
    assert [label for _, label in labeled] == [0, 1, 0, 1]
    for (token, _), word in zip(labeled, ["Zürich", "is", "x", "far"], strict=True):
        assert token.strip() in {"", word} or word.startswith(token.strip())
    assert len(tokens) > len(words) + 1
    cut = encode_words(tokenizer, {"words": words, "tags": tags}, ["a", "b"], max_length=3)
    assert len(cut["labels"]) == 3


@pytest.mark.parametrize("flags", SPLITTINGS)
def test_labels_stand_on_words_whatever_the_normal_form(flags, tmp_path):
    """Offsets are those of the words as they were given, composed or not, with and without a space in front."""
    words = ["The", *unicodedata.normalize("NFD", GREEK).split()[:9], *HINDI.split()[:9], "2", "cooks"]
    write_tokenizer_files(learn(iter([f"{HINDI} {GREEK}"] * 9), 500, 2, SPLITTINGS[flags]), tmp_path, 500)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tags = [str(number) for number in range(len(words))]
    encoding = encode_words(tokenizer, {"words": words, "tags": tags}, tags, max_length=500)
    starts = [place for place, label in enumerate(encoding["labels"]) if label != IGNORE_INDEX]
    assert [encoding["labels"][place] for place in starts] == list(range(len(words)))
    for word, start, end in zip(words, starts, [*starts[1:], None], strict=True):
        found = tokenizer.decode(encoding["input_ids"][start:end])
        assert unicodedata.normalize("NFC", found.strip()) == unicodedata.normalize("NFC", word)
