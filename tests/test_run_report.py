"""A run's report page: its content, incomplete runs, and rendering in a browser."""

import json
import math
import re

import numpy as np
import pytest
from matplotlib.image import imread

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.monitoring import chart
from gptbert.monitoring.chart import MOST_POINTS, Line, draw, log_ticks, number, thin, ticks
from gptbert.report import ReportConfig, render, write_report
from tests.browser import measure, screenshot

HOSTILE = """<script>document.title="x"</script><img src=x onerror="alert(1)"> & '"]]>"""
MODEL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
    "max_position_embeddings": 32, "position_bucket_size": 8, "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "layer_norm_eps": 1e-5,
}  # fmt: skip


def training_record(step, **changes):
    record = {"step": step, "train/loss": 4.0}
    for index, objective in enumerate(("mlm", "clm")):
        loss = 3 + index + 5 * math.exp(-step / 400)
        record |= {
            f"train/{objective}/loss": loss,
            f"train/{objective}/perplexity": math.exp(loss),
            f"train/{objective}/accuracy": 0.2 + 0.1 * index,
        }
    speed = {"tokens_per_second": 5000 + step % 7, "mfu": 0.4, "waiting_share": 0.1, "peak_memory_gb": 1.5}
    schedules = {"learning_rate": 0.01 * math.sin(step / 1000), "mask_p": 0.3 - step * 5e-5, "batch_size": 8 + step}
    rest = {"sequence_length": 128, "tokens": 1000 * step, "skipped_steps": step // 900, "gradient_norm": 1 + step % 5}
    return record | {f"train/{name}": value for name, value in (speed | schedules | rest).items()} | changes


def validation_record(step):
    record = {"step": step}
    for shift, weights in ((0.5, "validation"), (0.8, "validation_ema")):
        for index, objective in enumerate(("mlm", "clm")):
            loss = shift + training_record(step)[f"train/{objective}/loss"]
            record |= {
                f"{weights}/{objective}/loss": loss,
                f"{weights}/{objective}/perplexity": math.exp(loss),
                f"{weights}/{objective}/accuracy": 0.25 + 0.1 * index + 0.02 * shift,
            }
    return record


def sample(step, text="The<mask> sat\non the<mask>.", answers=(" cat", " mat"), best=" cat"):
    guesses = [[[best, 0.61], [" dog", 0.2], [" <b>", 0.1]], [[" sofa", 0.5], [" mat", 0.4], ["\n", 0.01]]]
    return {"step": step, "text": text, "answers": list(answers), "guesses": guesses}


@pytest.fixture(scope="session")
def write_run(make_config):
    """Returns a function that writes a run's folder like the trainer."""

    def write(run_dir, records, samples=(), **changes):
        run_dir.mkdir()
        settings = make_config(output_dir=run_dir.parent, name="run", **changes).to_dict()
        hardware = {"world_size": 4, "device": "cuda:0", "kernels": "triton", "torch": "2.13.0"}
        content = {"train": settings, "model": MODEL, **hardware}
        (run_dir / "config.json").write_text(json.dumps(content))
        for name, lines in (("metrics", records), ("samples", samples)):
            (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run_dir

    return write


def texts_of(page):
    """The page's visible text, with one space between elements."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<style>.*?</style>|<title>.*?</title>", "", page)))


def test_the_page_in_a_browser(write_run, tmp_path_factory):
    """Everything is visible; no scripts, no network requests, no horizontal overflow."""
    folder = tmp_path_factory.mktemp("browser")
    records = [training_record(step) for step in range(10, 3001, 10)]
    records[40] |= {"train/mlm/loss": math.nan, "train/gradient_norm": math.inf}
    records += [validation_record(step) for step in range(300, 3001, 300)]
    samples = [sample(step) for step in (300, 600)] + [
        sample(300, text=f"{HOSTILE} <mask> <mask>", answers=[HOSTILE] * 2)
    ]
    run = write_run(folder / "run", records, samples, max_steps=3000, wandb_project=HOSTILE)
    content = json.loads((run / "config.json").read_text())
    content["train"]["name"] = HOSTILE  # TrainConfig refuses such a name, but a file may contain it
    (run / "config.json").write_text(json.dumps(content))
    page = write_report(run)

    widths = [1280, 768, 390, 320]
    measured = measure(page, folder, widths)
    for width, result in zip(widths, measured, strict=True):
        assert result["scroll"][0] <= result["width"] == width, "too wide"
        assert result["heading"] == HOSTILE
        assert result["active"] == 0
        assert result["resources"] == []
        assert [chart["title"] for chart in result["charts"]] == [
            "Loss (nats a token)", "Accuracy (%)", "Learning rate", "Masked tokens (%)", "Rows in a step",
            "Tokens in a row", "Gradient norm", "Skipped steps, in all", "Tokens per second", "Use of the machines (%)",
            "Peak memory of a process (GB)",
        ]  # fmt: skip
        for drawn in result["charts"]:
            _, _, chart_width, chart_height = drawn["box"]
            assert chart_width > 200
            assert chart_height > 100
    lines = {drawn["title"]: len(drawn["lines"]) for drawn in measured[0]["charts"]}
    assert list(lines.values()) == [6, 6, 1, 1, 1, 1, 2, 1, 1, 2, 1]

    picture, console = screenshot(page, folder, 1280, measured[0]["scroll"][1])
    assert console == []
    pixels = imread(picture)[..., :3]
    for drawn in measured[0]["charts"]:
        for line in drawn["lines"]:
            left, top, width, height = line["box"]
            inside = pixels[int(top) - 2 : int(top + height) + 3, int(left) - 2 : int(left + width) + 3]
            color = np.array([int(part) for part in re.findall(r"\d+", line["color"])[:3]]) / 255
            near = (np.abs(inside - color).max(axis=-1) < 0.1).sum()
            assert near > 50, (drawn["title"], line)


def test_the_page_says_progress_losses_and_settings(write_run, tmp_path):
    records = [training_record(10), validation_record(10), training_record(20), validation_record(20)]
    records[2] |= {"train/mlm/loss": 3.25, "train/mlm/perplexity": 25.79, "train/mlm/accuracy": 0.4567}
    run = write_run(
        tmp_path / "run", records, [sample(10, best=" rat"), sample(20)], max_steps=40, learning_rate=0.02, trackers=()
    )
    (run / "checkpoints").mkdir()
    for name in ("step_00000010", "step_00000020", "step_00000030.damaged", ".step_00000040.incomplete"):
        (run / "checkpoints" / name).mkdir()
    said = texts_of(render(run))
    assert "run at step 20 of 40 (50%), last record of 20" in said
    assert "processes 4 × cuda:0" in said
    assert "torch 2.13.0" in said
    assert "newest checkpoint step_00000020" in said
    assert re.search(r"training 20 3\.250 25\.8 45\.7% \d", said)
    assert re.search(r"averaged weights 20 \d", said)
    page = render(run)
    assert re.search(r'(?s)10</td>.*?class="token"> rat</code> <small>61%.*?20</td>.*?class="token right"> cat<', page)
    assert "↵" in page
    assert "learning_rate 0.02 default 0.001" in said
    assert "trackers (none) default wandb" in said
    changed = re.findall(r'class="changed"><td>(\w+)', page)
    assert changed == ["output_dir", "name", "learning_rate", "max_steps", "trackers"]


def test_runs_that_are_not_whole_have_a_page_too(write_run, tmp_path):
    """Unfinished, killed in the middle of a line, without validation, without records, with damaged samples."""
    run = write_run(tmp_path / "killed", [training_record(10), training_record(20)], max_steps=40)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "train/lo')
    assert "at step 20 of 40" in texts_of(render(run))
    assert "validation" not in texts_of(render(run)).partition("Settings")[0]
    run = write_run(tmp_path / "started", [])
    assert "no records yet" in texts_of(render(run))
    assert "<figure>" not in render(run)
    run = write_run(tmp_path / "done", [training_record(40)], max_steps=40)
    assert "finished after 40 steps" in texts_of(render(run))
    assert "<circle" in render(run), "a line of one point would not be seen"
    odd = [sample(1) | {name: value} for name in ("text", "answers", "guesses") for value in (3, None, [3], {"a": 1})]
    odd += [sample(1, answers=[" cat"]), sample(1) | {"guesses": [[[" cat", "likely"]], []]}, sample(math.nan)]
    assert "Masks filled" not in render(write_run(tmp_path / "odd", [training_record(10)], odd))
    wild = training_record(10) | {"train/mlm/loss": "low", "train/mfu": None, "train/clm/loss": 10**400, "more": [1]}
    wild = [wild, {"step": -5}, {"step": 1e300}, training_record(20) | {"train/clm/loss": -1e308}]
    assert "2 values that are" not in render(write_run(tmp_path / "wild", wild))
    surrogate = write_run(tmp_path / "surrogate", [], [sample(5, text="\ud800 <mask><mask>")])
    assert "�" in write_report(surrogate).read_text() or "?" in write_report(surrogate).read_text()


def test_many_steps_and_records_stay_a_small_page(write_run, tmp_path):
    records = [training_record(step) for step in range(20_000)]
    records[7777]["train/gradient_norm"] = 12345.0
    page = render(write_run(tmp_path / "run", records, [sample(step) for step in range(500)]))
    assert len(page) < 1_000_000
    longest = max(path.count("L") for path in re.findall(r'<path d="(M[^"]*)"', page))
    assert 500 < longest < MOST_POINTS
    assert page.count('class="number">499</td>') == 1, "the last step of the samples"
    norms = page[page.index('aria-label="Gradient norm"') :].partition("</svg>")[0]
    assert "10k" in norms


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run is there"),
        ("{", "cannot be read"),
        ("[]", "not the settings"),
        ('{"train": 3}', "not the settings"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        run_command(ReportConfig, lambda config: write_report(config.run), [str(tmp_path)])
    assert end.value.code == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(write_run, tmp_path):
    run = write_run(tmp_path / "run", [training_record(10)])
    with pytest.raises(InputError, match=r"--output .*none.*cannot be written"):
        write_report(run, tmp_path / "none" / "report.html")
    (run / "report.html").mkdir()
    with pytest.raises(InputError, match=r"report\.html: is a folder"):
        write_report(run)
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
    ]


def test_a_drawn_line_has_gaps_where_values_are_missing():
    drawn = draw("t", [Line("a", "s", [(0, 0.0), (5, math.nan), (10, 50.0), (20, 100.0)])], from_zero=True)
    top = chart.TOP + (chart.BOTTOM - chart.TOP) * 0.05 / 1.05
    middle = chart.BOTTOM - (chart.BOTTOM - chart.TOP) * 0.5 / 1.05
    (line,) = drawn.lines
    assert line.path == (
        f"M{chart.LEFT} {chart.BOTTOM}M{(chart.LEFT + chart.RIGHT) / 2:g} {middle:.1f}L{chart.RIGHT} {top:.1f}"
    )
    assert line.marks == [(chart.LEFT, chart.BOTTOM)], "a point between gaps has no line to show it"
    assert drawn.missing == 1
    assert [label for _, label in drawn.x_ticks] == ["0", "5", "10", "15", "20"]
    assert [label for _, label in drawn.y_ticks] == ["0", "50", "100"]
    assert [text for *_, text in drawn.bands] == ["step 0\na: 0", "step 5\na: nan", "step 10\na: 50", "step 20\na: 100"]
    assert drawn.bands[0][0] == chart.LEFT
    assert sum(width for _, width, _ in drawn.bands) == pytest.approx(chart.RIGHT - chart.LEFT)
    assert draw("t", [Line("a", "s", [])]) is None


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[0.0], [3.0, 3.0], [math.nan], [math.inf, -math.inf], [1e-300, 1e99], [-1e99, 1e99], [1e308, 5.0], [1, 1 + 1e-12]],
)
def test_any_values_have_a_drawing(values, log):
    drawn = draw("t", [Line("a", "s", list(enumerate(values)))], log=log)
    places = [float(place) for place in re.findall(r"[\d.e+-]+", drawn.lines[0].path)]
    assert all(0 <= place <= chart.WIDTH for place in places)
    assert all(chart.TOP <= place <= chart.BOTTOM for place, _ in drawn.y_ticks)
    assert 0 < len(drawn.y_ticks) < 20


def test_thinning_keeps_ends_of_the_range_and_the_order():
    points = [(step, math.sin(step / 100)) for step in range(50_000)]
    points[33_333] = (33_333, 50.0)
    points[33_334] = (33_334, -50.0)
    for step in range(10_000, 12_000):
        points[step] = (step, math.nan)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert {(33_333, 50.0), (33_334, -50.0)} <= set(kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert any(math.isnan(value) for _, value in kept), "a gap stays one"
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_ticks_are_round():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(3.1, 6.9, 5) == [4, 5, 6]
    assert ticks(0, 0.0101, 5) == pytest.approx([0, 0.005, 0.01])
    assert ticks(-1, 1, 5) == [-1, -0.5, 0, 0.5, 1]
    assert log_ticks(0.02, 300) == [0.1, 1, 10, 100]
    assert log_ticks(0.8, 6) == [1, 2, 5]
    assert log_ticks(1e-20, 1e20) == [10.0**e for e in range(-20, 21, 7)]
    assert log_ticks(3.1, 3.3) == [3.1, 3.3]


def test_numbers_are_short():
    values = (0, 5, 8000, 12_000, 40_000, 1.5e6, 3e9, 0.005, 2e-5, 123.456, -40_000, 1e15)
    expected = ["0", "5", "8,000", "12k", "40k", "1.5M", "3G", "0.005", "2e-5", "123.5", "-40k", "1e15"]
    assert [number(value) for value in values] == expected
