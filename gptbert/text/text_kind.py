"""Which text a file is, by its first bytes and then its name: encodings, JSON Lines, JSON, CSV, plain text."""

import csv
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from gptbert.text.file_kind import BINARY, PACKED_SUFFIXES, FileKind

TEXT = FileKind("plain text", "text")
JSONL = FileKind("JSON Lines", "jsonl")
JSON = FileKind("JSON", "json")

_GIVE_TEXT = "give the text itself"
CHECKSUMS = FileKind("a list of checksums", way_on=_GIVE_TEXT, is_text=True, holds_no_text=True)
ADDRESSES = FileKind("a list of addresses", way_on=_GIVE_TEXT, is_text=True, holds_no_text=True)
SUBTITLES = FileKind(
    "a file of subtitles, with their times,",
    way_on="take what is said (grep -vE '^[0-9]*[[:space:]]*$|-->' {file} > FILE)",
    is_text=True,
)
CONLL = FileKind(
    "a table of words (CoNLL)", way_on="take its sentences (sed -n 's/^# text = //p' {file} > FILE)", is_text=True
)
NUMBERED = FileKind(
    "a list of numbered texts", way_on="take the texts (cut -f 2- {file} > FILE; --text_documents line)", is_text=True
)
ISO_2022 = FileKind(
    "text in another encoding than UTF-8",
    way_on="convert it (iconv -f ISO-2022-JP -t UTF-8 {file} > FILE, or ISO-2022-KR, ISO-2022-CN)",
)
_FROM_PYTHON = (
    'import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) for line in open(sys.argv[1], encoding="utf-8")]'
)
PYTHON = FileKind(
    "lines of Python's dictionaries, which are no JSON,",
    way_on=f"make JSON Lines of it (python -c '{_FROM_PYTHON}' {{file}} > FILE.jsonl)",
    is_text=True,
)
NUMBERS = FileKind("a list of numbers", way_on="give the text itself, not its token ids", is_text=True)
MARKUP = FileKind("HTML or XML", way_on="extract its text", is_text=True)
CARRIAGE_RETURNS = FileKind(
    "text whose lines end in carriage returns alone", way_on=r"convert it (tr '\r' '\n' < {file} > FILE)", is_text=True
)

