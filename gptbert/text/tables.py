"""Rows of tables: Parquet and Arrow files, folders of `Dataset.save_to_disk`, and Hugging Face datasets by name.

Values of text columns are UTF-8 bytes, not validated yet, and None for null; of a text of more than `LONG_TEXT` bytes a
view of the library's memory. Numbers and booleans are returned as they are; a column of any other type yields that type
in place of each value. pyarrow and datasets are imported on demand, since they are an extra (`pip install datasets
pyarrow`).
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from gptbert.errors import InputError, first_line, listed, one_line
from gptbert.io.json_file import read_json
from gptbert.io.screen import log
from gptbert.text.documents import MAX_DOCUMENT
from gptbert.text.file_kind import FileKind

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import IterableDataset

BATCH_BYTES = 4_000_000  # decompressed bytes of a Parquet file in memory at once; at least one row
BATCH_ROWS = 1000  # at most
EXPANDED_BYTES = 64_000_000  # up to here a batch may have copies of texts that a Parquet file stores once
LONG_TEXT = 4 * MAX_DOCUMENT  # bytes; a longer text has more than MAX_DOCUMENT characters
_INDEX_BYTES = 8  # of a row at most, where a row group of a Parquet file stores each text once
_HEADER_BYTES = 1 << 12  # of the pages of such indices
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_SAVED_JSON_BYTES = 1 << 24  # enough for the names of many thousand files

Row = dict[str, Any]  # by column: bytes, a memoryview, a number, a boolean, None, or the type of an unsupported column


def require_library(name: str, what: str) -> ModuleType:
    """Import a library of the extra `datasets`.

    Raises:
        InputError: it is not installed; the message says that `what` needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise InputError(f"{what}: takes the library {library}; pip install datasets pyarrow") from error


def table_rows(file: Path, kind: FileKind, columns: Sequence[str], advance: Callable[[int], object]) -> Iterator[Row]:
    """Rows of a Parquet or Arrow file, a few megabytes in memory at a time.

    Args:
        file: a table.
        kind: which.
        columns: those to read; the others are not loaded.
        advance: called with the number of further bytes read from the file.

    Raises:
        InputError: a column is missing, or the file is damaged or truncated.
    """
    batches = {"parquet": _parquet_batches, "arrow_stream": _stream_batches, "arrow_file": _file_batches}[kind.reader]
    with _damage(str(file)):
        for batch in batches(file, columns, advance):
            yield from _rows(batch, columns)


def num_rows(file: Path, kind: FileKind) -> int:
    """The number of rows of a Parquet or Arrow file; 0 if it is damaged, which reading it says."""
    pyarrow = require_library("pyarrow", str(file))
    try:
        if kind.reader == "parquet":
            return require_library("pyarrow.parquet", str(file)).read_metadata(str(file)).num_rows
        with pyarrow.memory_map(str(file)) as source:
            if kind.reader == "arrow_stream":
                return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(source))
            reader = pyarrow.ipc.open_file(source)
            return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
    except (pyarrow.ArrowException, OSError, ValueError):
        return 0


def dataset_rows(
    name: str, config: str | None, split: str | None, columns: Sequence[str], advance: Callable[[int], object]
) -> Iterator[Row]:
    """Rows of a dataset by its name for `datasets.load_dataset`, streamed.

    Args:
        name: a name on the Hub, or a folder of data files.
        config: the configuration; None for the default.
        split: the split; None if there is only one.
        columns: those to read.
        advance: called with the number of further bytes of text read.

    Raises:
        InputError: the dataset, configuration, split or column does not exist or cannot be read.
    """
    where = f"--dataset {name}"
    loaded = _load_dataset(name, config, split)
    if loaded.column_names:
        _require_columns(where, columns, loaded.column_names)
        loaded = loaded.select_columns(list(columns))
    tables = iter(loaded.with_format("arrow").iter(BATCH_ROWS))
    while True:
        try:
            table = next(tables, None)
        except Exception as error:  # from the network or from a file format's library
            raise InputError(f"{where}: cannot be read ({first_line(error) or type(error).__name__})") from error
        if table is None:
            return
        _require_columns(where, columns, table.column_names)
        with _damage(where):
            yield from _rows(table, columns)
        advance(table.nbytes)


