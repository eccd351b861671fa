"""What a file is, is told by its content: read rightly under any name, or refused in a line that names it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from gptbert.errors import InputError
from gptbert.scoring.minimal_pairs import read_pairs
from gptbert.text.corpus import Corpus, CorpusConfig
from tests.texts import DOCUMENTS, jsonl

LETTERS = [f"Letter {i}: the ferry is late, please wait at pier {i}." for i in range(40)]
LINES = jsonl(LETTERS)
TEXT = "\n\n".join(LETTERS).encode()
RUSSIAN = "\n\n".join(f"Письмо {i}: паром опаздывает." for i in range(40))
CHINESE = "\n\n".join(f"第{i}封信:渡轮晚点了,请在码头等候。" for i in range(40))
PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def read(file, **settings):
    return list(Corpus(CorpusConfig(input=(file,), **settings)))


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def refused(file, **settings):
    """The one line of the error, which is the same with --on_error=skip."""
    with pytest.raises(InputError) as error:
        read(file, **settings)
    assert str(error.value).startswith(f"{file}: ") or str(error.value).startswith(f"{file}:")
    assert "\n" not in str(error.value)
    assert "--on_error" not in str(error.value)
    with pytest.raises(InputError) as skipped:
        read(file, **settings, on_error="skip")
    assert str(skipped.value) == str(error.value)
    return str(error.value)


# Read rightly


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonlines", "a.jl", "a.ndjson", "a.json", "part-00000", "a.txt", "a.dat"]
)
@pytest.mark.parametrize("content", [LINES, b"\n \n" + LINES, b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\r\n")])
def test_json_lines_under_any_name(tmp_path, name, content):
    assert read(put(tmp_path, name, content)) == LETTERS


@pytest.mark.parametrize("first", [[], ["one"], ["one", "two"]])
@pytest.mark.parametrize("last", [{"text": "word " * 20_000}, "word " * 20_000])
def test_json_lines_whose_first_kilobytes_have_no_end(tmp_path, first, last):
    content = "\n".join(json.dumps(line) for line in (*first, last, "end")).encode()
    expected = [*first, ("word " * 20_000).strip(), "end"]
    assert read(put(tmp_path, "part-00000", content)) == expected
    array = "[\n" + ",\n".join(json.dumps(line) for line in (*first, last, "end")) + "]\n"
    assert read(put(tmp_path, "part-00000", array.encode())) == expected


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_way_on_for_csv_works_or_stops(tmp_path, delimiter):
    """With long cells, line breaks in them, and a mark; a row with other cells than the header is no row."""
    texts = ["word, word; " * 20_000, 'two\nlines and a "quote"', "é"]
    cells = [["id", "text"], *([str(i), text] for i, text in enumerate(texts))]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(cells)
    (command,) = re.findall(r"\((python -c .* > FILE.jsonl)\)", refused(tmp_path / "a.csv"))
    command = command.replace("python", sys.executable, 1)
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path)
    assert read(tmp_path / "FILE.jsonl") == [text.strip() for text in texts]
    with (tmp_path / "a.csv").open("a") as file:
        file.write(f"4{delimiter}one{delimiter}two\n")
    done = subprocess.run(["sh", "-c", command], check=False, cwd=tmp_path, capture_output=True)
    assert b"ValueError" in done.stderr
    assert done.returncode != 0


def test_the_way_on_for_a_compressed_file_begins_with_unpacking(tmp_path):
    text = "A letter to the harbour.\n".encode("utf-16-le") * 9
    message = refused(put(tmp_path, "a.txt.gz", gzip.compress(text)))
    assert f"unpack it first, then convert it: iconv -f UTF-16LE -t UTF-8 {tmp_path / 'a.txt'} > FILE" in message
    assert "-t UTF-8 UNPACKED > FILE" in refused(put(tmp_path, "a.txt", bz2.compress(text)))
    assert "unpack it first, then unpack it (unzip UNPACKED)" in refused(put(tmp_path, "a", gzip.compress(zipped("a"))))
    assert f"unpack it (tar -xf {tmp_path / 'a.tgz'})" in refused(put(tmp_path, "a.tgz", gzip.compress(tar())))


@pytest.mark.parametrize("packing", PACKERS)
def test_compressed_files_under_any_name(tmp_path, packing):
    pack = PACKERS[packing]
    for name in ("a.txt.packed", "part-00000", "a.jsonl"):
        assert read(put(tmp_path, name, pack(LINES[:1000]) + pack(LINES[1000:]))) == LETTERS, "two streams in a row"
    assert read(put(tmp_path, "a.txt", pack(TEXT))) == LETTERS
    assert read(put(tmp_path, "a.txt", pack(b"\xef\xbb\xbf" + TEXT))) == LETTERS
    for size in (20, -3):
        message = refused(put(tmp_path, "a.txt", pack(LINES * 50)[:size]))
        assert f"the {packing} data is damaged or cut short" in message
    assert "compressed twice" in refused(put(tmp_path, "a.txt", pack(gzip.compress(TEXT))))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [TEXT.decode(), RUSSIAN, CHINESE, LINES.decode(), "a𝔘\n\n" * 40_000])
def test_utf16_and_utf32_are_decoded_with_a_mark_and_named_without(tmp_path, encoding, text):
    marked = ("\ufeff" + text).encode(encoding)
    expected = read(put(tmp_path, "utf8.txt", text.encode()))
    assert read(put(tmp_path, "a.txt", marked)) == expected
    assert read(put(tmp_path, "a.txt", gzip.compress(marked))) == expected
    file = put(tmp_path, "a.txt", text.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"is text in {name} without a mark" in refused(file)
    assert f"iconv -f {name} -t UTF-8 {file}" in refused(file, format="text")
    assert "iconv" in refused(file, format="jsonl")


def test_a_mark_that_does_not_fit_is_named(tmp_path):
    content = ("\ufeff" + "one two" * 20_000).encode("utf-16-le")
    assert "its mark says utf-16-le, which the rest is not" in refused(put(tmp_path, "a.txt", content + b"\x00\xdcx"))
    assert "its mark says" in refused(put(tmp_path, "a.txt", content[:-1]))


def test_files_in_two_orders_of_bytes_that_were_joined_are_named(tmp_path):
    """The second one's characters are others then, in silence."""
    little, big = (("\ufeff" + TEXT.decode() + "\n\n").encode(f"utf-16-{order}") for order in ("le", "be"))
    assert read(put(tmp_path, "a.txt", little + little)) == LETTERS * 2
    for content, order in ((little + big, "le"), (big + little, "be")):
        message = refused(put(tmp_path, "a.txt", content))
        assert f"its mark says utf-16-{order}, which the rest is not" in message
        assert "a mark of the other order of bytes" in message


