"""Documents from Parquet and Arrow files and Hugging Face datasets: every column type, and damaged files."""

import itertools
import random
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from gptbert.errors import InputError
from gptbert.text import long_text, tables
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.opened_file import kind_of
from gptbert.text.tables import table_rows
from tests.runs import write_inputs
from tests.texts import DOCUMENTS, WORDS, jsonl
from tokenize_scripts.split_corpus import SplitConfig, split_corpus
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus


def corpus(*inputs, **settings):
    return Corpus(CorpusConfig(input=inputs, **settings))


def parquet(path, values=DOCUMENTS, kind=None, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array(values, kind)
    pq.write_table(pa.table({"id": range(len(values)), column: values}), path, **options)
    return path


def write_stream(table, path, rows=None):
    """An Arrow stream, in batches of so many rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, rows)


def arrow(path, values=DOCUMENTS, kind=None):
    write_stream(pa.table({"id": range(len(values)), "text": pa.array(values, kind)}), path, rows=3)
    return path


WRITERS = {"a.parquet": parquet, "A.ARROW": arrow}
DICTIONARY = pa.dictionary(pa.int32(), pa.string())
KINDS_OF_TEXT = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), DICTIONARY]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", KINDS_OF_TEXT, ids=str)
def test_every_kind_of_text_column(tmp_path, name, kind):
    texts = [*DOCUMENTS, "", *DOCUMENTS]
    file = WRITERS[name](tmp_path / name, texts, kind)
    read = corpus(tmp_path)
    assert read.files == [file]
    assert list(read) == [*DOCUMENTS, *DOCUMENTS]
    assert (read.tally.num_documents, read.tally.empty_documents, read.tally.skipped_lines) == (8, 1, 0)


def test_row_groups_and_a_column_of_another_name(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    file = parquet(tmp_path / "a.parquet", texts, column="content", row_group_size=7)
    assert pq.ParquetFile(file).num_row_groups == 143
    assert list(corpus(file, text_field="content")) == texts
    with pytest.raises(InputError, match=r"a.parquet: has no column text, only id, content; see --text_field$"):
        list(corpus(file, on_error="skip"))
    (tmp_path / "b.jsonl").write_text('{"content": "in JSON", "text": "not this"}\n"a string"\n')
    assert list(corpus(tmp_path, text_field="content")) == [*texts, "in JSON", "a string"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        (["one", None, "two"], pa.string(), "`text` is null, not a string"),
        (["one", None, "two"], DICTIONARY, "`text` is null, not a string"),
        ([b"one", b"caf\xe9", b"two"], pa.binary(), r"not UTF-8 \(byte 0xe9 at column 4\)"),
    ],
)
def test_a_bad_row_stops_with_its_number_or_is_skipped(tmp_path, name, values, kind, reason):
    file = WRITERS[name](tmp_path / name, values, kind)
    with pytest.raises(InputError, match=f"{name}: row 2: {reason}; correct it, or leave"):
        list(corpus(file))
    read = corpus(file, on_error="skip")
    assert list(read) == ["one", "two"]
    assert read.tally.skipped_lines == 1


def test_two_columns_of_a_name_are_no_damage(tmp_path):
    pq.write_table(pa.table([["one"], ["two"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: has 2 columns text; rename all but one$"):
        list(corpus(tmp_path))


def test_bytes_that_call_themselves_a_string(tmp_path):
    values = pa.array([b"one", b"caf\xe9"]).view(pa.string())
    file = parquet(tmp_path / "a.parquet", values)
    with pytest.raises(InputError, match=r"a.parquet: row 2: not UTF-8"):
        list(corpus(file))


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([1, 2], pa.int64(), "a number"),
        ([0.5, float("nan")], pa.float16(), "a number"),
        ([True, False], pa.bool_(), "a boolean"),
        ([1, 2], pa.timestamp("ns"), "of type timestamp"),
        ([None, None], pa.null(), "null"),
        ([["a"], []], pa.list_(pa.string()), "of type list<"),
        ([{"a": b"\xff"}, None], pa.struct({"a": pa.binary()}), "of type struct<"),
    ],
)
def test_a_column_of_anything_else_has_bad_rows_only(tmp_path, values, kind, said):
    file = parquet(tmp_path / "a.parquet", values, kind)
    with pytest.raises(InputError, match=f"row 1: `text` is {said}"):
        list(corpus(file))
    read = corpus(file, on_error="skip")
    assert list(read) == []
    assert read.tally.skipped_lines == 2


def test_all_kinds_in_one_folder_in_order(tmp_path):
    parquet(tmp_path / "a" / "z.parquet", ["one"])
    (tmp_path / "a.txt").write_text("two\n\nthree")
    Dataset.from_dict({"text": ["four", "five", "six"]}).save_to_disk(tmp_path / "b" / "saved", num_shards=2)
    parquet(tmp_path / "b" / "saved.parquet", ["seven"])
    (tmp_path / "c.jsonl").write_bytes(jsonl(["eight"]))
    parquet(tmp_path / ".hidden" / "z.parquet", ["no"])
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    read = corpus(tmp_path)
    assert list(read) == words
    assert read.num_bytes == sum(file.stat().st_size for file in read.files)


def test_progress_ends_at_the_size_of_each_file(tmp_path):
    for file in (parquet(tmp_path / "a.parquet", ["x" * 50] * 40, row_group_size=9), arrow(tmp_path / "a.arrow")):
        told = []
        rows = list(table_rows(file, kind_of(file), ("text", "id"), told.append))
        assert set(rows[0]) == {"text", "id"}, "further columns are further names"
        assert sum(told) == file.stat().st_size
        assert min(told) >= 0
        assert len(told) > 1


@pytest.mark.parametrize("column", [["a", "b", "a"], [1, 2, 1], [True, False, True]])
def test_a_column_may_hold_domains(tmp_path, column):
    pq.write_table(pa.table({"text": ["one", "two", "three"], "domain": column}), tmp_path / "a.parquet")
    domains = [str(value).lower() for value in column]
    read = Corpus(CorpusConfig(input=(tmp_path,)), "domain")
    assert list(read.with_domains()) == list(zip(domains, ["one", "two", "three"], strict=True))


def test_reading_holds_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Row groups of 10 MB each in pages of 1 MB, and an unrequested column of the same size."""
    monkeypatch.setattr(tables, "BATCH_BYTES", 1_000_000)
    generator = random.Random(0)
    texts = [generator.randbytes(10_000).hex() for _ in range(1000)]
    table = pa.table({"other": texts, "text": texts})
    layout = {"row_group_size": 500, "write_batch_size": 8, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, tmp_path / "a.parquet", **layout)
    del table
    read = corpus(tmp_path)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = max(pa.total_allocated_bytes() for _ in read) - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read.tally.text_bytes == 20_000_000 < read.num_bytes / 2
    assert peak < 2_000_000
    assert 500_000 < most < 5_000_000


def shorten(monkeypatch, document, text, block):
    """A cut after fewer characters, views of texts of fewer bytes, and those read in smaller blocks."""
    for module in ("documents", "document_reader", "corpus"):
        monkeypatch.setattr(f"gptbert.text.{module}.MAX_DOCUMENT", document)
    monkeypatch.setattr(tables, "LONG_TEXT", text)
    monkeypatch.setattr(long_text, "BLOCK", block)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", KINDS_OF_TEXT, ids=str)
def test_long_texts_are_cut_as_those_of_lines_are(tmp_path, monkeypatch, name, kind):
    """Longer and shorter than what is handed on as a view, with characters of every width across the blocks."""
    shorten(monkeypatch, document=300, text=400, block=7)
    generator = random.Random(0)
    texts = [
        "".join(generator.choices("a\u00e9\u20ac\U0001f408 \n", k=length)) for length in (0, 90, 500, 2000, 3, 700)
    ]
    texts[1:1] = [None, " \n" * 500]
    WRITERS[name](tmp_path / name, texts, kind)
    (tmp_path / "lines").mkdir()
    lines = tmp_path / "lines" / "a.jsonl"
    lines.write_bytes(jsonl([text for text in texts if text is not None]))
    read, expected = corpus(tmp_path / name, on_error="skip"), corpus(lines)
    assert list(read) == list(expected)
    assert read.tally.skipped_lines == 1, "null"
    assert read.tally.cut_documents == expected.tally.cut_documents >= 3
    assert read.tally.empty_documents == expected.tally.empty_documents == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xc3\xa9" * 50 + b"\xff" + b"x" * 50, r"not UTF-8 \(byte 0xff at column 101\)"),
        (b"x" * 150 + b"\xc3", r"not UTF-8 \(byte 0xc3 at column 151\)"),
        (b"x" * 150 + b"\0", "`text` has a NUL, which no text has"),
    ],
)
def test_long_texts_are_checked_whole_before_any_of_it_is_a_document(tmp_path, monkeypatch, text, reason):
    shorten(monkeypatch, document=20, text=100, block=8)
    read = corpus(parquet(tmp_path / "a.parquet", [b"good", text, b"x" * 150], pa.binary()))
    found = []
    with pytest.raises(InputError, match=rf"a.parquet: row 2: {reason}"):
        found.extend(read)
    assert found == ["good"]


