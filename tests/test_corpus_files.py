"""Which files of a folder are read, each once; what is left out is listed with the reasons."""

import bz2
import gzip
import json
import os
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from gptbert.errors import InputError
from gptbert.text import corpus_files, forecast
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.forecast import forecasts
from tests.test_file_kinds import CSV, put, tar
from tests.texts import jsonl


def read(*inputs, **settings):
    return list(Corpus(CorpusConfig(input=inputs, **settings)))


def listing(capsys, *inputs, **settings):
    capsys.readouterr()
    texts = read(*inputs, **settings)
    return texts, capsys.readouterr().err.splitlines()


def test_notes_beside_the_data_are_left_out_and_named(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(["one", "two"]))
    names = (
        "README.md", "readme.txt", "LICENSE", "Licence.txt", "NOTICE", "CITATION.cff", "dataset_card.md", "SHA256SUMS",
        "a.jsonl.md5", "md5sum.txt", "checksums.sha256", "_SUCCESS", "a.jsonl.bak", "a.jsonl~", "b.jsonl.part",
        "sub/README_de.md", ".gitattributes", "empty.txt",
    )  # fmt: skip
    for name in names:
        put(tmp_path, name, b"" if name == "empty.txt" else b"A note, and no training text.\n")
    texts, lines = listing(capsys, tmp_path)
    assert texts == ["one", "two"]
    size = (tmp_path / "a.jsonl").stat().st_size
    assert lines[0] == f"to read: JSON Lines: 1 file, {size} bytes, 2 documents"
    assert lines[1].startswith("left out: ")
    assert "README.md (about the data)" in lines[1]
    assert "13 more; give a file by itself to have it read" in lines[1]
    for name in names[:-2]:
        assert read(tmp_path / name, format="text") == ["A note, and no training text."], "named, it is read"


def test_small_files_of_json_are_documents_unless_one_object_without_text(tmp_path, capsys):
    put(tmp_path, "array.json", b'["one", "two"]')
    put(tmp_path, "object.json", b'{"text": "three"}')
    put(tmp_path, "settings.json", b'{"seed": 4}')
    put(tmp_path, "OTHER.JSON", b'{"seed": 5}')
    texts, lines = listing(capsys, tmp_path)
    assert sorted(texts) == ["one", "three", "two"]
    assert "settings.json (a JSON object without `text`, see --text_field)" in lines[1]


def test_every_left_out_file_says_why(tmp_path, capsys):
    reasons = {
        "LICENSE": (b"x", "about the data"),
        "a.sha256": (b"x", "checksums"),
        "_SUCCESS": (b"", "a marker"),
        "b.tmp": (b"x", "a copy or a part of a file"),
        "c.txt": (b"", "empty"),
        "d.safetensors": (save({"a": np.zeros(2)}), "a safetensors file"),
        "e.png": (b"\x89PNG\r\n\x1a\n" + bytes(30), "an image, a sound or a video"),
        "f.py": (b"print()", "beside JSON or tables"),
        "dataset_infos.json": (b'{\n "default": {}\n}', "a JSON object without `text`, see --text_field"),
        ".hidden": (b"x", "hidden"),
    }
    for name, (content, reason) in reasons.items():
        folder = tmp_path / name.strip("._")
        put(folder, "data.jsonl", jsonl(["data"]))
        put(folder, name, content)
        texts, lines = listing(capsys, folder)
        assert texts == ["data"]
        assert lines[1] == f"left out: {folder / name} ({reason}); give a file by itself to have it read"


def test_a_few_files_that_are_not_read_do_not_stop_a_folder(tmp_path, capsys):
    """But they do if they are a share of it that matters."""
    xml = b'<?xml version="1.0"?>\n<a>text</a>\n'
    put(tmp_path, "a.txt", b"text\n" * 20 * len(xml))
    put(tmp_path, "b.txt", xml)
    config = CorpusConfig(input=(tmp_path,))
    corpus = Corpus(config)
    assert len(list(corpus)) == 1
    left = capsys.readouterr().err.splitlines()[1]
    assert left.startswith(f"left out: {tmp_path / 'b.txt'} (XML, not read); ")
    assert corpus.tally.figures().startswith(f"{len(xml)} bytes of files were left out, 100.0% of")
    put(tmp_path, "c.txt", xml)
    with pytest.raises(InputError, match=rf"{tmp_path}/b.txt: is XML and not read as training text; "):
        Corpus(config)


