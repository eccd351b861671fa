"""Reading BabyLM's evaluation folder: what is in it, what is left out, and bad lines by file and line."""

import json
import shutil

import numpy as np
import pytest

from gptbert.errors import InputError
from gptbert.scoring.acquisition import Acquisition, child_age, model_age, words_in_name
from gptbert.scoring.choices import Choice, Choices
from gptbert.scoring.correlation import pearson, spearman
from gptbert.scoring.csv_table import CsvTable
from gptbert.scoring.evaluation_folder import FOLDERS, read_tasks
from gptbert.scoring.reading_times import Regression
from tests.babylm_data import write_folder, write_lines

PAIR = {"sentence_good": "A.", "sentence_bad": "B."}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("evaluation") / "full_eval")


def test_what_is_there_is_read_and_the_rest_left_out(data, tmp_path):
    tasks, left_out = read_tasks(data)
    assert list(tasks) == list(FOLDERS)
    assert left_out == {}
    copy = tmp_path / "fast_eval"
    shutil.copytree(data, copy)
    (copy / "blimp_filtered").rename(copy / "blimp_fast")
    (copy / "aoa/cdi_human.csv").unlink()
    (copy / "reading/reading_data.csv").unlink()
    shutil.rmtree(copy / "comps")
    (copy / "blimp_fast/._of_macos.jsonl").write_bytes(b"\0\5\x16\7")
    (copy / "ewok_filtered/notes.txt").touch()
    for file in (copy / "ewok_filtered").glob("*.jsonl"):
        file.unlink()
    tasks, left_out = read_tasks(copy)
    assert list(tasks) == ["blimp", "supplement", "entity_tracking", "wug_adj", "wug_past"]
    assert left_out == {
        "ewok": "no .jsonl file in ewok_filtered", "comps": "no folder comps",
        "reading": "no reading_data.csv in reading", "aoa": "no cdi_human.csv in aoa",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"--tasks comps: .*fast_eval has no folder comps"):
        read_tasks(copy, ["comps"])
    with pytest.raises(InputError, match=r"has none of BabyLM's zero-shot tasks; name one of fast_eval in it"):
        read_tasks(tmp_path)
    with pytest.raises(InputError, match=r"no such folder"):
        read_tasks(tmp_path / "none")