def test_a_long_text_is_no_domain(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONG_TEXT", 100)
    pq.write_table(pa.table({"text": ["one"], "domain": ["x" * 101]}), tmp_path / "a.parquet")
    for field in ("domain", "text"):
        read = Corpus(CorpusConfig(input=(tmp_path,), text_field=field), "domain")
        with pytest.raises(InputError, match="row 1: `domain` is too long for a domain"):
            list(read.with_domains())


@pytest.mark.parametrize(("name", "most"), [("a.parquet", 80), ("A.ARROW", 5)])
def test_a_long_text_is_in_memory_as_often_as_the_library_needs(tmp_path, name, most):
    """Python has none of it; of Parquet the library has its page and the column of its batch."""
    WRITERS[name](tmp_path / name, [WORDS * (20_000_000 // len(WORDS))], pa.string())
    read = iter(corpus(tmp_path / name))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    sizes = [(len(text), pa.total_allocated_bytes() - before) for text in read]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(size for size, _ in sizes) > 19_900_000
    assert max(allocated for _, allocated in sizes) < most * 1_000_000
    assert peak < 12_000_000


@pytest.mark.parametrize("name", WRITERS)
def test_a_text_that_is_stored_once_is_in_memory_once(tmp_path, name):
    text = "long " * 100_000
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None] * 100), pa.array([text, "short"]))
    if name == "a.parquet":
        pq.write_table(pa.table({"text": column.cast(pa.string())}), tmp_path / name)
    else:
        write_stream(pa.table({"text": column}), tmp_path / name)
    read = corpus(tmp_path, on_error="skip")
    before = pa.total_allocated_bytes()
    lengths, most = [], 0
    for document in read:
        lengths.append(len(document))
        most = max(most, pa.total_allocated_bytes() - before)
    assert lengths == [len(text.rstrip()), len("short")] * 100
    assert most < 10 * len(text)


@pytest.mark.parametrize("index", [2, -1])
def test_an_index_without_a_text_is_damage(tmp_path, index):
    column = pa.DictionaryArray.from_arrays(pa.array([0, index], pa.int8()), pa.array(["one", "two"]), safe=False)
    write_stream(pa.table({"text": column}), tmp_path / "a.arrow")
    with pytest.raises(InputError, match=r"a.arrow: damaged, cut short or not to be read \("):
        list(corpus(tmp_path))


# Hugging Face


@pytest.fixture
def saved(tmp_path):
    parts = {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(5)]}) for name in ("train", "dev")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_dict_of_datasets_wants_a_split(saved):
    assert list(corpus(saved, split="dev")) == [f"dev {i}" for i in range(5)]
    assert list(corpus(saved / "train")) == [f"train {i}" for i in range(5)]
    with pytest.raises(InputError, match=r"saved: has several splits; choose with --split: train, dev$"):
        corpus(saved)
    with pytest.raises(InputError, match=r"saved: has no split test; choose with --split: train, dev$"):
        corpus(saved.parent, split="test")
    (saved / "dataset_dict.json").write_text('{"splits": ["dev"]}')
    assert len(list(corpus(saved))) == 5


