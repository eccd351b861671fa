"""The fine-tuning example, on small generated data and with transformers' own Trainer.

`make test` runs this file with the newest transformers, 5.0 and 4.51.
"""

import json
import random
import sys
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, pipeline, set_seed

from examples import finetune as example
from examples.finetune import IGNORE_INDEX, InputError, Line, Settings, encode_text, encode_words, finetune
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
        write_lines(folder / f"{name}.jsonl", lines)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings_of(folder, exported, task="classify", **changes):
    """Settings of a short run on the lines in a folder."""
    paths = {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl", "output": folder / "out"}
    return Settings(task, str(exported), **paths, **{"learning_rate": 3e-3, "epochs": 2} | changes)


@torch.no_grad()
def logits_of(folder, *texts):
    """Of a saved model, for lists of texts, or of first and second texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    return model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits.numpy()


@pytest.mark.parametrize(("task", "causal"), [("classify", False), ("classify", True), ("tag", False)])
def test_the_example_learns_its_task(exported, tmp_path, task, causal):
    write_data(tmp_path, task)
    results = finetune(settings_of(tmp_path, exported, task, epochs=6, causal=causal))
    assert results["seeds"]["42"]["accuracy"] > 0.95
    kind = {"classify": "text-classification", "tag": "token-classification"}[task]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded = pipeline(kind, model=str(tmp_path / "out"), tokenizer=tokenizer, trust_remote_code=True)
    answers = loaded("the mouse left the garden")
    assert not list((tmp_path / "out").glob("checkpoints_*"))
    if task == "classify":
        assert answers[0]["label"] == "animal"
    else:
        assert {answer["entity"] for answer in answers} >= {"animal", "place", "other"}


def test_pairs_are_read_as_glue_has_them_and_each_seed_is_trained(exported, tmp_path):
    """The fields, the template and the integer labels are as in BabyLM's MultiRC; the label: the same first noun?"""
    lines = []
    for (first, _, label), (second, _, other) in zip(sentences(64, 1), sentences(64, 2), strict=True):
        fields = {"idx": len(lines), "question": first[1], "answer": first[4], "paragraph": " ".join(second)}
        lines.append(fields | {"label": int(label == other)})
    write_lines(tmp_path / "train.jsonl", lines[:40])
    write_lines(tmp_path / "validation.jsonl", lines[40:])
    fields = ("Question: {question} Answer: {answer}", "paragraph")
    results = finetune(settings_of(tmp_path, exported, text_fields=fields, seeds=(3, 10), metric="f1"))
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text())["seeds"] == results["seeds"]
    assert {path.name for path in out.iterdir()} == {"seed_3", "seed_10", "results.json"}
    assert results["labels"] == ["0", "1"]
    questions = [f"Question: {line['question']} Answer: {line['answer']}" for line in lines[40:]]
    predictions = {
        seed: logits_of(out / f"seed_{seed}", questions, [line["paragraph"] for line in lines[40:]]) for seed in (3, 10)
    }
    assert not np.allclose(predictions[3], predictions[10])
    right = [line["label"] for line in lines[40:]]
    for seed, logits in predictions.items():
        assert results["seeds"][str(seed)]["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == right))
    losses, f1 = ([row[name] for row in results["seeds"].values()] for name in ("loss", "f1"))
    assert results["mean"]["loss"] == pytest.approx(sum(losses) / 2)
    assert results["std"]["loss"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert results["std"]["loss"] > 0
    assert results["seeds"][str(results["best_seed"])]["f1"] == max(f1)
    shown = [line.split() for line in example.table(results).splitlines()]
    assert shown[0] == ["epoch", "accuracy", "f1", "mcc", "loss"]
    assert [line[0] for line in shown[1:]] == ["seed", "seed", "mean", "std"]
    assert float(shown[3][3]) == pytest.approx(results["mean"]["f1"], abs=1e-4)


def test_numbers_are_learned_by_adapters_which_the_output_contains(exported, tmp_path):
    pytest.importorskip("peft")
    lines = [{"text": " ".join(words), "label": 1.5 * (label == "animal")} for words, _, label in sentences(120, 1)]
    write_lines(tmp_path / "train.jsonl", lines[:90])
    write_lines(tmp_path / "validation.jsonl", lines[90:])
    results = finetune(settings_of(tmp_path, exported, "regress", lora=2, learning_rate=1e-2, epochs=3))
    found = logits_of(tmp_path / "out", [line["text"] for line in lines[90:]])[:, 0]
    labels = np.array([line["label"] for line in lines[90:]])
    row = results["seeds"]["42"]
    assert row["pearson"] == pytest.approx(np.corrcoef(found, labels)[0, 1], abs=1e-4)
    assert row["loss"] == pytest.approx(np.mean((found - labels) ** 2), abs=1e-4)
    assert row["pearson"] > 0.3


def test_adapters_need_peft(exported, tmp_path, monkeypatch):
    write_data(tmp_path, "classify")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        finetune(settings_of(tmp_path, exported, lora=2))


def test_of_two_processes_one_writes_the_output(exported, tmp_path, monkeypatch):
    write_data(tmp_path, "classify")
    settings, started = settings_of(tmp_path, exported, text_fields=("text",)), []

    def second(*_):
        if not started:
            started.append(1)
            with pytest.raises(InputError, match=r"--output .*out: another process writes to it"):
                finetune(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "train_once", second)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    assert not any((tmp_path / "out").iterdir()), "and once it has ended, the next may start"


def test_training_ends_when_the_metric_stays_and_begins_with_the_seeds_head(exported, tmp_path, monkeypatch):
    for name in ("train", "validation"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": "a b", "label": 0}, {"text": "c", "label": 1}])
    calls = []

    def constant(prediction):
        calls.append(prediction)
        return {"accuracy": 0.5, "f1": 0.5, "mcc": 0.0}

    monkeypatch.setattr(example, "classification_metrics", constant)
    settings = settings_of(tmp_path, exported, patience=2, epochs=9, seeds=(1, 2), learning_rate=0)
    results = finetune(settings)
    assert len(calls) == 2 * (3 + 1)  # epochs, and the best one once more
    assert [row["epoch"] for row in results["seeds"].values()] == [1, 1]
    set_seed(2)
    head = example.new_model(settings, ["0", "1"]).head.state_dict()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "seed_2", trust_remote_code=True)
    assert all(torch.equal(value, head[name]) for name, value in saved.head.state_dict().items())


def test_the_longer_text_of_a_pair_is_cut_and_types_of_tokens_are_left_out(exported, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    settings = settings_of(tmp_path, exported, text_fields=("text", "text_pair"), max_length=12)
    short, long = "the cat", "the dog saw " * 20
    kept = [tokenizer.bos_token_id, *tokenizer(short, add_special_tokens=False)["input_ids"]]
    for texts, place in (((short, long), 0), ((long, short), -len(kept))):
        line = Line({"text": texts[0], "text_pair": texts[1], "label": "b"}, "")
        encoding = encode_text(tokenizer, line, ["a", "b"], settings)
        assert encoding.keys() == {"input_ids", "attention_mask", "labels"}
        assert encoding["labels"] == 1
        assert len(encoding["input_ids"]) == 12
        assert encoding["input_ids"].count(tokenizer.bos_token_id) == 2
        assert encoding["input_ids"][place:][: len(kept)] == kept


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("classify", "{", "is no JSON"),
        ("classify", "[1]", "is no JSON object"),
        ("classify", '{"label": 1}', "`text` is missing, expected a text"),
        ("classify", '{"text": 3, "label": 1}', "`text` is 3, expected a text"),
        ("classify", '{"text": "a", "label": null}', "`label` is null"),
        ("classify", '{"text": "a", "label": 0.5}', r"`label` is 0.5, .*--task regress"),
        ("classify", '{"text": "a", "label": 7}', r"`label` is 7, expected a label of the training data \(0, 1\)"),
        ("classify", '{"text": "a", "text_pair": "b", "label": 0}', "`text_pair` is missing"),
        ("regress", '{"text": "a", "label": "0.5"}', '`label` is "0.5", expected a number'),
        ("regress", '{"text": "a", "label": NaN}', "`label` is NaN, expected a number"),
        ("regress", '{"text": "a", "label": true}', "`label` is true, expected a number"),
        ("tag", '{"words": ["a", "b"], "tags": ["0"]}', "has 2 words and 1 tags"),
        ("tag", '{"words": "ab", "tags": ["0", "1"]}', "`words` is .*, expected a list of texts"),
    ],
)
def test_a_bad_line_is_named(exported, tmp_path, task, line, message):
    good = [
        {"text": "a", "label": 1, "words": ["a"], "tags": ["1"]},
        {"text": "b", "label": 0, "words": [], "tags": []},
    ]
    good[1] |= {"words": ["b"], "tags": ["0"]}
    write_lines(tmp_path / "train.jsonl", good)
    write_lines(tmp_path / "validation.jsonl", good).open("a").write(f"\n{line}\n")
    place = "train.jsonl:1" if "text_pair` is missing" in message else "validation.jsonl:4"
    with pytest.raises(InputError, match=f"{place}: {message}") as caught:
        finetune(settings_of(tmp_path, exported, task))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_named(exported, tmp_path, capsys):
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": 0}])
    (tmp_path / "validation.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"validation.jsonl: has no lines"):
        finetune(settings_of(tmp_path, exported))
    write_lines(tmp_path / "validation.jsonl", [{"text": "a", "label": 0}])
    with pytest.raises(InputError, match=r"train.jsonl: has 1 different labels, expected at least 2"):
        finetune(settings_of(tmp_path, exported))
    assert not (tmp_path / "out").exists()
    for changes, message in (
        ({"metric": "pearson"}, "--metric pearson: --task classify has accuracy, f1, mcc, loss"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"text_fields": ("a", "b", "c")}, "--text_fields: 3 of them"),
        ({"output": tmp_path}, "exists; name a new folder"),
    ):
        with pytest.raises(InputError, match=message):
            replace(settings_of(tmp_path, exported), **changes)
    flags = ["--task", "classify", "--model", "m", "--validation", "v", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"error: .*absent\.jsonl: No such file"):
        example.main([*flags, "--train", str(tmp_path / "absent.jsonl")])


def test_figures_show_mistakes_in_the_data(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    texts = [{"input_ids": [1, *ids]} for ids in ([20, 21], [20, 21, 22], [tokenizer.unk_token_id])]
    data = {"train_dataset": texts[:1], "eval_dataset": [texts[0], *texts]}
    assert example.figures(data, tokenizer, max_length=4) == (
        "1 texts to train on and 4 to validate on, of which 50.0% are among the first; 20.0% of all fill --max_length "
        "or are cut; 6.7% unknown tokens"
    )


def test_tags_without_any_of_the_training_data_are_refused(exported, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"words": ["a", "b"], "tags": ["x", "y"]}])
    write_lines(tmp_path / "validation.jsonl", [{"words": ["a", "b"], "tags": ["X", "Y"]}])
    with pytest.raises(InputError, match=r"validation.jsonl: has no tag of the training data within --max_length"):
        finetune(settings_of(tmp_path, exported, "tag"))