def saved_dataset_files(folder: Path, names: Sequence[str], split: str | None) -> list[Path] | None:
    """The Arrow files of a dataset written by `save_to_disk`, in order; None if the folder is not such a dataset.

    Args:
        folder: the folder in question.
        names: the names of its files.
        split: the split of a DatasetDict to read; None if there is only one.

    Raises:
        InputError: a DatasetDict lacks that split, or files of the dataset are missing.
    """
    if "dataset_dict.json" in names:
        splits = _saved_list(folder / "dataset_dict.json", "splits")
        if split is None and len(splits) == 1:
            split = str(splits[0])
        if split is None or split not in splits:
            wanted = f"has no split {split}" if split else "has several splits"
            raise InputError(f"--input {folder}: {wanted}; choose with --split: {', '.join(map(str, splits))}")
        folder = folder / split
    elif not {"state.json", "dataset_info.json"} <= set(names):
        return None
    entries = _saved_list(folder / "state.json", "_data_files")
    files = [folder / Path(str(entry.get("filename") if isinstance(entry, dict) else entry)).name for entry in entries]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: is missing from the dataset; copy it again")
    return files


def _saved_list(file: Path, key: str) -> list[Any]:
    try:
        content = read_json(file, _SAVED_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}); save the dataset again") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise InputError(f"{file}: has no list {key}; save the dataset again")
    return content[key]


def _parquet_batches(
    file: Path, columns: Sequence[str], advance: Callable[[int], object]
) -> Iterator["pa.RecordBatch"]:
    parquet = require_library("pyarrow.parquet", str(file))
    # read a row group one buffer at a time; by default the library would read the whole column at once
    settings = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
    with parquet.ParquetFile(str(file), **settings) as opened:
        _require_columns(str(file), columns, opened.schema_arrow.names)
        metadata, size = opened.metadata, file.stat().st_size
        rows = told = 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            batch_rows = BATCH_BYTES * row_group.num_rows // max(1, row_group.total_byte_size)
            batch_rows = min(max(1, batch_rows), BATCH_ROWS, max(1, row_group.num_rows))
            may_expand = batch_rows > 1 and batch_rows * row_group.total_byte_size > EXPANDED_BYTES
            stored_once = [name for name in columns if may_expand and _is_stored_once(opened, group, name)]
            own = {"metadata": metadata, "read_dictionary": stored_once, **settings}
            with parquet.ParquetFile(str(file), **own) if stored_once else nullcontext(opened) as reader:
                for batch in reader.iter_batches(batch_rows, [group], list(columns), use_threads=False):
                    yield batch
                    rows += batch.num_rows
                    done = size * rows // max(rows, metadata.num_rows)
                    advance(done - told)
                    told = done
        advance(size - told)


def _is_stored_once(opened: "pq.ParquetFile", group: int, column: str) -> bool:
    """Whether a row group seems to have each text of a column once, and for each row an index.

    Read as such, the texts are in memory once too, not once for each row of a batch.
    """
    schema = opened.metadata.schema
    places = [number for number in range(len(schema)) if schema.column(number).path == column]
    if not places:
        return False
    # raises where the file is damaged, and the line after it would abort (docs/library-faults.md)
    next(opened.iter_batches(1, [group], [column], use_threads=False), None)
    chunk = opened.metadata.row_group(group).column(places[0])
    if not chunk.has_dictionary_page:
        return False
    index_bytes = chunk.total_compressed_size - (chunk.data_page_offset - chunk.dictionary_page_offset)
    return index_bytes <= _INDEX_BYTES * chunk.num_values + _HEADER_BYTES


def _file_batches(file: Path, columns: Sequence[str], advance: Callable[[int], object]) -> Iterator["pa.RecordBatch"]:
    pyarrow = require_library("pyarrow", str(file))
    size = file.stat().st_size
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_file(source) as reader:
        _require_columns(str(file), columns, reader.schema.names)
        told = 0
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
            done = size * (number + 1) // reader.num_record_batches
            advance(done - told)
            told = done
        advance(size - told)


def _stream_batches(file: Path, columns: Sequence[str], advance: Callable[[int], object]) -> Iterator["pa.RecordBatch"]:
    pyarrow = require_library("pyarrow", str(file))
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - len(_STREAM_END)))
        if opened.read() != _STREAM_END:  # a stream truncated between batches would seem complete
            raise InputError(f"{file}: damaged or cut short (an Arrow stream has an end that is marked)")
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        _require_columns(str(file), columns, reader.schema.names)
        told = 0
        for batch in reader:
            yield batch
            advance(source.tell() - told)
            told = source.tell()
        advance(size - told)


def _rows(batch: "pa.RecordBatch | pa.Table", columns: Sequence[str]) -> Iterator[Row]:
    values = [_values(batch.column(name)) for name in columns]
    for row in zip(*values, strict=True):
        yield dict(zip(columns, row, strict=True))


