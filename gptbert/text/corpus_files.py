"""The files of a corpus: those to read, each of them once, by kind; and those that are left out, with the reasons."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptbert.errors import InputError, listed
from gptbert.text.file_kind import ARROW_FILE, ARROW_STREAM, BINARY, HEAD_BYTES, PACKED_SUFFIXES, PARQUET, FileKind
from gptbert.text.opened_file import kind_of
from gptbert.text.tables import saved_dataset_files
from gptbert.text.text_kind import JSON, JSONL, TEXT, unpacked_suffix

HIDDEN = "hidden"
MOST_REFUSED = 0.01  # share of a folder's bytes in files of kinds that are not read, which are left out
NAMED = 5  # files that are left out; the others are only counted

_NOTES = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|authors|contributors|contributing|citation|changelog|"
    r"code_of_conduct|datasheet|data(set)?[_-]?card|data[_-]?statement)([._-].*)?"
)
_NOTES_BY_FULL_NAME = re.compile(
    r"(install|version|disclaimer|terms(_of_(use|service))?|makefile|manifest|file_?list|requirements|robots)(\.txt|\.md)?"
)
_NOTE_FOLDERS = re.compile(r"licen[cs]es|__macosx")
_NOTE_SUFFIXES = {"", ".md", ".txt", ".rst", ".htm", ".html", ".pdf", ".tex", ".bib", ".cff"}
_CHECKSUMS = re.compile(
    r"(md5|sha-?\d*|b2|blake\w*|check)sums?([._-].*)?|.*\.(md5|sha\d+|b2|crc32|sfv|asc|sig|torrent)"
)
_MARKERS = re.compile(r"_(success|started.*|committed.*|metadata|common_metadata|temporary)|thumbs\.db|desktop\.ini")
_CACHED = r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow"  # what a map of Hugging Face's datasets made of the data beside it
_COPIES = re.compile(rf".*(~|\.(bak|orig|swp|tmp|part|crdownload|download|aria2|lock))|{_CACHED}")
_STORE = {"blobs", "snapshots"}  # of the Hub's cache: the second has links with names to what the first holds
_SPLITS = {
    "train": "train", "training": "train", "valid": "validation", "validation": "validation", "val": "validation",
    "dev": "validation", "test": "test", "eval": "test",
}  # fmt: skip
_BESIDE_DATA = {
    ".md", ".rst", ".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".log", ".htm", ".html", ".xml",
    ".css", ".js", ".bib", ".tex", ".pdf",
}  # fmt: skip
_BY_NAME = {".parquet": PARQUET, ".arrow": ARROW_STREAM, ".feather": ARROW_FILE}


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
        path: where it is.
        kind: what it is; None for a pipe, which can be looked at only once.
        size: bytes on disk.
        changed: when it was changed, in ns.
    """

    path: Path
    kind: FileKind | None
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path, kind: FileKind | None) -> "Source":
        """A file as it is now."""
        status = path.stat()
        return cls(path, kind, status.st_size, status.st_mtime_ns)

    def has_changed(self) -> bool:
        """Whether somebody has written to the file since."""
        try:
            return self.kind is not None and self != Source.of(self.path, self.kind)
        except OSError:  # removed, when it was open
            return False

    @property
    def title(self) -> str:
        """The kind's."""
        return self.kind.title if self.kind else "a pipe"


