"""JSON that is too long for memory gives the documents, the errors and the figures that it would give whole."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptbert.errors import InputError
from gptbert.text import corpus, document_reader, documents, lines, long_text
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.long_json import MAX_DEPTH, LongJson
from gptbert.text.long_text import LongText
from tests.test_file_kinds import put

BITS = [
    *'{}[]:,"\\-.',
    *(
        "\\u",
        "d83d",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\ude00",
        "\\u0000",
        "\\n",
        "\\/",
        "\\x",
        "é",
        "🐈",
        "\xa0",
        "\u2028",
    ),
    *("0", "1", "12", "01", "e+5", "1.5", "true", "null", "nul", "NaN", "-Infinity", "\ufeff"),
    *(" ", "   ", "\t", "\0", "\x1f", "\x7f", "a", "words and words"),
    *('"text"', '"text":', '"year":', '"text":"ab c"', '{"text":"', '"year":"x",', '[1, 2,"q",', "{}", "[]"),
]
LINES = st.lists(st.sampled_from(BITS), max_size=14).map("".join)
OBJECTS = st.builds(
    lambda text, rest, year: f'{{"year": {year}, "n": [1, -2.5e3, "é", {{}}], "text": "{text}"{rest}}}',
    st.lists(st.sampled_from([bit for bit in BITS if bit not in '"\\'] + ["\\n", "\\ud83d\\ude00"]), max_size=14).map(
        "".join
    ),
    st.sampled_from(["", ' , "text": "the last counts"', ', "text": 3', ', "a": [[[', ', "b": "c', "}", "] "]),
    st.sampled_from(["1999", '"x"', "[1]", "null", '"a\\ud83d"']),
)
UNFINISHED = re.compile(r"not JSON \((Unterminated string[^)]*|Invalid \\uXXXX escape at column \d+)\)")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("long")


def outcome(file, **settings):
    """The documents with their domains and the figures, or the error."""
    domain = settings.pop("domain", None)
    try:
        read = Corpus(CorpusConfig(input=(file,), **settings), domain)
        return [list(read.with_domains()), read.tally.figures(), read.tally.counts()]
    except InputError as error:
        # where a string ends behind an escape, json.loads takes the escape for incomplete
        return UNFINISHED.sub("unfinished", str(error))


def both(file, size, **settings):
    """The outcome with everything in memory, and that with next to nothing in memory."""
    bounds = [(module, "MAX_DOCUMENT") for module in (documents, corpus, document_reader)]
    found = []
    for line, piece in ((1 << 20, 1 << 18), (size, max(1, size // 2))):
        with pytest.MonkeyPatch.context() as patch:
            for module, name in bounds:
                patch.setattr(module, name, 12)
            patch.setattr(lines, "MAX_LINE", line)
            patch.setattr(lines, "PIECE", piece)
            patch.setattr(long_text, "BLOCK", piece)
            found.append(outcome(file, **settings))
    return found


@given(
    st.lists(LINES | OBJECTS, min_size=1, max_size=4),
    st.sampled_from([b"", b"\n", b"\r\n", b"\xff\n", b"\n\xc3"]),
    st.sampled_from([1, 2, 3, 5, 16, 60]),
    st.sampled_from(["stop", "skip"]),
    st.sampled_from([None, "year"]),
)
def test_lines_are_read_in_pieces_as_they_are_whole(place, texts, end, size, on_error, domain):
    file = put(place, "a.jsonl", "\n".join(texts).encode() + end)
    whole, pieces = both(file, size, format="jsonl", on_error=on_error, domain=domain)
    assert pieces == whole


@given(
    st.lists(OBJECTS, min_size=1, max_size=3),
    st.sampled_from(["[\n%s\n]", "%s", "[%s"]),
    st.sampled_from([1, 2, 5, 60]),
)
def test_values_are_read_in_pieces_as_they_are_whole(place, texts, around, size):
    file = put(place, "a.json", (around % ",\n".join(texts)).encode())
    whole, pieces = both(file, size, on_error="skip")
    assert pieces == whole


def test_the_name_of_a_field_may_have_any_length_and_is_not_shown_whole(place):
    text = json.dumps({"n" * 300_000: 1, "txt": "a", "m" * 2_000_000: 2})
    message = outcome(put(place, "b.jsonl", text.encode()))
    assert "the object has no `text`, only `nnn" in message
    assert len(message) < 500


def read(text, size=7):
    """The value of a JSON text that comes in pieces of a size."""
    pieces = (text[start : start + size] for start in range(0, len(text), size))
    with LongText() as document:
        reader = LongJson(pieces, document, "text", None)
        value = reader.read()
        reader.end()
        return "|".join(document.pieces()), value


def test_of_fields_of_the_same_name_the_last_counts():
    text = '{"text": "first", "text": 3, "text": "last \\ud83d\\ude00 ", "a": {"text": "inside"}, "b": [{"text": 1}]}'
    found, record = read(text)
    assert found == json.loads(text)["text"].strip() == "last 😀"
    assert list(record) == ["text", "a", "b"]
    _, record = read('{"text": "first", "text": null}')
    assert record == {"text": None}


def test_what_is_not_wanted_takes_no_memory():
    """Names, numbers, depth: nothing of them is kept."""
    _, record = read(json.dumps({f"name{i}": i for i in range(5000)}), 100)
    assert len(record) == 10
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH)[1] == []
    with pytest.raises(RecursionError):
        read("[" * 10**6)
    with pytest.raises(RecursionError):
        read('{"a":' * 10**5)
    for number in ("1" * 10**6, "0." + "1" * 10**6, "-" + "1" * 5000):
        with pytest.raises(ValueError, match="digits"):
            read(f"[{number}, 1]", 1000)


@given(
    st.lists(st.sampled_from(["word", "é🐈", " ", "    ", "\t", "\nnext", "\xa0", "x" * 9, "y" * 30]), max_size=12).map(
        "".join
    ),
    st.sampled_from([1, 3, 7, 100]),
)
def test_plain_text_is_cut_where_json_is_cut(place, text, size):
    """Whitespace counts only between words: `cut` says where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "MAX_LINE", size)
        patch.setattr(lines, "PIECE", size + 7)
        patch.setattr(long_text, "BLOCK", size)
        for module in (documents, corpus, document_reader):
            patch.setattr(module, "MAX_DOCUMENT", 20)
        expected = [piece for piece in documents.cut(text.strip()) if piece]
        assert outcome(put(place, "a.json", json.dumps(text).encode()), format="jsonl")[0] == [
            ("", p) for p in expected
        ]
        assert outcome(put(place, "a.txt", text.encode() + b"\n"), format="text")[0] == [("", p) for p in expected]
