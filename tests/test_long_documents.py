"""Documents of any length are read, split and encoded in bounded memory: cut where a line or a word ends."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptbert.errors import InputError
from gptbert.text import documents, lines
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.documents import MAX_DOCUMENT
from tests.test_file_kinds import put
from tests.texts import WORDS
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, in_pieces, learn, train_tokenizer

ROOT = Path(__file__).parents[1]


def corpus(file, **settings):
    read = Corpus(CorpusConfig(input=(file,), **settings))
    return read, list(read)


@pytest.mark.parametrize("settings", [{}, {"text_documents": "line"}])
def test_one_long_line_is_cut_at_spaces(tmp_path, settings):
    text = WORDS * 50_000
    read, pieces = corpus(put(tmp_path, "text8", text.encode()), **settings)
    assert len(pieces) == 4
    assert max(map(len, pieces)) <= MAX_DOCUMENT
    assert " ".join(pieces) == text.strip()
    assert (read.tally.cut_documents, read.tally.skipped_lines) == (1, 0)


def test_a_long_line_without_spaces_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr("gptbert.text.document_reader.MAX_DOCUMENT", 1000)
    monkeypatch.setattr("gptbert.text.corpus.MAX_DOCUMENT", 1000)
    monkeypatch.setattr(lines, "PIECE", 64)
    for text in ("é" * 5000, "x" + "猫" * 3333, "ab🐈" * 1500, "🐈"):
        read, pieces = corpus(put(tmp_path, "a.txt", text.encode()))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 1000
        assert read.tally.cut_documents == (len(text) > 1000)


def test_whitespace_behind_a_document_is_no_cut_in_it_or_in_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 100)
    monkeypatch.setattr("gptbert.text.document_reader.MAX_DOCUMENT", 100)
    text = "One." + " " * 500 + "\n\nTwo.\n"
    read, pieces = corpus(put(tmp_path, "a.txt", text.encode()))
    assert [piece.strip() for piece in pieces] == ["One.", "Two."]
    assert read.tally.cut_documents == 0


@pytest.mark.parametrize("form", ["text", "jsonl", "json", "utf-16", "gzip"])
def test_every_kind_of_file_is_cut_at_the_same_places(tmp_path, form):
    document = "\n".join(WORDS * (i % 90) for i in range(1, 900)).strip()
    document = "\n".join(line for line in document.split("\n") if line)
    assert len(document) > 2 * MAX_DOCUMENT
    content = {
        "text": document.encode(),
        "jsonl": json.dumps({"text": document}).encode() + b"\n",
        "json": json.dumps([document], indent=1).encode(),
        "utf-16": ("\ufeff" + document).encode("utf-16-le"),
        "gzip": gzip.compress(document.encode(), 1),
    }[form]
    expected, start = [], 0
    while len(document) - start > MAX_DOCUMENT:
        end = document.rindex("\n", start, start + MAX_DOCUMENT) + 1
        expected.append(document[start:end].strip())
        start = end
    expected.append(document[start:])
    read, pieces = corpus(put(tmp_path, "a", content))
    assert pieces == expected
    assert (read.tally.cut_documents, read.tally.num_documents) == (1, len(expected))


@pytest.mark.parametrize("form", ["jsonl", "json", "gzip", "objects"])
def test_json_of_any_length_is_read(tmp_path, form, monkeypatch):
    """In a bad line that is as long, nothing before its end was a document."""
    monkeypatch.setattr(lines, "MAX_LINE", 1 << 17)
    text = ("\n".join([WORDS * 3] * 20) + " é🐈 ") * 600
    values = [
        {"text": "one"},
        {"id": 7, "text": f"  {text}\t"},
        {"id": 8, "texts": text},
        {"text": text + "\ud83d"},
        "two",
    ]
    as_lines = "\n".join(map(json.dumps, values)).encode()
    content = {
        "jsonl": as_lines,
        "json": json.dumps(values, indent=1, ensure_ascii=True).encode(),
        "gzip": gzip.compress(as_lines, 1),
        "objects": "\n".join(json.dumps(value, indent=1) for value in values).encode(),
    }[form]
    file = put(tmp_path, "a", content)
    whole = gzip.decompress(content) if form == "gzip" else content
    line = whole.count(b"\n", 0, whole.index(b'"id": 8')) + (form in {"jsonl", "gzip"})
    with pytest.raises(InputError, match=rf"a:{line}: the object has no `text`, only `id`, `texts` .*--on_error=skip"):
        corpus(file)
    read, pieces = corpus(file, on_error="skip")
    assert pieces == ["one", *documents.cut(text.strip()), "two"]
    assert len(pieces) == 5
    assert (read.tally.cut_documents, read.tally.skipped_lines, read.tally.good_lines) == (1, 2, 3)


def test_a_long_line_that_is_damaged_at_its_end_is_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    text = WORDS * 50_000
    for damage, reason in (
        (b"", r"not JSON \(Unterminated string starting at column 1\)"),
        (b'"}', r"not JSON \(Extra data at column 3250003\)"),
        (b'\xff"', r"not UTF-8 \(byte 0xff at column 3250002\)"),
    ):
        file = put(tmp_path, "a.jsonl", b'"one"\n"' + text.encode() + damage + b'\n"two"\n')
        with pytest.raises(InputError, match=f"a.jsonl:2: {reason}"):
            corpus(file)
        read, pieces = corpus(file, on_error="skip")
        assert pieces == ["one", "two"]
        assert read.tally.skipped_bytes == len(text) + len(damage) + 2
    monkeypatch.setattr(lines, "PIECE", 64)
    file = put(tmp_path, "a.jsonl", b'"' + b"a" * 2000 + "é".encode()[:1] + b'x"\n')
    with pytest.raises(InputError, match=r"a.jsonl:1: not UTF-8 \(byte 0xc3 at column 2002\)"):
        corpus(file)
    for size in range(2001, 2065):
        file = put(tmp_path, "a.jsonl", b'"' + b"a" * size + b'\xf0\x9f"\n')
        with pytest.raises(InputError, match=rf"a.jsonl:1: not UTF-8 \(byte 0xf0 at column {size + 2}\)"):
            corpus(file)
    monkeypatch.setattr(lines, "PIECE", 1 << 18)
    file = put(tmp_path, "a.jsonl", b'"one"\n"' + text.encode() + b'\0"\n"two"\n')
    with pytest.raises(InputError, match=r"a.jsonl:2: has NUL bytes from column 3250002 on"):
        corpus(file, on_error="skip")
    file = put(tmp_path, "a.jsonl", b'"one"\n' + b" " * 5000 + b'\n"two"\n')
    assert corpus(file)[1] == ["one", "two"]


def test_a_folder_for_temporary_files_without_space_is_named(tmp_path, monkeypatch):
    """It is not the corpus that cannot be read."""
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    file = put(tmp_path, "a.jsonl", b'"' + b"word " * 500_000 + b'"\n')
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"gone: cannot hold a long document .*TMPDIR"):
        corpus(file)


def test_a_line_of_the_length_of_a_block_is_no_blank_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PIECE", 64)
    for length in range(60, 70):
        text = "a" * length + "\n" + "b" * (129 - length) + "\nc"
        assert corpus(put(tmp_path, "a.txt", text.encode()))[1] == [text]
        text = "a\n" + " " * length + "\nb"
        assert corpus(put(tmp_path, "a.txt", text.encode()))[1] == ["a", "b"]


def test_whitespace_at_the_end_does_not_cut_a_document(tmp_path):
    text = (WORDS * 20_000)[: MAX_DOCUMENT - 1] + "."
    for content in (text, text + "\n", text + "\n\n\n", text + " " * 500_000, json.dumps(text + "\n\n")):
        for form in ("blank_line", "line"):
            read, pieces = corpus(put(tmp_path, "a", content.encode()), text_documents=form)
            assert pieces == [text]
            assert read.tally.cut_documents == 0


def test_bad_bytes_in_a_long_line_are_named(tmp_path):
    with pytest.raises(InputError, match=r"a.txt:2: not UTF-8 \(byte 0xff"):
        corpus(put(tmp_path, "a.txt", b"one\n" + b"word " * 500_000 + b"\xff\xff" + b" word" * 9))
    with pytest.raises(InputError, match=r"a.txt:2: not UTF-8 \(byte 0xc3"):
        corpus(put(tmp_path, "a.txt", b"one\n" + b"word " * 500_000 + b"\xc3"))


@pytest.mark.parametrize("flags", [{}, {"normalizer": "none", "marks_in_words": False}, {"normalizer": "nfkc"}])
def test_a_tokenizer_is_learned_from_pieces_of_long_documents_as_from_the_whole(tmp_path, monkeypatch, flags):
    """The library takes 256 texts at a time, which must not be 256 million characters."""
    put(tmp_path, "a.txt", ((WORDS + "é  two spaces\nand 1234 lines, don't ") * 300).encode())
    learned = []
    for size in (1 << 20, 100):
        monkeypatch.setattr("tokenize_scripts.train_tokenizer.LONG_TEXT", size)
        output = tmp_path / f"{size}.json"
        train_tokenizer(TrainTokenizerConfig(input=(tmp_path / "a.txt",), output=output, vocab_size=330, **flags))
        learned.append(output.read_bytes())
    assert learned[0] == learned[1]
    text = "word " * 50 + "x" * 250
    pieces = list(in_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100


PEAK = """
import sys
from pathlib import Path
from tokenize_scripts.{script} import {config}, {script}
{script}({config}(input=(Path(sys.argv[1]),), **{flags}))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")))
"""


def peak(script, file, **flags):
    """Megabytes that a script takes at most, and what it says."""
    names = {"split_corpus": "SplitConfig", "tokenize_corpus": "TokenizeConfig"}
    flags = {name: str(value) for name, value in flags.items()}
    paths = "{" + ", ".join(f"{name!r}: Path({value!r})" for name, value in flags.items()) + "}"
    code = PEAK.format(script=script, config=names[script], flags=paths)
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, size = done.stdout.splitlines()
    return int(size), said


def test_splitting_takes_the_memory_that_the_page_promises(tmp_path):
    """A line of 100 MB takes some megabytes, also of JSON."""
    with (tmp_path / "text8").open("w") as file:
        for _ in range(100):
            file.write(WORDS * (1_000_000 // len(WORDS)))
    size, said = peak("split_corpus", tmp_path / "text8", output_dir=tmp_path / "out")
    assert size < 100, said
    assert "1 document cut" in said
    (tmp_path / "text8").unlink()
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        file.write('{"text": "🐈 ')  # so that each character takes four bytes
        for _ in range(60):
            file.write(WORDS * (1_000_000 // len(WORDS)))
        file.write('", "list": [')
        for number in range(300_000):
            file.write(f'{{"word": {number}}},')
        file.write("0]}\n")
    size, said = peak("split_corpus", tmp_path / "a.jsonl", output_dir=tmp_path / "out")
    assert size < 100, said
    assert "1 document cut" in said


def test_tokenizing_takes_the_memory_that_the_page_promises(tmp_path):
    """One line, and a token for every byte: the worst that there is. As one document it would take twice as much."""
    learn(iter(["a"]), 272, 2).save(str(tmp_path / "tokenizer.json"))
    put(tmp_path, "a.txt", WORDS.encode() * 120_000)
    size, said = peak(
        "tokenize_corpus", tmp_path / "a.txt", tokenizer_path=tmp_path / "tokenizer.json", output=tmp_path / "t"
    )
    assert "wrote 7," in said
    assert size < 1200, said
