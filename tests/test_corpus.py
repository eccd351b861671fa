"""Reading documents: every file type, one document at a time; errors give file and line number."""

import gzip
import tracemalloc
from pathlib import Path

import pytest

from gptbert.errors import InputError
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.documents import MAX_DOCUMENT
from tests.texts import jsonl


def test_gzip_suffix_does_not_hide_the_format(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["one"])) + gzip.compress(jsonl(["two"])))
    assert list(Corpus(CorpusConfig(input=(tmp_path,)))) == ["one", "two"]
    assert next(iter(Corpus(CorpusConfig(input=(tmp_path,), format="text")))).startswith('{"id"')


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/b/c.jsonl", ".hidden.jsonl", ".git/config.jsonl", "a/.x/y.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    config = CorpusConfig(input=(tmp_path, tmp_path / "a", tmp_path / "b.jsonl"))
    assert list(Corpus(config)) == ["a/b/c.jsonl", "a/z.jsonl", "b.jsonl"], "and no file twice"


def test_inputs_that_are_not_there(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".hidden").touch()
    with pytest.raises(InputError, match="holds no file"):
        Corpus(CorpusConfig(input=(tmp_path,)))
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        Corpus(CorpusConfig(input=(tmp_path / "nowhere",)))
    with pytest.raises(InputError, match=r"--input -: no such file or folder \(standard input is /dev/stdin\)"):
        Corpus(CorpusConfig(input=(Path("-"),)))
    with pytest.raises(InputError, match="--input: needs at least one"):
        Corpus(CorpusConfig(input=()))


def test_empty_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", "", " \n\t", " y "]))
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n\n  three  \n")
    corpus = Corpus(CorpusConfig(input=(tmp_path,), text_documents="line"))
    assert list(corpus) == ["x", "y", "one", "two", "three"]
    assert (corpus.tally.num_documents, corpus.tally.empty_documents, corpus.tally.skipped_lines) == (5, 3, 0)
    assert corpus.tally.text_bytes == len("xyonetwothree")


def test_long_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"{i:07d}" + "é" * 92 for i in range(25_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = list(Corpus(CorpusConfig(input=(tmp_path,))))
    assert len(documents) == 3
    assert all(len(document) <= MAX_DOCUMENT for document in documents)
    assert "\n".join(documents).split("\n") == lines


def test_reading_holds_one_document_at_a_time(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["word " * 2000] * 2000))
    (tmp_path / "b.txt").write_bytes((b"word " * 2000 + b"\n\n") * 2000)
    corpus = Corpus(CorpusConfig(input=(tmp_path,)))
    tracemalloc.start()
    assert sum(1 for _ in corpus) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000 < corpus.num_bytes / 6


def test_domains_come_from_a_field_of_jsonl(tmp_path):
    lines = [
        '{"text": "a", "year": 1999}',
        '{"text": " ", "year": "x"}',
        '"b"',
        '{"text": "c"}',
        '{"text": "d", "year": "x"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = Corpus(CorpusConfig(input=(tmp_path,), on_error="skip"), domain_field="year")
    assert list(corpus.with_domains()) == [("1999", "a"), ("x", "d")]
    assert (corpus.tally.skipped_lines, corpus.tally.empty_documents) == (2, 1)
    with pytest.raises(InputError, match=r"a.jsonl:3: the line is a string, not an object with a `year`"):
        list(Corpus(CorpusConfig(input=(tmp_path,)), domain_field="year"))
    assert next(Corpus(CorpusConfig(input=(tmp_path,))).with_domains()) == ("", "a")
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(InputError, match=r"a.txt: plain text has no field 'year'"):
        list(Corpus(CorpusConfig(input=(tmp_path / "a.txt",)), domain_field="year"))


# Broken input

BAD_LINES = [
    (b'{"text": "cut', r"not JSON \(Unterminated string .* at column 10\)"),
    (b"[[" * 100_000, r"not a document \(JSON nested too deeply\)"),
    (b'"tab\t"', r"not JSON \(Invalid control character at column 5\)"),
    (b'{"txt": "a"}', "the object has no `text`"),
    (b'{"text": 3}', "`text` is a number, not a string"),
    (b'{"text": null}', "`text` is null, not a string"),
    (b'["a"]', "the line is an array, not a string"),
    (b"true", "the line is a boolean, not a string"),
    (b'"caf\xe9"', r"not UTF-8 \(byte 0xe9 at column 5\)"),
    (b'{"text": "a \\ud800"}', r"half a surrogate pair, \\ud800"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_stops_with_file_and_line_or_is_skipped(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(["one"]) + line + b"\n" + jsonl(["two"]))
    with pytest.raises(InputError, match=f"a.jsonl:2: {reason}"):
        list(Corpus(CorpusConfig(input=(file,))))
    corpus = Corpus(CorpusConfig(input=(file,), on_error="skip"))
    assert list(corpus) == ["one", "two"]
    assert corpus.tally.skipped_lines == 1


def test_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"one\ncaf\xe9\nof two\n\nthree"))
    with pytest.raises(InputError, match=r"a.txt.gz:2: not UTF-8 \(byte 0xe9 at column 4\)"):
        list(Corpus(CorpusConfig(input=(file,))))
    assert list(Corpus(CorpusConfig(input=(file,), on_error="skip"))) == ["one\nof two", "three"]