def test_the_two_files_of_words_may_lie_apart(data, tmp_path):
    for name, folder in (("cdi_childes.json", "cdi_childes"), ("cdi_human.csv", "aoa")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(data / "aoa" / name, tmp_path / folder / name)
    tasks, _ = read_tasks(tmp_path)
    assert len(tasks["aoa"].content.ages) == 4


@pytest.mark.parametrize(
    ("folder", "line", "message"),
    [
        ("blimp_filtered", "[1]", "is no JSON object"),
        ("blimp_filtered", "{", "not JSON"),
        ("blimp_filtered", {"sentence_good": "A."}, "the object has no `sentence_bad`"),
        ("blimp_filtered", PAIR | {"sentence_bad": " "}, "`sentence_bad` is empty"),
        ("blimp_filtered", PAIR | {"field": "syntax"}, "the object has no `UID`"),
        ("ewok_filtered", {"Domain": "x", "Context1": "A", "Target1": "B"}, "the object has no `Target2`"),
        ("entity_tracking", {"input_prefix": "A", "options": ["B"], "numops": 0}, "`options` is no array of at least"),
        ("entity_tracking", {"input_prefix": "A", "options": ["B", 3], "numops": 0}, "`options[1]` is a number"),
        ("comps", {"prefix_acceptable": "A", "prefix_unacceptable": "B"}, "the object has no `property_phrase`"),
        ("wug_past_tense", {"sentences": "A B", "ratio": 0.5}, "`sentences` is no pair"),
        ("wug_past_tense", {"sentences": "A\tB", "ratio": "much"}, "`ratio` is no number"),
        ("wug_past_tense", {"sentences": "A\tB"}, "`ratio` is no number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, folder, line, message):
    file = tmp_path / folder / "regular.jsonl"
    write_lines(file, [])
    file.write_text("\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(InputError) as error:
        read_tasks(tmp_path)
    assert str(error.value).startswith(f"{file}:2: {message}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("reading/reading_data.csv", "item,word\nA,B,C\n", ":2: has 3 cells, and the header 2"),
        ("reading/reading_data.csv", "item,word\n", ": has no rows"),
        ("reading/reading_data.csv", "item,word\nA,B\n", ": has no column RTfirstfix, only item, word"),
        ("reading/reading_data.csv", 'item,word\n"A,B\n', ":2: not CSV"),
        ("aoa/cdi_human.csv", "word,16,17\nthe,0.1,much\n", ":2: 17 is 'much', expected a number"),
        ("aoa/cdi_human.csv", "word,15\nthe,0.1\n", ": has no columns for ages"),
        ("aoa/cdi_childes.json", "{", ": cannot be read as JSON"),
        ("aoa/cdi_childes.json", '["a"]', ": expected a JSON object"),
        ("aoa/cdi_childes.json", '{"the": ["a"]}', ": 'the': expected an array of objects"),
        ("aoa/cdi_childes.json", '{"the": 7}', ": 'the': expected an array of objects"),
        ("aoa/cdi_childes.json", '{"the": [{}]}', ": 'the': `context` is null"),
        (
            "entity_tracking/other.jsonl",
            '{"input_prefix": "A", "options": ["B", "C"], "numops": 0}',
            ": expected files",
        ),
    ],
)
def test_a_bad_file_is_named(data, tmp_path, file, content, message):
    shutil.copytree(data / "aoa", tmp_path / "aoa")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as error:
        read_tasks(tmp_path)
    where = (tmp_path / file).parent if message.endswith("expected files") else tmp_path / file
    assert str(error.value).startswith(f"{where}{message}")


@pytest.mark.parametrize("name", ["word", "prev_word"])
def test_a_missing_word_is_named(data, tmp_path, name):
    lines = (data / "reading/reading_data.csv").read_text().splitlines()
    place = lines[0].split(",").index(name)
    cells = lines[4].split(",")
    lines[4] = ",".join([*cells[:place], "", *cells[place + 1 :]])
    file = tmp_path / "reading/reading_data.csv"
    file.parent.mkdir()
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf":5: {name} is empty"):
        read_tasks(tmp_path)


def test_ties_count_as_right_and_splits_are_averaged():
    """Two groups of `regular`, 100 % and 0 %, and one of `ambiref`; other files do not count."""
    groups = ["regular_0_ops", "regular_1_ops", "ambiref_0_ops", "ambiref_0_ops", "else_0_ops"]
    choices = Choices("entity_tracking", [Choice(("a", "b"), (0, 0), {"UID": group}) for group in groups])
    scores = np.array([-1, -1, -2, -1, -3, -4, -4, -3, -9, -1], np.float64)
    result = choices.results(scores)
    assert result["groups"]["UID"] == {
        "regular_0_ops": 100, "regular_1_ops": 0, "ambiref_0_ops": 50, "else_0_ops": 0,
    }  # fmt: skip
    assert (result["score"], result["ties"]) == (50, 1 / 5)
    scores[0] -= 1e-9
    assert choices.results(scores)["groups"]["UID"]["regular_0_ops"] == 100, "a tie in fp32, as in the evaluation"


def test_missing_values_are_those_of_pandas(tmp_path):
    (tmp_path / "x.csv").write_text('\ufeffname,number\n"a, b",1e3\nNA,\n\nnull,nan\n', encoding="utf-8")
    table = CsvTable(tmp_path / "x.csv")
    assert table.texts("name") == ["a, b", None, None]
    assert table.lines == [2, 3, 5]
    np.testing.assert_array_equal(table.numbers("number"), [1000, np.nan, np.nan])


@pytest.mark.parametrize(
    ("name", "words"),
    [("chck_1M", 1e6), ("chck_1000M", 1e9), ("chck_500K", 5e5), ("chck_120", 120), ("chck_1B", 1e9), ("chck", None)],
)
def test_names_say_the_words_seen(name, words):
    assert words_in_name(name) == words


def test_an_age_outside_of_what_was_seen_is_none():
    ages = np.arange(16.0, 31)
    assert child_age(ages, np.full(15, 0.2)) is None
    assert child_age(ages[:2], np.array([0.4, 0.6])) is None
    assert child_age(ages, np.where(ages < 20, np.nan, 1 / (1 + np.exp(-0.7 * (ages - 24))))) == pytest.approx(
        24, abs=1e-4
    )
    seen = np.array([1e6, 1e7, 1e8, 1e9])
    assert model_age(seen, np.array([20.0, 19.9, 19.8, 19.9])) is None
    assert model_age(seen, np.array([5.0, 3.0, 2.5, 2.4])) is None, "the curve crosses before the first checkpoint"
    assert model_age(seen[:3], np.array([15.0, 9.0, 3.0])) is None, "three points determine no curve of four parameters"


def test_correlations_by_hand():
    assert pearson([0, 2, 1], [0, 1, 0.5]) == pytest.approx(1)
    assert pearson([0, 1, 0.5], [2, 0, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 7], [3, 4, 5]) == pytest.approx(0.75**0.5)
    for one, other in (([1, 1], [1, 2]), ([1, 2], [1, 1]), ([1], [2]), ([], [])):
        assert np.isnan(pearson(one, other))


def test_a_regression_of_no_more_rows_than_terms_has_no_values():
    x = np.array([[1.0], [2.0], [4.0]])
    y = np.array([1.0, 3.0, 4.0])
    assert Regression.of(x, y).coefficient == pytest.approx(13 / 14)
    for few in (Regression.of(x[:2], y[:2]), Regression.of(x, np.ones(3))):
        assert np.isnan([few.r_squared, few.aic, few.coefficient, few.t_value]).all()


def test_few_words_have_no_correlation(data):
    acquisition = Acquisition(data / "aoa/cdi_childes.json", data / "aoa/cdi_human.csv")
    number = len(acquisition.ages) * 3
    result = acquisition.results([np.full(number, -20.0)] * 5, [1e6, 2e6, 3e6, 4e6, 5e6])
    assert result == {"score": 0.0, "words": 0, "ages": {}}