VALUES = [
    {"text": "A text."},
    {"text": 'with "quotes", [brackets] and {braces}', "id": [1, {"a": None}]},
    "only a string",
]
TEXTS = ["A text.", 'with "quotes", [brackets] and {braces}', "only a string"]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "part-00000", "a.txt"])
def test_json_over_several_lines_is_read(tmp_path, indent, name):
    assert read(put(tmp_path, name, json.dumps(VALUES, indent=indent).encode())) == TEXTS
    if indent:  # as jq prints them
        several = "\n".join(json.dumps(value, indent=indent) for value in VALUES)
        assert read(put(tmp_path, name, several.encode())) == TEXTS
        assert read(put(tmp_path, name, gzip.compress(several.encode()))) == TEXTS


def test_json_over_several_lines_across_pieces_of_the_file(tmp_path):
    texts = [f"{i} é " * (i % 700) + "x" for i in range(2000)]
    values = [{"n": 123456789, "text": text} for text in texts]
    assert read(put(tmp_path, "a.json", json.dumps(values, indent=1, ensure_ascii=False).encode())) == texts


def test_damaged_json_is_named_with_its_line(tmp_path):
    whole = json.dumps([{"text": text} for text in LETTERS], indent=1)
    for content, line, reason in (
        (whole[:-1], 122, "the array has no end"),
        (whole[:400], 17, "not JSON"),
        (whole + "\n{}", 123, "more follows after the end"),
        (whole.replace("},", "}", 1), 5, "a comma is missing"),
        (whole.replace('"text": "Letter 3', '"text": Letter 3'), 11, "not JSON"),
        (whole.replace("Letter 3", "Letter \x00"), 11, "not JSON"),
    ):
        with pytest.raises(InputError, match=rf"a.json:{line}: .*{reason}|a.json:{line}: has NUL"):
            read(put(tmp_path, "a.json", content.encode()))
    file = put(tmp_path, "a.json", json.dumps([{"text": "a"}, {"txt": 1}, {"text": "b"}], indent=1).encode())
    with pytest.raises(InputError, match=r"a.json:5: the object has no `text`, only `txt` .*--on_error=skip"):
        read(file)
    assert read(file, on_error="skip") == ["a", "b"]


