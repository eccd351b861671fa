"""The pages of docs/: listed in the index, with valid links and working commands."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from tests.runs import ROOT

DOCS = ROOT / "docs"
FOLDERS = (".", "docs", "kernels", "kernels/*", "tests", "benchmarks/results")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))


def blocks(page, section=""):
    """Shell code blocks of a page, or of one section of it."""
    text = page.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[([\w-]+\.md)\]\(\1\) \|", index, re.MULTILINE)) == {
        page.name for page in DOCS.glob("*.md") if page.name != "README.md"
    }
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"[\w./-]+\.md$", site, re.MULTILINE)) == [str(page.relative_to(ROOT)) for page in PAGES]
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_marks_of_a_merge(page):
    assert not re.search(r"^(<{7} |={7}$|>{7} )", page.read_text(encoding="utf-8"), re.MULTILINE)


def anchors(page):
    """Link anchors of a page's headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_training_commands_are_known(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if "train_distributed.py --train_path" in re.sub(" +", " ", line) and "…" not in line:  # complete only
                parse(TrainConfig, shlex.split(line.split("train_distributed.py", 1)[1], comments=True))


def test_headings_of_the_model_that_are_cited_exist():
    """Docstrings and pages cite headings like links: docs/model.md#position-buckets."""
    known, cited = anchors(DOCS / "model.md"), set()
    for folder in ("gptbert", "kernels", "tests", "docs", "benchmarks", "tokenize_scripts"):
        for file in (file for kind in ("py", "md", "cpp", "h") for file in (ROOT / folder).rglob(f"*.{kind}")):
            text = file.read_text(encoding="utf-8")
            found = set(re.findall(r"model\.md#([\w-]+)", text))
            assert found <= known, f"{file}: {found - known}"
            cited |= found
    assert len(cited) > 8


def test_flags_that_stayed_the_same_exist():
    """So does every flag that the page gives as a replacement."""
    table = (DOCS / "upstream.md").read_text(encoding="utf-8").split("\n## Flags\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (`--.*)\|$", table, re.MULTILINE)]
    assert len(rows) > 15
    known = {field.name for field in fields(TrainConfig)}
    for upstreams, ours, _ in rows:
        names = re.findall(r"--(\w+)", upstreams if ours == "the same" else ours)
        assert names
        assert set(names) <= known, names


def test_the_quick_start_runs_as_it_stands(tmp_path):
    """Except for the number of steps, and of rows to evaluate."""
    page = DOCS / "quick-start.md"
    script = "\n".join([*blocks(page, "On a laptop"), *blocks(page, "Look at it")])
    short = script.replace("--max_steps=500", "--max_steps=2 --cpu_threads=1 --validation_steps=1")
    short = short.replace("work/split/test.jsonl\n", "work/split/test.jsonl --validation_steps 1\n")
    assert short.count("--validation_steps") == 2
    for name in ("train_distributed.py", "tokenize_scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", short],
        cwd=tmp_path, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    run = tmp_path / "work" / "runs" / "first"
    assert list_checkpoints(run)[-1].name == "step_00000002"
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    assert "The following example shows how to" in done.stdout
