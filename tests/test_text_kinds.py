"""Text that is not what it seems: refused or left out with its name, never read as something else."""

import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from gptbert.errors import InputError
from gptbert.text import lines
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.file_kind import HEAD_BYTES
from gptbert.text.tally import close
from gptbert.text.text_kind import text_kind
from tests.test_corpus_files import listing
from tests.test_file_kinds import LETTERS, LINES, TEXT, put, read, refused
from tests.texts import jsonl
from tokenize_scripts.split_corpus import SplitConfig, split_corpus

NOT_TEXT = {
    "carriage returns": (TEXT.replace(b"\n", b"\r"), r"carriage returns alone .*tr '\\r' '\\n' < "),
    "carriage returns in JSON Lines": (LINES.replace(b"\n", b"\r"), "carriage returns alone"),
    "sums": (b"d41d8cd98f00b204e9800998ecf8427e  book 1.txt\n" * 3, "a list of checksums"),
    "sums of BSD": (b"SHA256 (book 1.txt) = " + b"ab" * 32 + b"\n", "a list of checksums"),
    "a sum": (b"ab" * 32, "a list of checksums"),
    "a part of a page": (b"\n<div class='a'><p>" + LETTERS[0].encode() + b"</p></div>\n" * 3, "HTML or XML"),
    "extracted pages": (b"<doc id='7'>\n" + TEXT + b"\n</doc>\n" + TEXT, "HTML or XML"),
    "a long page, the first of several": (b'<doc id="7">\n' + TEXT * 60, "HTML or XML"),
    "token ids": (b"11 262 50256 13\n198, 3\n" * 20, "a list of numbers"),
    "a transcript with a mark": (b"\xef\xbb\xbf@UTF8\r\n@Begin\r\n*CHI:\tno .\r\n", "a CHAT transcript"),
    "a dump": (b"-- MySQL dump 10.16\n\nINSERT INTO `page` VALUES (1,'A');\n", "a dump of a database"),
    "addresses": (b"https://example.org/a\nftp://example.org/b c\n".replace(b" c", b""), "a list of addresses"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_text_that_is_no_document_is_named(tmp_path, case, capsys):
    content, reason = NOT_TEXT[case]
    file = put(tmp_path, "a", content)
    assert re.search(reason, refused(file))
    assert read(file, format="text")
    if "list" not in reason:  # too large to be a note beside the data
        return
    put(tmp_path, "b.jsonl", jsonl(["word " * 300] * 100))
    texts, lines = listing(capsys, tmp_path)
    assert len(texts) == 100
    assert re.search(
        rf"left out: {file} \({reason.partition(' .*')[0].partition(' alone')[0]}|text whose lines", lines[1]
    )


WITHIN = {  # by the way on: a file, and what it makes of it
    "(grep -vE": ("2\n\n3\n00:00:01,500 --> 00:00:02,900\nNo 2?\r\nYes.\n\n" * 9, "No 2?\nYes.\n" * 9),
    "(grep -vE '^[": ("WEBVTT\n\n" + "00:01.500 --> 00:02.900\nYes.\n\n" * 9, "WEBVTT\n" + "Yes.\n" * 9),
    "(grep": ("@UTF8\n@Begin\n*CHI:\tno .\n%mor:\tco|no .\n@End\n", "*CHI:\tno .\n"),
    "(sed": ("# text = No.\n1\tNo\tno\tINTJ\tUH\t_\t0\troot\t_\t_\n\n" * 9, "No.\n" * 9),
    "(cut": ("1\tOne.\n2\tTwo.\n", "One.\nTwo.\n"),
    "(python": ("{'text': \"It's\", 'id': 1}\n" * 2, '{"text": "It\'s", "id": 1}\n' * 2),
}


@pytest.mark.parametrize("way_on", WITHIN)
def test_the_way_to_the_text_within_annotations_works(tmp_path, way_on):
    content, text = WITHIN[way_on]
    message = refused(put(tmp_path, "a b.txt", content.encode()))
    assert way_on in message
    assert read(tmp_path / "a b.txt", format="text")
    assert ", in gzip, and not" in refused(put(tmp_path, "a.gz", gzip.compress(content.encode())))
    command = re.search(r"\(((?:grep|sed|cut|python) .*) > FILE", message)[1].replace("python ", f"{sys.executable} ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == text


def test_characters_in_escapes_are_another_encoding(tmp_path):
    assert "convert it (iconv -f ISO-2022-JP" in refused(put(tmp_path, "a", "日本語\n".encode("iso2022_jp") * 3))


def test_texts_with_addresses_and_sums_in_them_are_text(tmp_path):
    for text in (
        f"See https://example.org\nfor {'ab' * 32} .",
        "https://example.org is\na site",
        "ab" * 100,
        "deadbeef " * 9,
        "1\tone\ntwo\tand no number",
        "From 00:01.500 --> 00:02.900 nobody speaks.",
        "{'a': 1} is a dictionary of Python.",
        "<Anna> says no.\n" + "word\n" * 20_000,
    ):
        assert read(put(tmp_path, "a.txt", text.encode())) == [text.strip()]


@pytest.mark.parametrize("end", ["x", "\t", " ,x", "\t\t", "] }"])
@pytest.mark.parametrize("line", ["1", "1\t", "{'a': ", "a(", "00:"])
def test_long_lines_take_no_longer_than_others(tmp_path, line, end):
    before = time.process_time()
    text_kind((line * (HEAD_BYTES // len(line)) + end).encode(), "a.txt", complete=True, text_field="text")
    assert time.process_time() - before < 1


def test_json_lines_after_plain_text_are_named_with_their_line(tmp_path):
    """The beginning of a file says what it is; a file of two kinds has been put together by mistake."""
    text, objects = TEXT * 40, "".join(json.dumps({"text": letter}) + "\n" for letter in LETTERS).encode()
    assert len(text) > 1 << 16
    file = put(tmp_path, "a.txt", text + b"\n" + objects + text)
    number = text.count(b"\n") + 2
    assert f"a.txt:{number}: JSON Lines begin here" in refused(file)
    assert objects.decode().splitlines()[0] in "".join(read(file, format="text"))
    few = put(tmp_path, "b.txt", text + b"\n" + b"".join(objects.splitlines(True)[:5]) + text)
    assert any('{"' in document for document in read(few)), "an example in a text is text"
    long = (json.dumps({"text": "word " * 20_000}) + "\n").encode() * 9
    # of those in the first block, one is too little
    assert f"c.txt:{number + 1}: JSON Lines begin here" in refused(put(tmp_path, "c.txt", text + b"\n" + long))


def test_tags_in_markdown_are_text(tmp_path):
    text = b'<p align="center">\nA title\n</p>\n' + TEXT
    assert len(read(put(tmp_path, "a.md", text))) == len(LETTERS)
    assert "HTML or XML" in refused(put(tmp_path, "a.txt", text))


def test_marks_of_files_that_were_joined_are_none_of_a_document(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert (
        read(put(tmp_path, "a.txt", mark + TEXT + b"\n\n" + mark + TEXT + b"\n\n" + mark * 2 + TEXT))[:80]
        == LETTERS * 2
    )
    assert read(put(tmp_path, "a.jsonl", (mark + LINES) * 2 + mark)) == LETTERS * 2
    assert read(put(tmp_path, "a.json", (mark + b'{\n"text": "one"\n}\n') * 2)) == ["one"] * 2


def test_line_ends_of_a_file_are_none_of_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PIECE", 8)
    for text in ("one\ntwo\n\nthree\n", "1234567\n12345678\n123456789\n\nthree\n"):
        for content in (text, text.replace("\n", "\r\n")):
            assert read(put(tmp_path, "a", content.encode())) == [text.partition("\n\n")[0], "three"]
    content = b"one\r\ncaf\xe9\r\ntwo\r\n" + b"good\r\n" * 9
    assert read(put(tmp_path, "a", content), on_error="skip") == ["one\ntwo" + "\ngood" * 9]
    assert read(put(tmp_path, "a.jsonl", jsonl(["a\r\nb"]))) == ["a\r\nb"], "an escape is of the text"


def test_an_array_that_ends_behind_a_comma_is_cut_short(tmp_path):
    assert "the array has no end: cut short" in refused(put(tmp_path, "a.json", b'[{"text": "a"},\n{"text": "b"},\n'))


def test_what_takes_too_much_memory_to_unpack_is_not_called_damaged(tmp_path):
    packed = bytearray(lzma.compress(LINES))
    end = 12 + 4 * (packed[12] + 1)  # of the block's header, whose filter's property is the size of its dictionary
    packed[packed.index(b"\x21\x01", 12) + 2] = 36  # 1 GB
    packed[end - 4 : end] = zlib.crc32(packed[12 : end - 4]).to_bytes(4, "little")
    assert re.search(r"takes more memory to unpack .*xz -d", refused(put(tmp_path, "a.xz", bytes(packed))))
    assert "unlzma" in refused(put(tmp_path, "a.lzma", lzma.compress(LINES, format=lzma.FORMAT_ALONE)))


def test_notes_of_other_names_and_settings_of_one_line_are_left_out(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(LETTERS))
    for name in (
        "INSTALL",
        "VERSION",
        "TERMS_OF_USE.txt",
        "Makefile",
        "MANIFEST",
        "LICENSES/MIT.txt",
        "__MACOSX/a.txt",
    ):
        put(tmp_path, name, b"No training text.\n")
    put(tmp_path, "stats.json", b'{"documents": 40}')
    assert listing(capsys, tmp_path)[0] == LETTERS


def test_the_files_of_a_kind_that_is_rare_are_named(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(LETTERS * 9))
    put(tmp_path, "vocab.txt", b"word\n")
    _, lines = listing(capsys, tmp_path)
    assert "plain text: 1 file (vocab.txt), 5 bytes, 1 document" in lines[0]


def test_names_that_no_terminal_should_get_are_escaped(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(LETTERS * 9) + b"{}\n")
    for name in (b"b\n.csv", b"b\x1b[31m.csv", b"b\xff.csv"):
        Path(tmp_path, os.fsdecode(name)).write_bytes(b"id,text\n1,a\n")
    _, lines = listing(capsys, tmp_path, on_error="skip")
    (left,) = [line for line in lines if line.startswith("left out")]
    assert all(name in left for name in (r"b\n.csv", r"b\x1b[31m.csv", r"b\udcff.csv"))


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, capsys):
    file = put(tmp_path, "a\n.jsonl", jsonl(LETTERS))
    corpus = Corpus(CorpusConfig(input=(file,)))
    put(tmp_path, "a\n.jsonl", jsonl(LETTERS * 2))
    assert len(list(corpus)) == 80
    close("", [], corpus.tally.warnings())
    assert r"a\n.jsonl" in capsys.readouterr().err
    gone = Corpus(CorpusConfig(input=(file,)))
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(gone)


def test_documents_that_are_nearly_all_empty_are_a_warning(tmp_path):
    corpus = Corpus(CorpusConfig(input=(put(tmp_path, "a.jsonl", jsonl(["", " "] * 50 + ["a"])),)))
    list(corpus)
    assert corpus.tally.warnings()[0] == "100 documents were empty, and 1 were not"


def test_an_output_in_the_input_is_a_warning(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(LETTERS))
    split_corpus(SplitConfig(input=(tmp_path,), output_dir=tmp_path / "split"))
    assert f"split is in --input {tmp_path}: reading that again" in capsys.readouterr().err
    assert json.loads((tmp_path / "split/train.jsonl").read_text().splitlines()[0])
