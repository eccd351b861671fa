"""BabyLM's zero-shot tasks against its evaluation's definitions, on small files of the same form."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from gptbert.babylm import BabylmSettings, babylm, find_checkpoints, most_tied, trained_backends
from gptbert.checkpoint import manifest
from gptbert.checkpoint.saved_model import load_model
from gptbert.checkpoint.weights import write_weights
from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.export import ExportConfig, export
from gptbert.scoring.passages import next_words, with_masks_behind
from gptbert.text.special_tokens import MASK_ID
from gptbert.text.tokenizer import load_tokenizer
from tests.babylm_data import CURVES, LINES, write_folder, write_lines
from tests.babylm_definition import Definition, accuracies, acquired, reading, wug
from tests.exported import SHAPE, random_model
from tests.runs import write_inputs
from tests.tokenizer_kinds import OURS, kinds

ACCURACIES = {
    "blimp": "blimp_filtered", "supplement": "supplement_filtered", "ewok": "ewok_filtered",
    "entity_tracking": "entity_tracking", "comps": "comps",
}  # fmt: skip
WUGS = {"wug_adj": "wug_adj_nominalization", "wug_past": "wug_past_tense"}
BACKENDS = ("causal", "mntp", "mlm")
NUM_ITEMS = {
    "blimp": 5, "supplement": 3, "ewok": 3, "entity_tracking": 4, "comps": 5, "wug_adj": 5, "wug_past": 3,
    "reading": 32,
}  # fmt: skip
WORDS = [1, 2, 4, 8, 16, 32, 64, 128]  # millions, of the checkpoints by words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("babylm")


@pytest.fixture(scope="module")
def data(folder):
    return write_folder(folder / "full_eval")


@pytest.fixture(scope="module")
def run_dir(folder):
    """A run's folder: checkpoints by words, which learn each word at its own time, and an ordinary one."""
    inputs = folder / "inputs"
    inputs.mkdir()
    tokenizer_file = write_inputs(inputs, train_characters=10_000) / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file)
    run = folder / "run"
    for number, millions in enumerate([*WORDS, 200]):
        model = random_model(3)
        with torch.no_grad():
            bias = next(value for name, value in model.named_parameters() if value.shape == (SHAPE.vocab_size,))
            for place, word in enumerate(CURVES):
                token = tokenizer.encode(f" {word}", add_special_tokens=False).ids[-1]
                bias[token] -= 15 / (1 + math.exp(8 * (math.log10(millions) - 0.4 - 0.3 * place)))
        path = run / (f"words/chck_{millions}M" if number < len(WORDS) else "checkpoints/step_00000009")
        path.mkdir(parents=True)
        for name in ("ema", "model"):
            write_weights(path / f"{name}.safetensors", model.state_dict(), SHAPE)
        (path / "model_config.json").write_text(json.dumps(asdict(SHAPE)))
        (path / "train_config.json").write_text('{"name": "run", "hybrid_numerator": 1, "hybrid_denominator": 4}')
        (path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
        if number < len(WORDS):
            (path / "words.json").write_text(json.dumps({"step": number, "words": millions * 10**6, "tokens": 9}))
        manifest.write(path)
    return run


@pytest.fixture(scope="module")
def newest(run_dir):
    return run_dir / "checkpoints/step_00000009"


def evaluated(output, **settings):
    babylm(BabylmSettings(output=output, **settings))
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def of_one(newest, data, folder):
    return evaluated(folder / "one.json", run=newest, data=data, backend=BACKENDS)


@pytest.fixture(scope="module")
def of_all(run_dir, data, folder):
    return evaluated(
        folder / "all.json", run=run_dir, data=data, backend=("causal",), tasks=("blimp", "wug_adj", "aoa")
    )


@pytest.fixture(scope="module", params=BACKENDS)
def by_definition(request, newest):
    """The definition with the tokenizer's file as transformers would use it, in fp64."""
    return Definition(load_model(newest), Tokenizer.from_file(str(newest / "tokenizer.json")), request.param)


def test_accuracies_are_those_of_the_definition(of_one, data, by_definition):
    results = of_one["checkpoints"][0]["results"][by_definition.backend]
    for task, folder in ACCURACIES.items():
        score, groups = accuracies(task, data / folder, by_definition)
        assert results[task]["score"] == pytest.approx(score, abs=1e-9), task
        assert results[task]["groups"]["UID"] == pytest.approx(groups, abs=1e-9), task
    assert results["blimp"]["ties"] == 1 / 5
    assert results["blimp"]["groups"].keys() == {"UID", "field", "linguistics_term"}
    assert results["blimp"]["groups"]["field"].keys() == {"syntax/semantics", "syntax"}


def test_wug_is_a_rank_correlation(of_one, data, by_definition):
    for task, folder in WUGS.items():
        expected = wug(data / folder, by_definition)
        assert of_one["checkpoints"][0]["results"][by_definition.backend][task]["score"] == pytest.approx(
            100 * expected
        )


def test_reading_compares_regressions_with_and_without_the_surprisal(of_one, data, by_definition):
    results = of_one["checkpoints"][0]["results"][by_definition.backend]["reading"]
    eye_tracking, self_paced, measures = reading(data / "reading/reading_data.csv", by_definition)
    assert results["eye_tracking"] == pytest.approx(eye_tracking, rel=1e-3, abs=1e-4)
    assert results["self_paced"] == pytest.approx(self_paced, rel=1e-3, abs=1e-4)
    for name, (without, with_it) in measures.items():
        found = results["measures"][name]
        assert (found["r_squared_without"], found["r_squared_with"]) == pytest.approx((without, with_it), abs=1e-6)
    assert [results["measures"][name]["rows"] for name in ("RTfirstfix", "N400")] == [32, 28]
    assert results["measures_with_spillover"]["RTfirstfix"]["rows"] == 24


def test_ages_of_acquisition_are_those_of_the_definition(of_all, run_dir):
    """Children's are those of their curves; the model's come from its surprisals at all checkpoints."""
    expected = {}
    for word, (a, b, c) in CURVES.items():
        if a > 0.5:
            surprisals = []
            for millions in WORDS:
                path = run_dir / f"words/chck_{millions}M"
                definition = Definition(load_model(path), Tokenizer.from_file(str(path / "tokenizer.json")), "causal")
                surprisals += [-definition.completion(f"{line.strip()} {word}", word) for line in LINES]
            age = acquired(np.repeat(np.array(WORDS) * 1e6, len(LINES)), np.array(surprisals))
            if age is not None:
                expected[word] = (age, c - math.log(a / 0.5 - 1) / b)
    result = of_all["aoa"]["causal"]
    assert len(expected) >= 3
    assert result["words"] == len(expected)
    assert result["ages"].keys() == expected.keys()
    for word, ages in result["ages"].items():
        assert (ages["model"], ages["child"]) == pytest.approx(expected[word], abs=1e-3), word
    assert result["score"] == pytest.approx(np.corrcoef(list(zip(*expected.values(), strict=True)))[0, 1], abs=1e-3)


def test_all_checkpoints_are_evaluated_in_order(of_all, of_one, run_dir):
    assert [each["name"] for each in of_all["checkpoints"]] == [*(f"chck_{n}M" for n in WORDS), "step_00000009"]
    assert [each["words"] for each in of_all["checkpoints"]] == [*(n * 1e6 for n in WORDS), None]
    last, alone = of_all["checkpoints"][-1]["results"]["causal"], of_one["checkpoints"][0]["results"]["causal"]
    assert last == {task: alone[task] for task in ("blimp", "wug_adj")}
    assert [each.name for each in find_checkpoints(run_dir / "words")] == [f"chck_{n}M" for n in WORDS]
    assert [each.name for each in find_checkpoints(run_dir / "checkpoints")] == ["step_00000009"]


def test_the_report_says_what_was_evaluated(of_one, of_all, folder):
    assert {name: task["items"] for name, task in of_one["tasks"].items()} == NUM_ITEMS
    assert of_one["left_out"] == {"aoa": "needs checkpoints by words (chck_…)"}
    assert of_all["tasks"]["aoa"] == {"folder": "aoa", "items": len(LINES) * (len(CURVES) + 2)}
    assert of_all["left_out"]["comps"] == "not in --tasks"
    for name in ("one", "all"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_has_the_plan_the_table_and_what_to_mind(newest, data, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.symlink_to(newest)
    tasks = ("supplement", "wug_past", "reading")
    babylm(BabylmSettings(run=copy, data=data, tasks=tasks, backend=("mntp", "causal")))
    results = json.loads((tmp_path / "run_babylm.json").read_text())["checkpoints"][0]["results"]
    screen = capsys.readouterr().out
    for line in (
        "supplement      3  supplement_filtered",
        "left out: blimp (not in --tasks)",
        "by mntp and causal, of",
    ):
        assert line in screen
    for task, part in (("supplement", "score"), ("wug_past", "score"), ("reading", "eye_tracking")):
        shown = [f"{results[backend][task][part]:.2f}" for backend in ("mntp", "causal")]
        name = part if task == "reading" else task
        assert [name, *shown] in [line.split() for line in screen.splitlines()]
    assert "WARNING: 33.3% ties in supplement, counted as right (causal)" in screen
    assert (tmp_path / "run_babylm.png").is_file()


def test_an_exported_folder_gives_the_same(of_all, run_dir, data, tmp_path):
    exported = tmp_path / "exported"
    smaller = tmp_path / "run"
    for part in ("words/chck_1M", "words/chck_128M", "checkpoints/step_00000009"):
        (smaller / part).parent.mkdir(parents=True, exist_ok=True)
        (smaller / part).symlink_to(run_dir / part)
    export(ExportConfig(smaller, exported, babylm=True))
    found = evaluated(tmp_path / "x.json", run=exported, data=data, backend=("causal",), tasks=("blimp", "wug_adj"))
    assert [each["name"] for each in found["checkpoints"]] == ["chck_1M", "chck_128M", "main"]
    expected = [each["results"] for each in of_all["checkpoints"] if each["name"] in {"chck_1M", "chck_128M"}]
    expected.append(of_all["checkpoints"][-1]["results"])
    assert [each["results"] for each in found["checkpoints"]] == expected


@pytest.mark.parametrize(
    ("settings", "backends"),
    [
        ({"hybrid_numerator": 1, "hybrid_denominator": 4}, ["causal", "mntp"]),
        ({"hybrid_numerator": 0, "hybrid_denominator": 1}, ["causal"]),
        ({"hybrid_numerator": 2, "hybrid_denominator": 2}, ["mntp"]),
        ({"hybrid_numerator": 0}, ["causal", "mntp"]),
    ],
)
def test_the_default_is_what_the_model_was_trained_for(tmp_path, settings, backends):
    (tmp_path / "train_config.json").write_text(json.dumps(settings))
    assert trained_backends(tmp_path) == backends


def test_the_ties_of_a_small_task_are_told():
    """Large tasks would hide them, and each counts in BabyLM's mean."""
    results = {"blimp": {"ties": 0.001}, "supplement": {"ties": 1.0}, "reading": {}}
    assert most_tied(results) == (1.0, "supplement")
    assert most_tied({"reading": {}}) == (0.0, "")


def test_checkpoints_by_words_that_are_left_out_are_named(tmp_path, capsys):
    for name in ("chck_1M", "chck_main"):
        (tmp_path / "words" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="neither a checkpoint"):
        find_checkpoints(tmp_path)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("chck_1M: is left out, since it holds no model")
    assert second.endswith("chck_main: is left out, since its name says no number of words")


def test_without_matplotlib_a_line_says_so(newest, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gptbert.babylm.can_draw", lambda: False)
    evaluated(tmp_path / "x.json", run=newest, data=data, tasks=("wug_past",), backend=("causal",))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert (
        capsys.readouterr().err.splitlines()[0]
        == f"{tmp_path}/x.png: is not drawn without matplotlib (pip install matplotlib)"
    )


def test_a_score_that_is_not_defined_is_null(newest, tmp_path, capsys):
    write_lines(tmp_path / "wug_past_tense/x.jsonl", [{"sentences": "It.\tAn it.", "ratio": "0.5"}])
    found = evaluated(tmp_path / "x.json", run=newest, data=tmp_path, backend=("causal",))
    assert found["checkpoints"][0]["results"]["causal"]["wug_past"]["score"] is None
    output = capsys.readouterr()
    assert "wug_past       –" in output.out
    assert "step_00000009, causal: wug_past: not defined (too few items" in output.err


@pytest.mark.parametrize("backend", ["causal", "mntp"])
@pytest.mark.parametrize(
    "name", [OURS, f"{OURS}, --like upstream", "Unigram with Metaspace", "WordPiece in lower case"]
)
def test_words_are_split_as_the_definition_splits_them(tmp_path, name, backend):
    """By the ids and the token of each prediction, whatever the tokenizer adds and its decoder takes away."""
    (tmp_path / "tokenizer.json").write_text(kinds()[name])
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    asked = []

    class Recorded(Definition):
        def __init__(self):
            self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # as exported

        def _next(self, sentence, token):
            asked.append((self.tokenizer.encode(sentence + "<mask>" * (0 if backend == "causal" else 3)).ids, token))
            return 0.0

    contexts, words = ["The cook paints", "None", "A"], ["boat.", "neighbourly", "é漢"]
    for context, word in zip(contexts, words, strict=True):
        Recorded().word(context, word)
    found = next_words(tokenizer, contexts, words)
    passages = [passage for of_word in found for passage in of_word]
    if backend == "causal":
        assert [([*passage.ids[:-1]], passage.ids[-1]) for passage in passages] == asked
        assert all(passage.predicted == (len(passage.ids) - 1,) for passage in passages)
    else:
        for passage, (ids, token) in zip(passages, asked, strict=True):
            masked = with_masks_behind(passage, 2)
            (place,) = masked.predicted
            assert masked.ids[place] == token
            assert [*masked.ids[:place], MASK_ID, *masked.ids[place + 1 :]] == ids
    assert max(map(len, found)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "glue"], "--tasks"),
        (["--tasks", "aoa"], "--tasks aoa: needs the checkpoints by words"),
        (["--tasks"], "--tasks"),
        (["--backend", "bert"], "--backend"),
        (["--batch_tokens", "0"], "--batch_tokens is 0"),
        (["--output", "{}/x.png"], "is the name of the picture"),
        (["--output", "{}"], "is a folder"),
        (["--output", "{}/none/../../full_eval/reading/reading_data.csv"], "is also an input"),
    ],
)
def test_a_mistake_is_one_line(newest, data, capfd, arguments, message):
    there = sorted(data.rglob("*"))
    with pytest.raises(SystemExit) as end:
        run_command(BabylmSettings, babylm, [str(newest), str(data), *(each.format(data) for each in arguments)])
    assert end.value.code in {1, 2}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(data.rglob("*")) == there, "nothing is written"
