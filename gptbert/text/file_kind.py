"""What a file is, by its first bytes: tables, and the many kinds that are not text, with what would make them readable.

Text is told apart by `gptbert.text.text_kind`.
"""

import codecs
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

HEAD_BYTES = 1 << 16  # of each file, looked at before it is read

Reader = Literal["text", "jsonl", "json", "parquet", "arrow_stream", "arrow_file", ""]


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: what users call it.
        reader: how documents are read out of it; "" if they are not.
        way_on: if it is not read, what to do instead; `{file}` stands for its name.
        as_packed: whether what is done instead takes compressed files too.
        is_text: text that is refused because it is markup or a table: `--format text` reads it all the same.
        holds_no_text: images, arrays and the like, which folders may have beside the data.
        packing: the compression around it, "" for none.
    """

    name: str
    reader: Reader = ""
    way_on: str = ""
    as_packed: bool = False
    is_text: bool = False
    holds_no_text: bool = False
    packing: str = ""

    @property
    def is_table(self) -> bool:
        """Whether it has columns, which pyarrow reads."""
        return self.reader in {"parquet", "arrow_stream", "arrow_file"}

    @property
    def title(self) -> str:
        """The name, and the compression around it."""
        return f"{self.name} ({self.packing})" if self.packing else self.name

    def refusal(self, file: Path) -> str:
        """The error for a file of a kind that is not read."""
        insist = ", or read it as it is with --format text" if self.is_text else ""
        name = f"{self.name.removesuffix(',')}, in {self.packing}," if self.packing else self.name
        way_on, given = self.way_on, file
        if self.packing and "{file}" in way_on and not self.as_packed:
            way_on = f"unpack it first, then {way_on}"
            given = file.with_suffix("") if file.suffix.lower() in PACKED_SUFFIXES else Path("UNPACKED")
        way_on = way_on.replace("{file}", shlex.quote(str(given)))
        return f"{file}: is {name} and not read as training text; {way_on}{insist}"

    def packed(self, packing: str) -> "FileKind":
        """The same inside of a compression. Tables are read from anywhere in a file, so not from a compressed one."""
        if packing and self.is_table:
            return FileKind(f"a {self.name} file", way_on="unpack {file} first", as_packed=True, packing=packing)
        return replace(self, packing=packing)


PARQUET = FileKind("Parquet", "parquet")
ARROW_STREAM = FileKind("Arrow stream", "arrow_stream")
ARROW_FILE = FileKind("Arrow file", "arrow_file")
BINARY = FileKind("binary data", way_on="give files of text, JSON Lines, Parquet or Arrow")
SAFETENSORS = FileKind(
    "a safetensors file",
    way_on="give the text itself (a token file is for training and evaluating, under a name in .safetensors)",
    holds_no_text=True,
)
ARRAY = FileKind("a file of arrays", way_on="give the text itself", holds_no_text=True)
MEDIA = FileKind("an image, a sound or a video", way_on="give the text itself", holds_no_text=True)
PROGRAM = FileKind("a program", way_on="give the text itself", holds_no_text=True)
TAR = FileKind("a tar archive", way_on="unpack it (tar -xf {file}) and give the folder", as_packed=True)
ZIP = FileKind("a zip archive", way_on="unpack it (unzip {file}) and give the folder")
TWICE = FileKind("compressed twice", way_on="unpack {file} once", as_packed=True)
_SAVE_AS_TEXT = "save its text as UTF-8 and give that"
DOCUMENT = FileKind("a document of an office program", way_on=_SAVE_AS_TEXT)
PICKLE = FileKind("a pickle", way_on="write its texts as JSON Lines")
DATABASE = FileKind("a database", way_on="export its texts as JSON Lines")

SQL = FileKind("a dump of a database", way_on="export its texts as JSON Lines", is_text=True)
CHAT = FileKind(
    "a CHAT transcript, of which most lines are about what is said,",
    way_on=r"take what is said (grep '^\*' {file} > FILE)",
    is_text=True,
)

PACKED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
# How a compressed file begins. The first four are read, see gptbert.text.opened_file.
PACKINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"LZIP": "lzip",
    b"]\0\0": "lzma",
    b"\xff\x06\0\0sNaPpY": "snappy",
}
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # a frame of notes, which may come first
_BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # the first block, or the end

_SIGNATURES = {
    b"PAR1": PARQUET,
    b"PARE": FileKind("an encrypted Parquet file", way_on="decrypt it first"),
    b"ARROW1\0\0": ARROW_FILE,
    b"\xff\xff\xff\xff": ARROW_STREAM,
    b"FEA1": FileKind("a Feather file of version 1", way_on="write it again as Parquet"),
    b"ORC": FileKind("an ORC file", way_on="write it again as Parquet"),
    b"Obj\x01": FileKind("an Avro file", way_on="write it again as Parquet"),
    b"7z\xbc\xaf\x27\x1c": FileKind("a 7z archive", way_on="unpack it (7z x {file}) and give the folder"),
    b"Rar!\x1a\x07": FileKind("a rar archive", way_on="unpack it (unrar x {file}) and give the folder"),
    b"PK\x05\x06": ZIP,
    b"!<arch>\n": FileKind("an ar archive", way_on="unpack it (ar x {file}) and give the folder"),
    b"MSCF": FileKind("a cabinet archive", way_on="unpack it (cabextract {file}) and give the folder"),
    b"%PDF-": FileKind("a PDF document", way_on="extract its text (pdftotext {file}) and give that"),
    b"%!PS": FileKind("a PostScript document", way_on="extract its text (ps2txt {file}) and give that"),
    b"{\\rtf": FileKind("an RTF document", way_on=_SAVE_AS_TEXT, is_text=True),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": DOCUMENT,
    b"SQLite format 3\0": DATABASE,
    b"-- MySQL dump": SQL,
    b"-- MariaDB dump": SQL,
    b"--\n-- PostgreSQL database dump": SQL,
    b"PRAGMA foreign_keys=OFF;": SQL,
    b"@UTF8": CHAT,
    b"\x89HDF\r\n\x1a\n": FileKind("an HDF5 file", way_on="export its texts as JSON Lines"),
    b"\x93NUMPY": ARRAY,
    b"\x89PNG\r\n\x1a\n": MEDIA,
    b"\xff\xd8\xff": MEDIA,
    b"GIF87a": MEDIA,
    b"GIF89a": MEDIA,
    b"II*\0": MEDIA,
    b"MM\0*": MEDIA,
    b"RIFF": MEDIA,
    b"ID3": MEDIA,
    b"OggS": MEDIA,
    b"fLaC": MEDIA,
    b"\x1aE\xdf\xa3": MEDIA,
    b"\0\0\x01\0": MEDIA,
    b"\x7fELF": PROGRAM,
    b"MZ\x90\0": PROGRAM,
    b"\xcf\xfa\xed\xfe": PROGRAM,
    b"WARC/": FileKind("a web archive (WARC)", way_on="extract the text of its pages and give that"),
    b"version https://git-lfs.github.com/": FileKind("a pointer of Git LFS", way_on="fetch the data (git lfs pull)"),
    b"<!doctype html": FileKind("an HTML page", way_on="extract its text", is_text=True),
    b"<html": FileKind("an HTML page", way_on="extract its text", is_text=True),
    b"<?xml": FileKind("XML", way_on="extract its text", is_text=True),
    b"<mediawiki": FileKind("XML", way_on="extract its text", is_text=True),
}


def packing_of(head: bytes) -> str:
    """The compression that a file begins with; "" for none."""
    for magic, packing in PACKINGS.items():
        if head.startswith(magic):
            if packing == "bzip2" and not head[4:].startswith(_BZIP2_BLOCKS):
                continue
            return "" if _is_word(magic, head) else packing
    return "zstd" if len(head) >= 8 and int.from_bytes(head[:4], "little") in _ZSTD_SKIPPABLE else ""


def binary_kind(head: bytes) -> FileKind | None:
    """The kind that the first bytes of a file show beyond doubt; None if they may be text.

    Args:
        head: the first `HEAD_BYTES` of the file, unpacked.
    """
    marked = head.removeprefix(codecs.BOM_UTF8)
    start = marked[:40].lstrip().lower()  # markup may follow blank lines
    for magic, kind in _SIGNATURES.items():
        if marked.startswith(magic) or (magic.startswith(b"<") and start.startswith(magic)):
            return None if _is_word(magic, head) else kind
    if packing_of(head):
        return TWICE
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(head)
    return next((kind for kind, found in _structures(head) if found), None)


def _structures(head: bytes) -> Iterator[tuple[FileKind, bool]]:
    """Kinds without a signature, and whether a file is one."""
    yield SAFETENSORS, int.from_bytes(head[:8], "little") < 1 << 40 and head[8:10] in {b'{"', b"{}", b"{ "}
    yield MEDIA, head[4:8] == b"ftyp"
    yield PICKLE, head[:1] == b"\x80" and head[1:2] in {b"\2", b"\3", b"\4", b"\5"}
    yield TAR, _is_tar(head[:512])


def _zip_kind(head: bytes) -> FileKind:
    """Office documents, EPUB, and the files of torch and numpy are zip archives too."""
    if any(name in head for name in (b"[Content_Types].xml", b"application/epub+zip", b"opendocument")):
        return DOCUMENT
    if b"data.pkl" in head[:1024] or b".npy" in head[:1024]:
        return ARRAY
    return ZIP


def _is_tar(block: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name)  # checks the sum over the header
    except (tarfile.TarError, ValueError):
        return False


def _is_word(magic: bytes, head: bytes) -> bool:
    """Whether a signature of letters, such as ORC, begins a text: no bytes of binary data follow."""
    return magic.isalnum() and not any(byte < 32 and byte not in b"\t\n\r\f\v" for byte in head[:512])
