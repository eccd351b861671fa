"""The demo's corpus: Python's own documentation."""

import sys

from gptbert.text.corpus import Corpus, CorpusConfig
from tokenize_scripts import demo_corpus as script
from tokenize_scripts.demo_corpus import DemoConfig, demo_corpus


def test_demo_corpus_is_english_unique_and_the_same_each_time(tmp_path):
    for name in ("one.jsonl", "two.jsonl"):
        demo_corpus(DemoConfig(output=tmp_path / name))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    corpus = Corpus(CorpusConfig(input=(tmp_path / "one.jsonl",)))
    documents = list(corpus)
    assert len(set(documents)) == len(documents) > 200
    assert 1_500_000 < corpus.tally.text_bytes < 4_000_000
    assert any(text.startswith("json.decoder\n\n") for text in documents)
    assert not {"antigravity", "this"} & set(sys.modules)


def test_demo_corpus_names_a_nul_of_a_docstring(monkeypatch):
    """As Python 3.14's base64 has one, which no reader of texts takes."""
    monkeypatch.setattr(script, "_source_modules", lambda: [[("module", "padded with b'\0' " + "x" * 200)]])
    assert any(text.startswith("module\n\npadded with b'\\0' x") for text in script.documents())
    assert not any("\0" in text for text in script.documents())