class CorpusFiles:
    """What `--input` gives: each real file once, wherever links lead; folders recursively, sorted by name.

    Attributes:
        sources: files to read, in order.
        left_out: files of folders that are not, with the reasons.
        left_out_bytes: their size on disk.
        warnings: what of the files that are read may be a mistake.
    """

    def __init__(self, inputs: Sequence[Path], split: str | None, text_field: str, file_format: str) -> None:
        """List the files and look at each one's first bytes.

        Args:
            inputs: files, which are read whatever they are called, and folders.
            split: of a saved dataset, if it has several.
            text_field: the field or column with the text.
            file_format: "auto", or "text" or "jsonl" for text files.

        Raises:
            InputError: a path does not exist or cannot be read, a folder holds nothing to read, or a file is of a kind
                that is not read; names it and the way on.
        """
        self.sources: list[Source] = []
        self.left_out: list[tuple[Path, str]] = []
        self.left_out_bytes = 0
        self._split = split
        self._text_field = text_field
        self._format = file_format
        self._seen: set[tuple[int, int]] = set()
        self._has_splits = False
        for path in inputs:
            if path.is_symlink() and not path.exists():
                raise InputError(f"--input {path}: is a link to {path.readlink()}, which is not there")
            if not path.exists():
                standard_input = " (standard input is /dev/stdin)" * (str(path) == "-")
                raise InputError(f"--input {path}: no such file or folder{standard_input}")
            if path.is_dir():
                self._add_folder(path)
            elif _is_new(path, self._seen):
                kind = self._kind(path) if path.is_file() else None
                self.sources.append(_accepted(path, kind))
        if split and not self._has_splits:
            raise InputError(
                f"--split {split}: chooses in a folder of DatasetDict.save_to_disk, and none was given; give the "
                "files of that split alone"
            )
        paths = [source.path for source in self.sources]
        self.warnings = [*_splits_together(inputs, paths), *_packed_too(paths)]

    def lines(self, documents: Mapping[str, object]) -> Iterator[str]:
        """The listing: files, bytes and documents of each kind, and what is left out.

        Args:
            documents: what to say of the documents of each kind, by its title.
        """
        files: dict[str, list[Source]] = defaultdict(list)
        for source in self.sources:
            files[source.title].append(source)
        total = sum(source.size for source in self.sources)
        kinds = []
        for kind, of_kind in files.items():
            count, size = len(of_kind), sum(source.size for source in of_kind)
            # perhaps no data at all
            names = f" ({listed([source.path.name for source in of_kind], NAMED)})" * (size < MOST_REFUSED * total)
            expected = f", {documents[kind]}" if kind in documents else ""
            kinds.append(f"{kind}: {count:,} file{'s' * (count > 1)}{names}, {size:,} bytes{expected}")
        yield f"to read: {'; '.join(kinds)}"
        if self.left_out:
            yield f"left out: {self._named()}; give a file by itself to have it read"

    def _named(self, root: Path | None = None) -> str:
        """The first files that are left out with the reasons, hidden ones last, and the number of further ones."""
        inside = [(path, reason) for path, reason in self.left_out if root is None or path.is_relative_to(root)]
        inside.sort(key=lambda left: left[1] == HIDDEN)
        named = [f"{path.relative_to(root) if root else path} ({reason})" for path, reason in inside[:NAMED]]
        return ", ".join(named + [f"{len(inside) - NAMED:,} more"] * (len(inside) > NAMED))

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append((path, reason))
        self.left_out_bytes += path.stat().st_size if path.is_file() else 0

    def _add_folder(self, root: Path) -> None:
        chosen, repeated = [], False
        for path in sorted(self._walk(root), key=lambda path: (path.is_symlink(), path)):  # links change no order
            if reason := _reason_by_name(path):
                self._leave_out(path, reason)
            elif path.stat().st_size == 0:
                self._leave_out(path, "empty")
            elif _is_new(path, self._seen):
                chosen.append(path)
            else:
                repeated = True
                if path.is_symlink():
                    self._leave_out(path, f"a link to {path.resolve()}, which is read already")
                elif path.stat().st_nlink > 1:
                    self._leave_out(path, "read already, under another name")
        sources = self._by_content(sorted(chosen))
        if not sources and not repeated:
            left = f"left out: {self._named(root)}; give a file by itself to have it read" if self.left_out else "none"
            raise InputError(f"--input {root}: the folder holds no file to read ({left})")
        self.sources += sources

    def _by_content(self, files: Sequence[Path]) -> list[Source]:
        """Those of a folder's files that are read."""
        kinds = {path: self._kind(path, in_folder=True) for path in files}
        structured = any(kind.is_table or kind.reader in {"jsonl", "json"} for kind in kinds.values())
        sources = []
        for path, kind in kinds.items():
            beside = structured and unpacked_suffix(path.name) in _BESIDE_DATA
            if kind.holds_no_text:
                self._leave_out(path, kind.name)
            elif beside and not kind.is_table and kind.reader != "jsonl":
                self._leave_out(path, "beside JSON or tables")
            elif kind in {JSON, JSONL} and path.suffix.lower() == ".json" and _is_settings(path, self._text_field):
                self._leave_out(path, f"a JSON object without `{self._text_field}`, see --text_field")
            else:
                sources.append(Source.of(path, kind))
        refused = [source for source in sources if not kinds[source.path].reader]
        if sum(source.size for source in refused) > MOST_REFUSED * sum(source.size for source in sources):
            raise InputError(kinds[refused[0].path].refusal(refused[0].path))
        for source in refused:
            self._leave_out(source.path, f"{source.title}, not read")
        return [source for source in sources if kinds[source.path].reader]

    def _walk(self, root: Path) -> Iterator[Path]:
        """Files below a folder; links to folders last, so that each real one is found under its own name."""

        def fail(error: OSError) -> None:
            raise InputError(f"--input {error.filename}: cannot be listed ({error.strerror})") from error

        waiting, seen = [root], set[tuple[int, int]]()
        while waiting:
            top = waiting.pop(0)
            for name, subfolders, names in os.walk(top, onerror=fail):
                folder = Path(name)
                if not _is_new(folder, seen):
                    subfolders.clear()
                    self._leave_out(folder, "a link to a folder that is read already")
                    continue
                self._has_splits |= "dataset_dict.json" in names
                if (saved := saved_dataset_files(folder, names, self._split)) is not None:
                    yield from saved
                    subfolders.clear()
                    continue
                kept = []
                for path in [folder / name for name in sorted(subfolders)]:
                    if reason := _reason_of_folder(path.name, subfolders):
                        self._leave_out(path, reason)
                    else:
                        kept.append(path.name)
                        if path.is_symlink():
                            waiting.append(path)
                subfolders[:] = kept
                for path in [folder / name for name in sorted(names)]:
                    if path.is_file():
                        yield path
                    else:
                        self._leave_out(
                            path, "a broken link" if path.is_symlink() and not path.exists() else "not a file"
                        )

    def _kind(self, path: Path, *, in_folder: bool = False) -> FileKind:
        """What a file is by its content; by its name, if that says a table and the content nothing else."""
        kind = kind_of(path, self._text_field)
        by_name = _BY_NAME.get(path.suffix.lower())
        if by_name and (kind == BINARY or path.stat().st_size == 0):
            return by_name
        return kind if in_folder and kind.holds_no_text else as_text(kind, self._format)


