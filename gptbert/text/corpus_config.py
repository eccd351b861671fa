"""The settings of reading a corpus, which commands have as flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the documents come from."""

    input: tuple[Path, ...] = ()
    """Files or folders of documents.
    What a file is, its content tells: text, JSON Lines, JSON, Parquet or Arrow, plain or compressed; anything else is
    refused.
    Folders are read recursively, sorted by name, without hidden files and notes beside the data.
    What is read and what is left out is listed first.
    A folder written by save_to_disk of Hugging Face's datasets is read as that dataset."""
    dataset: str | None = None
    """Instead of --input: a Hugging Face dataset, streamed; its name on the Hub or a folder of data files."""
    dataset_config: str | None = None
    """Configuration of --dataset, if it has several."""
    split: str | None = None
    """Split of --dataset, or of a folder written by DatasetDict.save_to_disk, if it has several."""
    text_field: str = "text"
    """Field of a JSON object, or column of a table, with the text."""
    format: Literal["auto", "jsonl", "text"] = "auto"
    """Format of files of text.
    jsonl: one document per line, a JSON string or an object with a --text_field string.
    text: plain text, also where it is JSON, CSV or HTML.
    auto: what the file's first bytes are, and its name where they may be either."""
    text_documents: Literal["blank_line", "line"] = "blank_line"
    """What ends a document in a text file: a blank line, or every line.
    Any document of more than 1,048,576 characters is cut, at the end of a line or at a space."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a line or row that is not a document (broken JSON, no text, not UTF-8), or skip and count it.
    A file of which most lines are bad is an error either way."""