def test_markdown_is_data_where_there_is_no_other(tmp_path, capsys):
    put(tmp_path, "one/a.md", b"one")
    put(tmp_path, "one/b.rst", b"two")
    put(tmp_path, "one/README.md", b"no")
    assert read(tmp_path / "one") == ["one", "two"]
    put(tmp_path, "one/c.txt", b"three")
    assert read(tmp_path / "one") == ["one", "two", "three"]
    put(tmp_path, "one/sub/d.jsonl", jsonl(["four"]))
    assert read(tmp_path / "one") == ["three", "four"]
    assert read(tmp_path / "one" / "a.md", tmp_path / "one") == ["one", "three", "four"]


@pytest.mark.parametrize("form", ["jsonl", "json", "blank_line", "line", "gzip", "bzip2", "parquet", "arrow"])
def test_documents_are_foretold(tmp_path, form, monkeypatch):
    """Exactly if the files are small, to some per cent from the beginning of a large one."""
    random = Random(0)
    texts = [random.randbytes(random.randrange(10, 180)).hex() for _ in range(30_000)]
    content = {
        "json": lambda: json.dumps([{"text": text} for text in texts]).encode(),
        "blank_line": lambda: "\n\n".join(texts).encode(),
        "line": lambda: "\n".join(texts).encode(),
        "gzip": lambda: gzip.compress(jsonl(texts), 1),
        "bzip2": lambda: bz2.compress(jsonl(texts)),
        "jsonl": lambda: jsonl(texts),
    }
    table = pa.table({"text": texts})
    if form == "parquet":
        pq.write_table(table, tmp_path / "a", compression="none", use_dictionary=False)
    elif form == "arrow":
        with pa.ipc.new_stream(tmp_path / "a", table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    else:
        put(tmp_path, "a", content[form]())
    config = CorpusConfig(input=(tmp_path,), text_documents="line" if form == "line" else "blank_line")
    assert str(_forecast(config, monkeypatch, 1 << 30)) == "30,000 documents"
    about = _forecast(config, monkeypatch, 1 << 17)
    assert not about.exact
    packed = form in {"gzip", "bzip2"}
    assert about.documents * about.size / about.sampled == pytest.approx(30_000, rel=0.5 if packed else 0.1)
    assert str(about).startswith("about ")


def test_what_cannot_be_foretold_is_not(tmp_path):
    put(tmp_path, "a.parquet", b"PAR1" + bytes(2000) + b"PAR1")
    config = CorpusConfig(input=(tmp_path,))
    (unknown,) = forecasts(Corpus(config)._listing.sources, config, None).values()
    assert str(unknown) == "an unknown number of documents"


def _forecast(config, monkeypatch, sampled_bytes):
    monkeypatch.setattr(forecast, "SAMPLED_BYTES", sampled_bytes)
    monkeypatch.setattr(forecast, "SAMPLED_PACKED", sampled_bytes)
    (found,) = forecasts(Corpus(config)._listing.sources, config, None).values()
    return found


def test_a_long_line_is_not_read_twice_to_foretell_its_pieces(tmp_path, monkeypatch):
    put(tmp_path, "a.jsonl", jsonl(["one"]) + b'"' + b"word " * 3_000_000 + b'"\n')
    read = []
    monkeypatch.setattr(forecast.DocumentReader, "_count", lambda _, size: read.append(size))
    corpus = Corpus(CorpusConfig(input=(tmp_path,)))
    (told,) = forecasts(corpus._listing.sources, corpus.config, None).values()
    assert sum(read) < 10_000_000
    assert str(told).startswith("about ")


def test_a_mixed_folder_is_read_and_listed_by_kind(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(["one", "two"]))
    put(tmp_path, "b.txt", b"three\n\nfour\n\nfive")
    put(tmp_path, "c", jsonl(["six"]))
    pq.write_table(pa.table({"text": ["seven"]}), tmp_path / "d.parquet")
    texts, (before, after) = listing(capsys, tmp_path)
    assert texts == ["one", "two", "three", "four", "five", "six", "seven"]
    assert before == (
        f"to read: JSON Lines: 2 files, {len(jsonl(['one', 'two', 'six']))} bytes, 3 documents; "
        "plain text: 1 file, 17 bytes, 3 documents; "
        f"Parquet: 1 file, {(tmp_path / 'd.parquet').stat().st_size:,} bytes, 1 document"
    )
    assert after == (
        "read: JSON Lines: 3 documents, 9 bytes of text; plain text: 3 documents, 13 bytes of text; "
        "Parquet: 1 document, 5 bytes of text"
    )


def test_data_of_other_kinds_in_a_folder_is_refused(tmp_path):
    put(tmp_path, "a.jsonl", jsonl(["one"]))
    for name, content in (("b.tar", tar()), ("b.csv", CSV), ("b", "Tim\n".encode("utf-16-le") * 9)):
        file = put(tmp_path, name, content)
        with pytest.raises(InputError, match=f"{file}: is "):
            Corpus(CorpusConfig(input=(tmp_path,)))
        file.unlink()


def test_a_folder_of_notes_only_says_what_was_left_out(tmp_path):
    put(tmp_path, "README.md", b"A note.")
    put(tmp_path, ".git/config", b"x")
    with pytest.raises(
        InputError, match=r"holds no file to read \(left out: README.md \(about the data\), .git \(hidden\);"
    ):
        Corpus(CorpusConfig(input=(tmp_path,)))


# Links


def test_linked_folders_are_read_once_and_loops_end(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    put(corpus, "books/a.jsonl", jsonl(["book"]))
    put(tmp_path, "elsewhere/b.jsonl", jsonl(["letter"]))
    put(tmp_path, "elsewhere/sub/c.jsonl", jsonl(["note"]))
    (corpus / "letters").symlink_to(tmp_path / "elsewhere")
    assert read(corpus) == ["book", "letter", "note"]
    (corpus / "again").symlink_to("books")
    (corpus / "loop").symlink_to(".")
    (corpus / "books" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(corpus)
    (tmp_path / "elsewhere" / "sub" / "itself").symlink_to("../sub")
    (corpus / "more").symlink_to(tmp_path / "elsewhere" / "sub")
    texts, lines = listing(capsys, corpus)
    assert sorted(texts) == ["book", "letter", "note"]
    assert "a link to a folder that is read already" in lines[1]
    assert sorted(read(corpus, corpus / "books", tmp_path / "elsewhere")) == ["book", "letter", "note"]


def test_linked_files_are_read_once(tmp_path, capsys):
    """As in the caches of Hugging Face, where names are links to files without a suffix."""
    put(tmp_path, "blobs/8f3a", jsonl(["one"]))
    put(tmp_path, "snapshot/b.txt", b"two")
    (tmp_path / "snapshot" / "a.jsonl").symlink_to("../blobs/8f3a")
    assert read(tmp_path / "snapshot") == ["one", "two"]
    (tmp_path / "snapshot" / "a2.jsonl").symlink_to("b.txt")
    os.link(tmp_path / "snapshot" / "b.txt", tmp_path / "snapshot" / "c.txt")
    texts, lines = listing(capsys, tmp_path / "snapshot")
    assert texts == ["one", "two"]
    assert f"a2.jsonl (a link to {tmp_path / 'snapshot' / 'b.txt'}, which is read already)" in lines[1]


def test_broken_links_are_named(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(["one"]))
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "c").symlink_to("c")
    texts, lines = listing(capsys, tmp_path)
    assert texts == ["one"]
    assert f"left out: {tmp_path / 'b.jsonl'} (a broken link), {tmp_path / 'c'} (a broken link)" in lines[1]
    with pytest.raises(InputError, match=r"--input .*/b.jsonl: is a link to gone.jsonl, which is not there"):
        read(tmp_path / "b.jsonl")


def test_other_names_of_a_file_and_links_to_devices_are_named(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(["one"]))
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("/dev/zero")
    texts, lines = listing(capsys, tmp_path)
    assert texts == ["one"]
    assert f"{tmp_path / 'b.jsonl'} (read already, under another name)" in lines[1]
    assert f"{tmp_path / 'c.jsonl'} (not a file)" in lines[1]


def test_what_is_no_file_is_named(tmp_path, capsys):
    put(tmp_path, "a.jsonl", jsonl(["one"]))
    os.mkfifo(tmp_path / "pipe")
    texts, lines = listing(capsys, tmp_path)
    assert texts == ["one"]
    assert "pipe (not a file)" in lines[1]


def test_files_of_several_splits_and_copies_that_are_compressed_are_warnings(tmp_path):
    root = tmp_path / "test"  # whose own name says nothing of its files
    for name in ("train_10M/a.train", "train_10M/b.train", "contest.txt"):
        put(root, name, name.encode())
    assert Corpus(CorpusConfig(input=(root,))).warnings() == []
    put(root, "babylm_dev/a.dev", b"dev")
    put(root, "b.txt.gz", gzip.compress(b"text"))
    put(root, "b.txt", b"text")
    splits = (
        f"read as one corpus, though their names are of several splits: {root}/babylm_dev/a.dev, "
        f"{root}/train_10M/a.train"
    )
    packed = f"read although the same name without the compression is read too: {root}/b.txt.gz"
    assert Corpus(CorpusConfig(input=(root,))).warnings() == [splits, packed]
    named = (root / "train_10M" / "a.train", root / "babylm_dev" / "a.dev")
    assert "of several splits" in Corpus(CorpusConfig(input=named)).warnings()[0]
    assert Corpus(CorpusConfig(input=named[:1])).warnings() == []


@pytest.mark.parametrize("look", [corpus_files._packed_too, lambda paths: corpus_files._splits_together(paths, paths)])
def test_many_files_take_no_more_time_each_than_few(look):
    """Of 100,000 compressed files, given one by one, warnings took an hour."""
    asked = 0

    class Counted(type(Path())):
        def __hash__(self):
            nonlocal asked
            asked += 1
            return super().__hash__()

        def is_relative_to(self, *others):
            nonlocal asked
            asked += 1
            return super().is_relative_to(*others)

    assert look([Counted(f"/corpus/part-{number}.jsonl.gz") for number in range(1000)]) == []
    assert asked < 10_000


def test_a_split_that_nothing_has_is_an_error(tmp_path):
    file = put(tmp_path, "train.jsonl", jsonl(["one"]))
    for inputs in ((tmp_path,), (file,)):
        with pytest.raises(InputError, match=r"--split train: .* give the files of that split alone"):
            read(*inputs, split="train")
    with pytest.raises(InputError, match=r"--dataset_config en: is of --dataset"):
        read(file, dataset_config="en")


def test_caches_of_hugging_face_are_read_once_and_by_their_names(tmp_path, capsys):
    hub = tmp_path / "datasets--a--b"
    put(hub, "blobs/0a1b", b"A text.")
    put(hub, "blobs/2c3d", b"---\nlicense: mit\n---\nA card.")
    put(hub, "snapshots/0/.keep", b"")
    (hub / "snapshots" / "0" / "a.txt").symlink_to("../../blobs/0a1b")
    (hub / "snapshots" / "0" / "README.md").symlink_to("../../blobs/2c3d")
    texts, lines = listing(capsys, hub)
    assert texts == ["A text."]
    assert "blobs (read by the names in snapshots)" in lines[1]
    for name in ("x-train.arrow", "cache-0123456789abcdef.arrow", "cache-0123456789abcdef_00000_of_00002.arrow"):
        with pa.ipc.new_stream(str(tmp_path / name), pa.schema({"text": pa.string()})) as stream:
            stream.write_table(pa.table({"text": ["one"]}))
    (tmp_path / "blobs").mkdir()
    put(tmp_path / "blobs", "b.txt", b"two")
    assert read(tmp_path) == ["two", "A text.", "one"]