def test_damaged_folders_of_datasets(saved):
    (saved / "dev" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"dev/data-00000-of-00001.arrow: is missing"):
        corpus(saved, split="dev")
    for content in ("", "{", "[]", '{"_data_files": 3}'):
        (saved / "dev" / "state.json").write_text(content)
        with pytest.raises(InputError, match=r"dev/state.json: .*save the dataset again$"):
            corpus(saved, split="dev")


@pytest.mark.parametrize("name", ["json", "text", "parquet", "csv"])
def test_a_reader_is_no_dataset(tmp_path, monkeypatch, name):
    """The library reads the files of the current folder then, even where a folder is called so."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    (tmp_path / f"other.{name}").write_text('{"text": "a file that nobody named"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^--dataset {name}: is a reader of .* --input, or \./{name} for a folder"):
        list(Corpus(CorpusConfig(dataset=name)))
    assert list(Corpus(CorpusConfig(dataset=f"./{name}"))) == DOCUMENTS


def test_files_that_the_library_leaves_out_are_told(tmp_path, capsys):
    """Of files of several kinds it reads those of one, and of those called train no others."""
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(DOCUMENTS))
    assert list(Corpus(CorpusConfig(dataset=str(tmp_path)))) == DOCUMENTS * 3
    assert "leaves out" not in capsys.readouterr().err
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "inside/b.txt", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("A text.\n")
    assert list(Corpus(CorpusConfig(dataset=str(tmp_path)))) == DOCUMENTS * 3
    assert "library datasets leaves out a.txt, inside/b.txt; --input reads" in capsys.readouterr().err
    (tmp_path / "2.jsonl").rename(tmp_path / "train.jsonl")
    assert list(Corpus(CorpusConfig(dataset=str(tmp_path)))) == DOCUMENTS
    assert "leaves out 0.jsonl, 1.jsonl, a.txt, inside/b.txt; " in capsys.readouterr().err


def test_a_dataset_by_name_is_streamed(tmp_path):
    """A folder of data files stands in for a name on the Hub."""
    for name in ("train", "test"):
        parquet(tmp_path / "hub" / f"{name}.parquet", [name, None, "x"], column="body")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    assert list(Corpus(CorpusConfig(dataset=str(tmp_path / "json")))) == DOCUMENTS
    settings = {"dataset": str(tmp_path / "hub"), "text_field": "body", "split": "test"}
    read = Corpus(CorpusConfig(**settings, on_error="skip"))
    assert list(read) == ["test", "x"]
    assert read.tally.skipped_lines == 1
    for changes, message in (
        ({}, "hub: row 2: `body` is null, not a string"),
        ({"split": None}, "hub: has several splits; choose with --split: train, test"),
        ({"split": "dev"}, "hub: cannot be opened .*dev"),
        ({"dataset_config": "en"}, "hub: cannot be opened .*en"),
        ({"text_field": "text"}, "hub: has no column text, only id, body"),
        ({"dataset": str(tmp_path / "none")}, "none: cannot be opened"),
        ({"input": (tmp_path,)}, "--input and --dataset: give one of the two"),
    ):
        with pytest.raises(InputError, match=message) as error:
            list(Corpus(CorpusConfig(**settings | changes)))
        assert "\n" not in str(error.value)
    (tmp_path / "json" / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "cut')
    with pytest.raises(InputError, match="json: cannot be read"):
        list(Corpus(CorpusConfig(dataset=str(tmp_path / "json"))))


# Broken input


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_cut_anywhere_is_one_line(tmp_path, name):
    file = WRITERS[name](tmp_path / name, [f"{i} " * 20 for i in range(9)])
    content = file.read_bytes()
    for size in range(0, len(content), 13):
        file.write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{name}: damaged, cut short|damaged or cut short") as error:
            list(corpus(file, on_error="skip"))
        assert "\n" not in str(error.value)


def refusals(file, contents):
    """The messages with which these contents of a file are refused, one line each; the others are read."""
    messages = []
    for content in contents:
        file.write_bytes(content)
        try:
            list(corpus(file, on_error="skip"))
        except InputError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    return messages


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_file_is_one_line_or_other_text(tmp_path, name):
    file = WRITERS[name](tmp_path / name, [f"{i} " * 20 for i in range(9)], DICTIONARY)
    content, generator = file.read_bytes(), random.Random(0)

    def damaged():
        changed = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        return changed

    assert len(refusals(file, (damaged() for _ in range(200)))) > 20


def test_damage_anywhere_in_the_description_of_a_parquet_file_is_no_end_of_the_process(tmp_path, monkeypatch):
    """Where texts that are stored once are looked for, too."""
    monkeypatch.setattr(tables, "EXPANDED_BYTES", 0)
    file = parquet(tmp_path / "a.parquet", ["one", "two"] * 9)
    content = file.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    places = itertools.product(range(begin, len(content)), (1, 2))
    damaged = (content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :] for place, bit in places)
    assert len(refusals(file, damaged)) > 50


def test_without_the_libraries_is_one_line(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"a.parquet: takes the library pyarrow; pip install datasets pyarrow$"):
        corpus(tmp_path)
    with pytest.raises(InputError, match=r"--dataset x: takes the library datasets; pip install datasets pyarrow$"):
        list(Corpus(CorpusConfig(dataset="x")))
    assert list(corpus(tmp_path / "a.jsonl")) == DOCUMENTS, "which other files do not need"


# Scripts


def test_scripts_make_the_same_of_a_parquet_copy(tmp_path):
    inputs = write_inputs(tmp_path, train_characters=20_000)
    texts = list(corpus(inputs / "train.jsonl"))
    file = parquet(tmp_path / "train.parquet", texts, row_group_size=2)
    output = tmp_path / "of_parquet.safetensors"
    tokenize_corpus(TokenizeConfig(input=(file,), tokenizer_path=inputs / "tokenizer.json", output=output))
    assert output.read_bytes() == (inputs / "train.safetensors").read_bytes()
    for name, path in (("parquet", file), ("jsonl", inputs / "train.jsonl")):
        split_corpus(SplitConfig(input=(path,), output_dir=tmp_path / name, valid_fraction=0.3))
    for side in ("train", "validation", "test"):
        one, other = ((tmp_path / name / f"{side}.jsonl").read_bytes() for name in ("parquet", "jsonl"))
        assert one == other