def tables(folder):
    table = pa.table({"text": LETTERS, "id": range(40)})
    pq.write_table(table, folder / "parquet")
    with pa.OSFile(str(folder / "file"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches(7):
            writer.write_batch(batch)
    with pa.OSFile(str(folder / "stream"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "parquet", folder / "file", folder / "stream"


def test_tables_under_any_name(tmp_path):
    for file in tables(tmp_path):
        for name in ("part-00000", "a.arrow", "a.feather", "a.parquet", "a.txt"):
            assert read(put(tmp_path, name, file.read_bytes())) == LETTERS
        assert "unpack" in refused(put(tmp_path, "a.gz", gzip.compress(file.read_bytes())))
        with pytest.raises(InputError, match=r"damaged, cut short|damaged or cut short"):
            read(put(tmp_path, "a.arrow", file.read_bytes()[:-20]))


# Refused


def tar(content=TEXT, form=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        entry = tarfile.TarInfo("letters.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def zipped(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x" * 100)
    return file.getvalue()


def database(folder):
    with sqlite3.connect(folder / "db") as connection:
        connection.execute("create table texts (text)")
    return (folder / "db").read_bytes()


def old_tar():
    """A header of before POSIX, which has no word at byte 257 but a sum."""
    header = bytearray(tar()[:512])
    header[257:512] = bytes(255)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + TEXT


REFUSED = {
    "tar": (tar(), "tar archive.*tar -xf"),
    "tar of GNU": (tar(form=tarfile.GNU_FORMAT), "tar archive"),
    "tar without a signature": (old_tar(), "tar archive"),
    "zip": (zipped("a.txt"), "zip archive.*unzip"),
    "docx": (zipped("[Content_Types].xml"), "office"),
    "npz": (zipped("a.npy"), "arrays"),
    "torch": (zipped("a/data.pkl"), "arrays"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(range(256)), "7z"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(99), "lz4 -d"),
    "compress": (b"\x1f\x9d\x90" + bytes(range(99)), "uncompress"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "pdftotext"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "image"),
    "safetensors": (save({"a": np.zeros(3)}), "safetensors"),
    "numpy": (b"\x93NUMPY\1\0" + bytes(99), "arrays"),
    "pickle": (pickle.dumps(["a text"] * 9), "pickle"),
    "program": (b"\x7fELF" + bytes(range(99)), "program"),
    "random": (np.random.default_rng(0).bytes(5000), "binary data"),
    "orc": (b"ORC\x08\x03\x10" + bytes(range(99)), "ORC"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "warc": (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n\r\n", "web archive"),
    "latin-1": ("\n".join(f"Café numéro {i}, à côté." for i in range(9)).encode("latin-1"), "another encoding.*iconv"),
    "gbk": (CHINESE.encode("gb18030"), "another encoding.*iconv"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_what_is_no_text_is_refused_by_name(tmp_path, kind, name):
    content, expected = REFUSED[kind]
    for packed in (content, gzip.compress(content)):
        file = put(tmp_path, name, packed)
        for file_format in ("auto", "text", "jsonl"):
            message = refused(file, format=file_format)
            assert re.search(expected, message) or (packed != content and "compressed twice" in message)


def test_databases_are_refused(tmp_path):
    assert "database" in refused(put(tmp_path, "a.txt", database(tmp_path)))


CSV = ("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(LETTERS))).encode()
INSISTED = {
    "csv": ("a.csv", CSV, "CSV.*csv.reader"),
    "csv without a suffix": ("part-00000", CSV, "CSV"),
    "csv of semicolons": ("a.txt", CSV.replace(b",", b";"), "CSV"),
    "tsv": ("a.tsv", CSV.replace(b",", b"\t"), "TSV"),
    "tsv without names": ("a.dat", b"".join(b"%d\t0.5\t%s\n" % (i, t.encode()) for i, t in enumerate(LETTERS)), "TSV"),
    "html": ("a.txt", b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "HTML"),
    "xml": ("a", b'<?xml version="1.0"?>\n<texts/>', "XML"),
    "rtf": ("a.txt", b"{\\rtf1\\ansi A text.}", "RTF"),
    "not a table": ("a.parquet", b"404: Not Found", "text, not what a name in .parquet says"),
    "not an archive": ("a.zip", b"404: Not Found", "text, not what a name in .zip says"),
}


@pytest.mark.parametrize("case", INSISTED)
def test_markup_and_csv_are_refused_unless_text_is_insisted_on(tmp_path, case):
    name, content, expected = INSISTED[case]
    for file in (put(tmp_path, name, content), put(tmp_path, f"{name}.gz", gzip.compress(content))):
        assert re.search(f"{expected}.*--format text", refused(file))
        assert "".join(read(file, format="text")) in content.decode().strip()


@pytest.mark.parametrize(
    "text",
    [
        "Wait, text, and more.\nOne, two, three.\nFour, five, six.\nSeven, eight, nine.",
        '"I see," he said.\n"So do I."\n\n"Good."',
        "{braces} are no JSON\n{at all}",
        "[1] A reference, [2] another.",
        "*CHI:\tno .\n*MOT:\tyes .\n" * 20,
        "ORC armies, RIFF raff, BZh and PK.",
        "Parts of <html> in a text.",
        "\ufffd replaced, \x0c a page, \x1b[1m bold",
        'An example:\n{"text": "a"}\nand so on\nas before',
        "name,size\nthis is no table",
    ],
)
def test_text_that_looks_like_something_else_is_text(tmp_path, text):
    for name in ("a.txt", "a", "a.md"):
        assert "\n\n".join(read(put(tmp_path, name, text.encode()))) == text.strip()


# NULs, and single bad lines


@pytest.mark.parametrize("file_format", ["auto", "text"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_hole_of_nuls_is_named(tmp_path, file_format, packed):
    for before in (1, 30, 3000):
        content = b"A line.\n" * before + b"half" + bytes(4096) + b"\nMore.\n"
        file = put(tmp_path, "a.txt", gzip.compress(content) if packed else content)
        assert f"a.txt:{before + 1}: has NUL bytes from column 5 on" in refused(file, format=file_format)
    file = put(tmp_path, "a.jsonl", LINES + bytes(600) + b"\n" + LINES)
    assert "a.jsonl:41: has NUL bytes from column 1 on" in refused(file)
    refused(put(tmp_path, "a.txt", bytes(1 << 20)))


def test_a_nul_within_a_json_string_is_a_bad_line(tmp_path):
    file = put(tmp_path, "a.jsonl", jsonl(["one", "t\0wo", "three"]))
    with pytest.raises(InputError, match=r"a.jsonl:2: `text` has a NUL"):
        read(file)
    assert read(file, on_error="skip") == ["one", "three"]


def test_skipping_is_advised_only_after_good_lines(tmp_path):
    for lines in (['{"content": "A text.", "id": 1}'], ["plain text"], ['"unfinished'], ["3"]):
        with pytest.raises(InputError) as error:
            read(put(tmp_path, "a.jsonl", "\n".join(lines).encode()))
        assert "--on_error" not in str(error.value)
    file = put(tmp_path, "a.jsonl", b'{"content": "A text.", "id": 1}')
    with pytest.raises(
        InputError, match=r"a.jsonl:1: .* no `text`, only `content`, `id` \(--text_field names another\); correct it$"
    ):
        read(file)
    with pytest.raises(InputError, match=r"a.jsonl:3: .* --on_error=skip"):
        read(put(tmp_path, "a.jsonl", b'"one"\n"two"\nthree\n'))


def test_a_file_of_bad_lines_is_not_skipped(tmp_path):
    bad = put(tmp_path, "a.jsonl", jsonl(["good"]) * 20 + b"{}\n" * 21)
    with pytest.raises(InputError, match=r"a.jsonl: 21 of 41 lines are bad \(51%\), too many .*a.jsonl:21: the object"):
        read(bad, on_error="skip")
    assert len(read(put(tmp_path, "b.jsonl", jsonl(["good"]) * 20 + b"{}\n" * 20), on_error="skip")) == 20
    for number in range(20):
        put(tmp_path, f"many/{number}.jsonl", b'"good"\n{}\n{}\n')
    with pytest.raises(InputError, match=r"40 of 60 lines are bad"):
        read(tmp_path / "many", on_error="skip")


def test_minimal_pairs_have_the_same_reader(tmp_path):
    line = json.dumps({"sentence_good": "One.", "sentence_bad": "Ones."}).encode() + b"\n"
    for content in (bz2.compress(line), ("\ufeff" + line.decode()).encode("utf-16-le")):
        (pair,) = read_pairs([put(tmp_path, "a.jsonl", content)])
        assert (pair.good, pair.bad) == ("One.", "Ones.")
    with pytest.raises(InputError, match="tar archive"):
        read_pairs([put(tmp_path, "a.jsonl", gzip.compress(tar()))])


def test_documents_of_the_fixture_are_read_from_a_pipe(tmp_path):
    for content, expected in ((bz2.compress(jsonl(DOCUMENTS)), DOCUMENTS), (TEXT, LETTERS), (tar(), None)):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        if expected:
            assert read(pipe) == expected
        else:
            with pytest.raises(InputError, match=r"pipe: is a tar archive"):
                read(pipe)
        writer.join()
        pipe.unlink()