def as_text(kind: FileKind, file_format: str) -> FileKind:
    """The kind as which `--format` has a file read: any text as the format says, all else as what it is."""
    if file_format == "auto" or not (kind.is_text or kind.reader in {"text", "jsonl", "json"}):
        return kind
    return (TEXT if file_format == "text" else JSONL).packed(kind.packing)


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a file or folder was not seen, under this or another name; it is from now on."""
    status = path.stat()
    number = len(seen)
    seen.add((status.st_dev, status.st_ino))
    return len(seen) > number


def _reason_by_name(path: Path) -> str:
    """Why a file of a folder is left out, whatever it holds; "" if it is not."""
    name = path.name.lower()
    if name.startswith("."):
        return HIDDEN
    if _NOTES_BY_FULL_NAME.fullmatch(name) or (_NOTES.fullmatch(name) and path.suffix.lower() in _NOTE_SUFFIXES):
        return "about the data"
    if _CHECKSUMS.fullmatch(name):
        return "checksums"
    if _MARKERS.fullmatch(name):
        return "a marker"
    return "a copy or a part of a file" if _COPIES.fullmatch(name) else ""


def _reason_of_folder(name: str, beside: Sequence[str]) -> str:
    """Why a folder inside of a folder is left out, by its name and those beside it; "" if it is not."""
    if name.startswith("."):
        return HIDDEN
    if name == "blobs" and _STORE.issubset(beside):
        return "read by the names in snapshots"
    return "about the data" if _NOTE_FOLDERS.fullmatch(name.lower()) else ""


def _splits_together(inputs: Sequence[Path], paths: Sequence[Path]) -> list[str]:
    """A warning if files that are called train are read together with those of another split."""
    found, roots = dict[str, Path](), set(inputs)  # which may be 100,000 files, given one by one
    for path in paths:
        root = next((parent for parent in path.parents if parent in roots), None)
        below = path.relative_to(root) if root else path.name
        for word in re.split(r"[^a-z]+", str(below).lower()):
            if word in _SPLITS:
                found.setdefault(_SPLITS[word], path)
    if len(found) < 2 or "train" not in found:
        return []
    return [
        f"read as one corpus, though their names are of several splits: {listed(list(map(str, found.values())), 3)}"
    ]


def _packed_too(paths: Sequence[Path]) -> list[str]:
    """A warning if files are read that seem to be the compressed form of others."""
    packed = [path for path in paths if path.suffix.lower() in PACKED_SUFFIXES]
    every = set(paths)
    both = sorted(str(path) for path in packed if path.with_suffix("") in every)
    return [f"read although the same name without the compression is read too: {listed(both, 3)}"] if both else []


def _accepted(path: Path, kind: FileKind | None) -> Source:
    if kind and not kind.reader:
        raise InputError(kind.refusal(path))
    return Source.of(path, kind)


def _is_settings(path: Path, text_field: str) -> bool:
    """Whether a small file is one JSON object, and not a document."""
    if path.stat().st_size > HEAD_BYTES:
        return False
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and text_field not in value