def _values(column: "pa.Array | pa.ChunkedArray") -> Iterator[Any]:
    types = importlib.import_module("pyarrow.types")
    if types.is_dictionary(column.type):
        if _bytes_type(column.type.value_type):
            return _looked_up(column)
        column.validate(full=True)  # validates its indices
        column = column.cast(column.type.value_type)
    if types.is_null(column.type):
        return (None for _ in range(len(column)))
    if types.is_boolean(column.type) or types.is_integer(column.type) or types.is_floating(column.type):
        return (value.as_py() for value in column)
    if _bytes_type(column.type) is None:
        return (column.type for _ in range(len(column)))
    return (texts[index] for texts in map(_Texts, _chunks(column)) for index in range(len(texts)))


def _looked_up(column: "pa.DictionaryArray | pa.ChunkedArray") -> Iterator[bytes | memoryview | None]:
    """Texts of a column that stores each once; no copy for every row, since one may have megabytes."""
    for chunk in _chunks(column):
        texts = _Texts(chunk.dictionary)
        chunk.indices.validate(full=True)
        type(chunk).from_arrays(chunk.indices, texts.array)  # raises where an index has no text
        yield from (None if index is None else texts[index] for index in chunk.indices.to_pylist())


def _chunks(column: "pa.Array | pa.ChunkedArray") -> list["pa.Array"]:
    return column.chunks if hasattr(column, "chunks") else [column]


class _Texts:
    """Texts of an array, by index: bytes, None for null, and of a long one a view, since the library's is a copy.

    Attributes:
        array: the texts as bytes.
    """

    def __init__(self, array: "pa.Array") -> None:
        self.array = array.cast(_bytes_type(array.type))
        self.array.validate(full=True)  # offsets in a damaged file may point anywhere
        self._long = dict[int, memoryview]()
        width = {"binary": 4, "large_binary": 8}.get(str(self.array.type))
        if width and len(array):  # the others, of which each text is by itself, are copied once
            _, ends, content = self.array.buffers()
            ends = np.frombuffer(ends, f"i{width}", len(array) + 1, self.array.offset * width)
            for index in np.flatnonzero(np.diff(ends) > LONG_TEXT).tolist():
                if self.array.slice(index, 1).null_count == 0:
                    self._long[index] = memoryview(content)[ends[index] : ends[index + 1]]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> bytes | memoryview | None:
        if index in self._long:
            return self._long[index]
        content = self.array[index].as_py()
        return memoryview(content) if content and len(content) > LONG_TEXT else content


def _bytes_type(text: "pa.DataType") -> "pa.DataType | None":
    """The binary type for a zero-copy cast of this text type; None if it is not a text type."""
    pyarrow = importlib.import_module("pyarrow")
    return {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
        pyarrow.binary(): pyarrow.binary(),
        pyarrow.large_binary(): pyarrow.large_binary(),
        pyarrow.binary_view(): pyarrow.binary_view(),
    }.get(text)


def _load_dataset(name: str, config: str | None, split: str | None) -> "IterableDataset":
    where = f"--dataset {name}"
    datasets = require_library("datasets", where)
    if name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        raise InputError(
            f"{where}: is a reader of the library datasets, which would read whatever lies in the current folder; give "
            f"files and folders with --input, or ./{name} for a folder of this name"
        )
    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=True)
        unread = _unread_files(datasets.load_dataset_builder(name, config), Path(name)) if Path(name).is_dir() else []
    except Exception as error:  # from the network, a folder, or its configurations
        raise InputError(f"{where}: cannot be opened ({first_line(error) or type(error).__name__})") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise InputError(f"{where}: has several splits; choose with --split: {', '.join(map(str, loaded))}")
        (loaded,) = loaded.values()
    if unread:
        log(one_line(f"{where}: the library datasets leaves out {listed(unread, 5)}; --input reads files of all kinds"))
    return loaded


def _unread_files(builder: Any, folder: Path) -> list[str]:
    """The files of a folder that the library does not read: of several kinds it takes one, and of names train alone."""
    read = {Path(file).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    there = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.resolve() not in read]
    names = [file.relative_to(folder) for file in there]
    return [str(name) for name in names if not any(part.startswith(".") for part in name.parts)]


def _require_columns(where: str, columns: Sequence[str], there: Sequence[str]) -> None:
    for name in columns:
        if name not in there:
            raise InputError(f"{where}: has no column {name}, only {', '.join(there)}; see --text_field")
        if there.count(name) > 1:
            raise InputError(f"{where}: has {there.count(name)} columns {name}; rename all but one")


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Context manager: turn pyarrow's errors into InputErrors that name the damaged table."""
    pyarrow = require_library("pyarrow", where)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, SystemError) as error:  # the last: negative lengths
        reason = first_line(error) or type(error).__name__
        raise InputError(f"{where}: damaged, cut short or not to be read ({reason[:200]})") from error