def test_metrics_are_those_of_their_definitions():
    labels = np.array([0, 0, 0, 1, 1, 2])
    predictions = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    found = example.classification_metrics(EvalPrediction(predictions, labels))
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(np.mean([4 / 5, 2 / 4, 2 / 3]))
    # Gorodkin's R_K: (4·6 − (3·2 + 2·2 + 1·2)) / √((36 − 12)(36 − 14))
    assert found["mcc"] == pytest.approx(12 / (24 * 22) ** 0.5)
    two = example.classification_metrics(EvalPrediction(np.eye(2)[[1, 1, 0, 0]], np.array([1, 0, 0, 0])))
    assert (two["f1"], two["mcc"]) == pytest.approx((2 / 3, 1 / 3**0.5))
    same = example.classification_metrics(EvalPrediction(np.eye(2)[[0, 0]], np.array([1, 0])))
    assert (same["f1"], same["mcc"]) == (0, 0)
    assert example.ranks(np.array([5.0, 1.0, 5.0, 9.0])).tolist() == [2.5, 1, 2.5, 4]
    labels, predictions = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[1.0], [8.0], [27.0], [27.0]])
    found = example.regression_metrics(EvalPrediction(predictions, labels))
    assert found["spearman"] == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert found["pearson"] == pytest.approx(48.5 / (5 * 530.75) ** 0.5)
    constant = example.regression_metrics(EvalPrediction(np.ones((4, 1)), labels))
    assert constant == {"pearson": 0, "spearman": 0}