# Marks at the start of a file, longest first.
MARKS = {
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
JSONL_SUFFIXES = {".jsonl", ".ndjson", ".jsonlines", ".jl", ".json"}
CSV_SUFFIXES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
BINARY_SUFFIXES = {
    ".parquet", ".arrow", ".feather", ".orc", ".avro", ".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".doc", ".docx",
    ".odt", ".epub", ".xls", ".xlsx", ".png", ".jpg", ".jpeg", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".pkl",
    ".h5", ".hdf5", ".db", ".sqlite",
}  # fmt: skip

_LINES = 50  # of the head, looked at
_CHARACTERS = 4096  # looked at to tell an encoding
_FEW_LINES = 3  # enough to say that a file is in another encoding, or JSON Lines whatever the next one is
_ISO_2022 = re.compile(rb"\x1b\$[@AB()*]")  # bytes of ASCII stand for other characters from here on
_OBJECT = re.compile(r'\{\s*(?:"(?:[^"\\\n]|\\.)*"\s*:|\})')
_ARRAY = re.compile(
    r'\[\s*(?:\{|\]\s*\Z|"(?:[^"\\\n]|\\.)*(?:"\s*[,\]]|\Z))'
)  # its first string may not end in the head
_LONG_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*\Z')
# Kinds of text of which so many lines look so. The patterns take time in proportion to a line's length.
_LINES_OF = (
    (CHECKSUMS, re.compile(r"(?:\w[\w-]* ?\(.*\) ?= ?)?[0-9a-fA-F]{32,128}(?:\s.*)?"), 1),
    (ADDRESSES, re.compile(r"[a-z][a-z0-9+]*://\S+\s*"), 1),
    (NUMBERS, re.compile(r"(?=\D*\d)[-+.,;\d\s\[\]]+"), 1),
    (NUMBERED, re.compile(r"\d+\t[^\t]+"), 1),
    (PYTHON, re.compile(r"\{'[^']*': .*\}\s*"), 1),
    (CONLL, re.compile(r"\d\S*\t[^\t]+(?:\t[^\t]*){6,}"), 0.5),
    (SUBTITLES, re.compile(r"(?:\d+:)?\d\d:\d\d[.,]\d{3} --> .*"), 0.1),
)
_WITH_TAGS = {".md", ".markdown", ".rst"}  # of pages; they are prose all the same
_TAG = re.compile(r"<([A-Za-z][\w:.-]*)(?:\s[^<>]*)?>")
_NO_JSON = object()


def mark_of(head: bytes) -> tuple[bytes, str]:
    """The mark that a text begins with, and the encoding that it says; (b"", "utf-8") without one."""
    return next(((mark, encoding) for mark, encoding in MARKS.items() if head.startswith(mark)), (b"", "utf-8"))


def text_kind(head: bytes, name: str, complete: bool, text_field: str) -> FileKind:
    """The kind of a file that is no known binary kind.

    Args:
        head: its first bytes, unpacked.
        name: its name, a second opinion.
        complete: whether they are all.
        text_field: a column of this name tells that a file is CSV.
    """
    suffix = unpacked_suffix(name)
    mark, encoding = mark_of(head)
    if encoding != "utf-8":
        text = head[len(mark) :].decode(encoding, "replace")  # an error stops the reading, where it can be named
    else:
        head = head[len(mark) :]
        if reason := _not_utf8(head, suffix):
            return reason
        if len(_ISO_2022.findall(head)) >= _FEW_LINES:
            return ISO_2022
        text = head.decode("utf-8", "replace")
    if "\n" not in text.strip() and text.strip().count("\r") >= _FEW_LINES:
        return CARRIAGE_RETURNS
    return _format(text, suffix, complete, text_field)


def unpacked_suffix(name: str) -> str:
    """The suffix of a file's name in lower case, that before .gz and the like if it ends in one."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _not_utf8(head: bytes, suffix: str) -> FileKind | None:
    """Why a file is not UTF-8, unless only single lines are not, or a hole of NULs is in it."""
    sample = head.replace(b"\0", b"")
    controls = len(re.findall(rb"[\x01-\x07\x0e-\x1a\x1c-\x1f]", sample))
    valid = _is_utf8(sample)
    if suffix in BINARY_SUFFIXES and (b"\0" in head or controls or not valid):
        return BINARY
    many_controls = controls > len(sample) / 10
    wide = len(head) - len(sample) > len(head) / 5 or many_controls or (controls and not valid)
    if wide and (encoding := _wide_encoding(head)):
        convert = f"convert it: iconv -f {encoding} -t UTF-8 {{file}} > FILE"
        return FileKind(f"text in {encoding} without a mark", way_on=convert)
    if many_controls or (not valid and (b"\0" in head or controls > len(sample) / 100)):
        return BINARY
    if valid:
        return None
    lines = [line for line in sample.split(b"\n")[:-1] or [sample] if not line.isascii()]
    wrong = sum(not _is_utf8(line) for line in lines)
    if wrong >= _FEW_LINES and wrong > len(lines) / 2:
        convert = (
            "convert it (iconv -f ENCODING -t UTF-8 {file} > FILE, ENCODING being such as WINDOWS-1252 or GB18030)"
        )
        return FileKind("text in another encoding than UTF-8", way_on=convert)
    return None


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end == len(content) and error.reason == "unexpected end of data"  # the head may end in a character
    return True


def _wide_encoding(head: bytes) -> str:
    """The encoding of text in units of two or four bytes without a mark; "" if the bytes cannot be that."""
    for encoding, unit in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)):
        sample = head[: _CHARACTERS * unit]
        sample = sample[: len(sample) // unit * unit]
        try:
            text = sample.decode(encoding)
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 2 or error.start == 0:  # a pair may be cut in two
                continue
            text = sample[: error.start].decode(encoding)
        odd = sum(
            unicodedata.category(character) in {"Cc", "Cn", "Co"} and character not in "\t\n\r" for character in text
        )
        spaced = len(text) < 100 or any(mark in text for mark in " \n\u3000\u3002")
        if text and spaced and odd <= len(text) / 100:
            return encoding
    return ""


def _format(text: str, suffix: str, complete: bool, text_field: str) -> FileKind:
    lines = text.split("\n")
    beginning = lines.pop().lstrip() if not complete and len(lines) > 1 else ""  # of a line that does not end here
    lines = [line for line in lines if not line.isspace() and line][:_LINES]
    if kind := _json_kind(text.lstrip(), lines, beginning, suffix, complete):
        return kind
    if suffix in JSONL_SUFFIXES:
        return JSONL
    if (delimiter := _csv_delimiter(lines, text_field)) or (delimiter := _named_delimiter(lines, suffix)):
        options = "" if delimiter == "," else f", delimiter={json.dumps(delimiter)}"
        program = (
            'import csv, json, sys; csv.field_size_limit(2**31 - 1); file = open(sys.argv[1], newline="", '
            f'encoding="utf-8-sig"); rows = csv.reader(file, strict=True{options}); names = next(rows); '
            "[print(json.dumps(dict(zip(names, row, strict=True)))) for row in rows if row]"
        )
        convert = f"make JSON Lines of it (python -c '{program}' {{file}} > FILE.jsonl)"
        return FileKind("TSV" if delimiter == "\t" else "CSV", way_on=convert, is_text=True)
    if kind := _no_prose(text.lstrip(), lines, suffix, complete):
        return kind
    if suffix in BINARY_SUFFIXES and text:
        return FileKind(f"text, not what a name in {suffix} says,", way_on="fetch it again", is_text=True)
    return TEXT


def _no_prose(text: str, lines: Sequence[str], suffix: str, complete: bool) -> FileKind | None:
    """The kind of a text that is markup, or has lines that nobody says."""
    tag = None if suffix in _WITH_TAGS else _TAG.match(text)
    if tag and (f"</{tag[1]}>" in text or text.count("</") >= _FEW_LINES or ('="' in tag[0] and not complete)):
        return MARKUP
    for kind, pattern, share in _LINES_OF:
        if lines and sum(bool(pattern.fullmatch(line)) for line in lines) >= share * len(lines):
            return kind
    return None


def _json_kind(text: str, lines: Sequence[str], beginning: str, suffix: str, complete: bool) -> FileKind | None:
    """JSON Lines, or one JSON document; None if it is neither beyond doubt."""
    first = text[:1]
    if not first or first not in '{["':
        return None
    whole = complete or len(lines) > 1 or "\n" in text  # the first line is
    values = [_parsed(line) for line in lines] if whole else []
    if len(values) < _FEW_LINES and _NO_JSON not in values:
        values += [{}] if _OBJECT.match(beginning) else [""] if _LONG_STRING.match(beginning) else []
    if values and sum(isinstance(value, dict) for value in values) >= max(1, len(values) / 2):
        return JSONL
    if first == "{" and _OBJECT.match(text):
        return JSON if whole and len(lines) > 1 else JSONL
    if first == "[":
        return _array_kind(text, values, suffix)
    strings = len(values) > 1 and suffix != ".txt" and all(isinstance(value, str | dict) for value in values)
    return JSONL if strings or (not whole and _LONG_STRING.match(text)) else None


def _array_kind(text: str, values: Sequence[Any], suffix: str) -> FileKind | None:
    """The kind of a text that begins with a bracket."""
    if len(values) > 1 and isinstance(values[0], list):
        return JSONL if all(isinstance(value, list) for value in values) else None  # JSONL refuses each such line
    return JSON if _ARRAY.match(text) or suffix == ".json" else None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _NO_JSON


def _named_delimiter(lines: Sequence[str], suffix: str) -> str:
    """What separates the columns of a file that is called CSV or TSV; "" if it is called otherwise."""
    usual = CSV_SUFFIXES.get(suffix, "")
    names = lines[0] if lines and usual else ""
    return max((usual, *",;\t"), key=names.count) if names else usual


def _csv_delimiter(lines: Sequence[str], text_field: str) -> str:
    """What separates the columns of a table whose first line names them, among them `text_field`; "" if it is none."""
    if len(lines) < 3:
        return ""
    for delimiter in ",;\t":
        names = [name.strip('" \r') for name in lines[0].removeprefix("\ufeff").split(delimiter)]
        if len(names) < 2 or text_field not in names or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
            continue
        try:
            rows = list(csv.reader(lines[1:], delimiter=delimiter))[:-1]  # the last may be cut
        except csv.Error:
            continue
        if rows and sum(len(row) == len(names) for row in rows) >= len(rows) / 2:
            return delimiter
    if len(lines) >= 10 and len({line.count("\t") for line in lines}) == 1 and lines[0].count("\t") > 1:
        return "\t"
    return ""
