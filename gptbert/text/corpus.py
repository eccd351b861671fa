"""The corpus: documents streamed out of text, JSON and tables, one document in memory at a time.

What a file is, `gptbert.text.file_kind` tells by its content; which files are read, `gptbert.text.corpus_files`.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

from tqdm import tqdm

from gptbert.errors import InputError, one_line
from gptbert.io.screen import log
from gptbert.text.corpus_config import CorpusConfig
from gptbert.text.corpus_files import CorpusFiles
from gptbert.text.document_reader import DocumentReader
from gptbert.text.documents import MAX_DOCUMENT, cut
from gptbert.text.forecast import forecasts
from gptbert.text.tables import dataset_rows, require_library
from gptbert.text.tally import Tally

__all__ = ["Corpus", "CorpusConfig"]


class Corpus:
    """The documents of a CorpusConfig, in order, stripped of surrounding whitespace; empty ones are omitted.

    Iterating updates the tally and shows a progress bar over the bytes on disk, or the bytes so far of a dataset by
    name.

    Attributes:
        files: every file to read; empty for a dataset by name.
        num_bytes: their size on disk in bytes, compressed if they are.
        tally: what was read so far.
    """

    def __init__(self, config: CorpusConfig, domain_field: str | None = None) -> None:
        """List the files.

        Args:
            config: what to read, and how.
            domain_field: field of JSON objects, or column of tables, with each document's domain, for `with_domains`.

        Raises:
            InputError: a path does not exist, a folder has nothing to read, a file is of a kind that is not read, or a
                library needed to read it is missing.
        """
        self.config = config
        if config.input and config.dataset:
            raise InputError("--input and --dataset: give one of the two")
        if not config.input and not config.dataset:
            raise InputError("--input: needs at least one file or folder, or --dataset a name instead")
        if config.dataset_config and not config.dataset:
            raise InputError(f"--dataset_config {config.dataset_config}: is of --dataset, which was not given")
        self._listing = CorpusFiles(
            config.input, None if config.dataset else config.split, config.text_field, config.format
        )
        self.files = [source.path for source in self._listing.sources]
        if tables := [source.path for source in self._listing.sources if source.kind and source.kind.is_table]:
            require_library("pyarrow", str(tables[0]))
        self.num_bytes = sum(source.size for source in self._listing.sources)
        self.tally = Tally(left_out_bytes=self._listing.left_out_bytes)
        self._by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # documents, and bytes of text
        self._reader = DocumentReader(config, domain_field, self.tally)

    def __iter__(self) -> Iterator[str]:
        """Yield each document.

        Raises:
            InputError: a file cannot be read or, with `on_error="stop"`, a line or row is bad; names it.
        """
        return (text for _, text in self.with_domains())

    def with_domains(self) -> Iterator[tuple[str, str]]:
        """Yield each document's domain ("" without a `domain_field`), and the document.

        Raises:
            InputError: as in `__iter__`; a line without the field is bad.
        """
        # Smooth on a terminal, an occasional line in the log of a batch job.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        total = None if self.config.dataset else self.num_bytes
        tally = self.tally
        if len(self.files) > 1 or any(path.is_dir() for path in self.config.input):
            expected = forecasts(self._listing.sources, self.config, self._reader.domain_field)
            for line in self._listing.lines(expected):
                log(one_line(line))
        delay = 0.0 if self.config.on_error == "skip" else 0.5  # lines above a bar show it before its time
        with tqdm(total=total, unit="B", unit_scale=True, delay=delay, mininterval=interval) as bar:
            for domain, document in self._documents(bar.update):
                text = document.strip()
                if not text:
                    tally.empty_documents += 1
                    continue
                for piece in (text,) if len(text) <= MAX_DOCUMENT else self._cut(text):
                    tally.add(piece)
                    yield domain, piece
        if len(self._by_kind) > 1:
            kinds = (
                f"{kind}: {number:,} document{'s' * (number > 1)}, {size:,} bytes of text"
                for kind, (number, size) in self._by_kind.items()
            )
            log(f"read: {'; '.join(kinds)}")

    def warnings(self) -> list[str]:
        """What of the files and of reading them is worth a warning."""
        return self._listing.warnings + self.tally.warnings()

    def require_documents(self) -> None:
        """Raise InputError if nothing was read."""
        if self.tally.num_documents == 0:
            config = self.config
            name = f"--dataset {config.dataset}" if config.dataset else f"--input {' '.join(map(str, config.input))}"
            first = f"; the first bad line: {self._reader.first_bad}" if self._reader.first_bad else ""
            raise InputError(f"{name}: holds no text ({self.tally.counts()}), so nothing was written{first}")

    def _cut(self, text: str) -> Iterator[str]:
        self.tally.cut_documents += 1
        return cut(text)

    def _documents(self, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
        config, tally, reader = self.config, self.tally, self._reader
        if config.dataset:
            rows = dataset_rows(config.dataset, config.dataset_config, config.split, reader.columns, advance)
            yield from reader.of_rows(f"--dataset {config.dataset}", rows)
        for source in self._listing.sources:
            documents, text_bytes = tally.num_documents, tally.text_bytes
            yield from reader.of_file(source, advance)
            if source.has_changed():
                tally.changed_files.append(str(source.path))
            self._by_kind[source.title][0] += tally.num_documents - documents
            self._by_kind[source.title][1] += tally.text_bytes - text_bytes
        reader.check_all()
