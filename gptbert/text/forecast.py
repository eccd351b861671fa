"""How many documents of each kind a corpus holds, told from a part of it before it is read."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptbert.errors import InputError
from gptbert.text.corpus_config import CorpusConfig
from gptbert.text.corpus_files import Source
from gptbert.text.document_reader import DocumentReader
from gptbert.text.documents import cut
from gptbert.text.tables import num_rows
from gptbert.text.tally import Tally

SAMPLED_BYTES = 1 << 20  # on disk, of a file
SAMPLED_PACKED = 1 << 22  # of a compressed one, whose text comes a megabyte at a time
SAMPLED_OF_KIND = 1 << 23  # of all files of a kind
SAMPLED_FILES = 5000  # of a kind


@dataclass
class Forecast:
    """Documents of one kind of file.

    Attributes:
        documents: how many there are in what was looked at.
        sampled: the size of that, in bytes on disk.
        size: of all files, in bytes on disk.
        exact: whether everything was.
    """

    documents: int = 0
    sampled: int = 0
    size: int = 0
    exact: bool = True

    def __str__(self) -> str:
        """The number of documents, as users are told it."""
        if self.exact:
            return f"{self.documents:,} document{'s' * (self.documents != 1)}"
        if not self.documents:
            return "an unknown number of documents"
        number = self.documents * self.size / self.sampled
        return f"about {float(f'{number:.2g}'):,.0f} documents"


def forecasts(sources: Iterable[Source], config: CorpusConfig, domain_field: str | None) -> dict[str, Forecast]:
    """Read the beginnings of files.

    Args:
        sources: files; pipes, which can be read only once, are omitted.
        config: how documents are read.
        domain_field: as for `Corpus`.

    Returns:
        What to expect of the files of each kind, by its title.
    """
    kinds: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        if source.kind is not None:
            kinds[source.title].append(source)
    return {title: _forecast(files, config, domain_field) for title, files in kinds.items()}


def _forecast(files: Sequence[Source], config: CorpusConfig, domain_field: str | None) -> Forecast:
    """What to expect of files of one kind: every so many of them are looked at."""
    to_read = sum(min(file.size, _enough(file)) for file in files)
    step = max(math.ceil(to_read / SAMPLED_OF_KIND), math.ceil(len(files) / SAMPLED_FILES))
    forecast = Forecast(size=sum(file.size for file in files), exact=step == 1)
    for file in files[::step]:
        if file.kind and file.kind.is_table and file.size > SAMPLED_BYTES:
            documents, sampled = num_rows(file.path, file.kind), file.size
            forecast.exact = False  # some may be empty
        else:
            documents, sampled = _sample(file, _Sampler(config, domain_field, Tally()))
            forecast.exact &= sampled >= file.size
        forecast.documents += documents
        forecast.sampled += sampled
    return forecast


def _enough(file: Source) -> int:
    """Bytes on disk of a file that are enough to judge it by."""
    return SAMPLED_PACKED if file.kind and file.kind.packing else SAMPLED_BYTES


def _sample(source: Source, reader: DocumentReader) -> tuple[int, int]:
    """Documents at the beginning of a file, and the bytes on disk that they take: `source.size` if that is all."""
    count = before = read = 0

    def advance(size: int) -> None:
        nonlocal read
        read += size
        if read > SAMPLED_OF_KIND:  # a document as long as that
            raise InputError("enough")

    try:
        for _, text in reader.of_file(source, advance):
            if read != before:  # what came so far was in the bytes before
                if before >= _enough(source):
                    return count, before
                before = read
            count += sum(1 for piece in cut(text.strip()) if piece)
    except InputError:  # which reading the file will raise again
        return (count, read) if read < source.size else (0, 0)
    return count, source.size


class _Sampler(DocumentReader):
    """Passes over bad lines."""

    def _reject(self, place: str, reason: ValueError, size: int) -> None:
        pass

    def _check_bad(self, where: str) -> None:
        pass