def test_labels_stand_on_the_first_token_of_each_word(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    words, tags = ["Zürich", "is", "x", "unbelievably", "far"], ["a", "b", "a", "unseen", "b"]
    encoding = encode_words(tokenizer, Line({"words": words, "tags": tags}, ""), ["a", "b"], max_length=100)
    tokens = [tokenizer.decode([token]) for token in encoding["input_ids"]]
    labeled = [(tokens[place], label) for place, label in enumerate(encoding["labels"]) if label != IGNORE_INDEX]
    assert [label for _, label in labeled] == [0, 1, 0, 1]
    for (token, _), word in zip(labeled, ["Zürich", "is", "x", "far"], strict=True):
        assert token.strip() in {"", word} or word.startswith(token.strip())
    assert len(tokens) > len(words) + 1
    cut = encode_words(tokenizer, Line({"words": words, "tags": tags}, ""), ["a", "b"], max_length=3)
    assert len(cut["labels"]) == 3


@pytest.mark.parametrize("flags", SPLITTINGS)
def test_labels_stand_on_words_whatever_the_normal_form(flags, tmp_path):
    """Offsets are those of the words as they were given, composed or not, with and without a space in front."""
    words = ["The", *unicodedata.normalize("NFD", GREEK).split()[:9], *HINDI.split()[:9], "2", "cooks"]
    write_tokenizer_files(learn(iter([f"{HINDI} {GREEK}"] * 9), 500, 2, SPLITTINGS[flags]), tmp_path, 500)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tags = [str(number) for number in range(len(words))]
    encoding = encode_words(tokenizer, Line({"words": words, "tags": tags}, ""), tags, max_length=500)
    starts = [place for place, label in enumerate(encoding["labels"]) if label != IGNORE_INDEX]
    assert [encoding["labels"][place] for place in starts] == list(range(len(words)))
    for word, start, end in zip(words, starts, [*starts[1:], None], strict=True):
        found = tokenizer.decode(encoding["input_ids"][start:end])
        assert unicodedata.normalize("NFC", found.strip()) == unicodedata.normalize("NFC", word)
