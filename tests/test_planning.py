"""The planning simulation: the store has its stated size, and phases are at their stated steps."""

import statistics
from pathlib import Path

import pytest

from benchmarks import planning
from benchmarks.planning import PlanningConfig, Rank, simulate, tables, write_store
from gptbert.data.token_store import TokenStore

CONFIG = PlanningConfig(tokens=60_000, world_size=8, ranks=(7,), max_steps=400, global_batch_size=32, steps=6, pause=0)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(planning, "SHARD_TOKENS", 20_000)


def test_a_store_of_many_names_is_one_file(tmp_path, small_shards):
    store = TokenStore.open(write_store(tmp_path, 10**6))
    assert len(store.files) == 50
    assert len({Path(file).stat().st_ino for file in store.files}) == 1
    assert store.num_tokens == pytest.approx(10**6, rel=0.3)
    assert store.num_documents == 50 * 40


def test_phases_are_where_they_should_be(tmp_path, small_shards):
    rank = Rank(CONFIG, write_store(tmp_path, CONFIG.tokens), 7)
    seen = {}

    def step(number):
        seen.setdefault(phases[-1], []).append(number)
        return 0.001 * number

    phases, phase = [], rank.phase
    rank.step, rank.phase = step, lambda name, steps: phases.append(name) or phase(name, steps)
    figures = rank.measure()
    assert seen["first steps"] == [0, 1, 2, 3, 4, 5]
    assert seen["rows grow at 70%"] == [277, 278, 279, 280, 281, 282]
    assert seen["rows grow at 90%"] == [357, 358, 359, 360, 361, 362]
    assert seen["last steps"] == [394, 395, 396, 397, 398, 399]
    (share,) = rank.plan.shares(seen["over the end of the epoch"][3], 7)
    before = rank.plan.shares(seen["over the end of the epoch"][2], 7)[0].first_slot
    assert before < rank.streams[share.objective].slots_per_epoch <= share.first_slot
    assert figures.first["last steps"] == 394
    assert statistics.median(figures.steps["first steps"]) == 3


def test_every_rank_is_measured_and_shown(tmp_path, small_shards):
    figures = simulate(CONFIG, tmp_path)
    assert list(figures) == [7]
    for of in figures.values():
        assert list(of.seconds) == ["open the files", "plan", "streams"]
        assert len(of.steps["last steps"]) == CONFIG.steps - 1
        assert of.page_tables > 0
    lines = tables(figures).splitlines()
    assert {line.count("|") for line in lines[:3]} == {9}
    assert sum("over the end of the epoch" in line for line in lines) == 1
