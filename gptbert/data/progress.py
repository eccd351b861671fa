"""What a run has trained on: its places in the corpora, and the tokens, words and epochs behind them.

All of it is a function of the step as long as the settings stay the same. A resumed run may have others: batches, row
length, ratio, corpora, weights, number of steps. So a checkpoint has the places reached and the counts so far, and the
plan of today's settings adds to them. Each corpus goes on where it stopped: nothing is skipped or repeated.

A corpus is recognized by its content, not by its file's name. One that is left out keeps its place and its words; a new
one begins at its beginning, as does a file whose content has changed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs, corpus_names
from gptbert.data.mixture import Mixture
from gptbert.data.packing import Position, RowStream
from gptbert.data.token_store import TokenStore
from gptbert.errors import InputError
from gptbert.model.objective import Objective
from gptbert.schedules import length_factor

_DIGESTED = 2**25  # tokens; of a larger corpus, so many in pieces from all over it
_PIECES = 1024
_LARGEST = 2**62  # of any count in a checkpoint


@dataclass(frozen=True)
class CorpusProgress:
    """One corpus, and how far each objective has read it.

    Attributes:
        digest: recognizes the content, see `corpus_digest`.
        shuffle: distinguishes its shuffle from those of other corpora.
        length: tokens per epoch, including an `<s>` after each document.
        num_words: words per epoch, or None if not recorded.
        places: one for each objective.
    """

    digest: str
    shuffle: tuple[int, ...]
    length: int
    num_words: int | None
    places: tuple[Position, ...] = (Position(),) * len(Objective)

    def words(self) -> int | None:
        """Words so far, over both objectives; None if not recorded."""
        if self.num_words is None:
            return None if any(place != Position() for place in self.places) else 0
        return sum(place.words(self.num_words, self.length) for place in self.places)

    def to_state(self) -> dict[str, Any]:
        """As numbers, strings and lists."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        places = [[place.epoch, place.offset] for place in self.places]
        return state | {"shuffle": list(self.shuffle), "places": places}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`."""
        places = tuple(Position(*place) for place in state["places"])
        return cls(**dict(state) | {"shuffle": tuple(state["shuffle"]), "places": places})


class Progress:
    """A run's plan and rows from its first step or a checkpoint on, and its counts at any step from there.

    Args:
        config: the run's settings.
        inputs: its files.
        plan: of the whole run, as if it had always had these settings.
        state: `state_dict` of the checkpoint that the run goes on from; None for a run from scratch.
        step: the checkpoint's step.

    Attributes:
        plan: `plan`, from the checkpoint's slots and tokens on.
        first_step: `step`.
        streams: each objective's training rows; a mixture if there are several corpora.
        digests: recognize the contents of the training files.
        has_same_corpora: whether the checkpoint's run had the same corpora in the same order.
        changed_files: lines on files that the checkpoint's run did not have, by their content.
        validated_on: recognizes the content of the validation file.

    Raises:
        InputError: `state` does not fit the files.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        plan: HybridPlan,
        state: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        is_fresh = state is None
        state = state or fresh_state()
        self.first_step = step
        self.plan = plan.continued(step, dict(zip(Objective, state["slots"], strict=True)), state["tokens"])
        self._names = corpus_names(config.train_path)
        known = [CorpusProgress.from_state(each) for each in state["corpora"]]
        if not is_fresh and "validated_on" not in state:
            known = _with_present_digests(known, inputs.train_stores)
        self._corpora, self._left_out = _recognized(inputs.train_stores, known)
        self.digests = [corpus.digest for corpus in self._corpora]
        self.has_same_corpora = [corpus.digest for corpus in known[: len(self.digests)]] == self.digests
        self.validated_on = corpus_digest(inputs.valid_store)
        before = {corpus.digest for corpus in known}
        self.changed_files = [
            f"--train_path {path}: was not read before, or its content has changed; read from its beginning"
            for path, digest in zip(config.train_path, self.digests, strict=True)
            if not is_fresh and digest not in before
        ]
        if state.get("validated_on", "") not in {"", self.validated_on}:
            self.changed_files.append(
                f"--valid_path {config.valid_path}: has another content than before; its losses are not those of before"
            )
        self._of_corpora = {
            objective: self._streams_of_corpora(config, inputs.train_stores, index)
            for index, objective in enumerate(Objective)
        }
        self.streams = {
            objective: self._stream_of(config, objective, rows)
            for objective, rows in zip(Objective, state["rows"], strict=True)
        }

    def _streams_of_corpora(self, config: TrainConfig, stores: Sequence[TokenStore], index: int) -> list[RowStream]:
        """Each corpus's rows for the objective of this index."""
        first_slot = self.plan.slots_before(list(Objective)[index], self.first_step) if len(stores) == 1 else 0
        streams = [
            RowStream(
                store,
                config.seq_length,
                (config.seed, index, *corpus.shuffle),
                start=corpus.places[index],
                first_slot=first_slot,
            )
            for store, corpus in zip(stores, self._corpora, strict=True)
        ]
        for stream, corpus in zip(streams, self._corpora, strict=True):
            if corpus.places[index].offset >= stream.document_order.stream_length:
                raise InputError("the checkpoint is damaged: it has read a corpus of --train_path beyond its end")
        return streams

    def _stream_of(self, config: TrainConfig, objective: Objective, rows: int) -> RowStream | Mixture:
        """All rows of an objective; with several corpora, `rows` were dealt to them before."""
        streams = self._of_corpora[objective]
        if len(streams) == 1:
            return streams[0]
        growth = [(self.plan.slots_before(objective, self.first_step), length_factor(config, self.first_step))]
        for factor, step in self.plan.length_factors.items():
            if step > self.first_step:
                growth.append((self.plan.slots_before(objective, step), factor))
        return Mixture(streams, config.train_weights, growth, rows)

    def words_before(self, step: int) -> int | None:
        """Words in all steps before `step`, of both objectives; None if a token file does not record them."""
        words: list[Any] = [corpus.words() for corpus in (*self._corpora_before(step), *self._left_out)]
        return None if None in words else sum(words)

    def epochs_before(self, step: int) -> dict[str, float]:
        """Epochs of each corpus before `step`, over both objectives; empty if there is only one corpus."""
        return dict(zip(self._names, self._epochs_before(step), strict=True)) if len(self._corpora) > 1 else {}

    def _epochs_before(self, step: int) -> list[float]:
        before = self._corpora_before(step)
        return [sum(place.epochs(corpus.length) for place in corpus.places) for corpus in before]

    def padding_share(self) -> float:
        """Fraction of padding among the positions of an epoch of each corpus."""
        streams = self._of_corpora[Objective.CLM]
        positions = sum(stream.slots_per_epoch * stream.seq_length for stream in streams)
        return 1 - sum(stream.document_order.stream_length for stream in streams) / positions

    def describe_corpora(self, inputs: Inputs, max_steps: int) -> str:
        """One line to print: size and epochs of each corpus, and of several its fraction."""
        rows: Any = self.streams[Objective.CLM]
        shares = [f"{100 * share:.3g} % " for share in rows.shares] if len(self._corpora) > 1 else [""]
        epochs = self._epochs_before(max_steps)
        parts = [
            f"{share}{name} ({store.num_tokens:,} tokens, {count:.3g} epochs in all)"
            for share, name, store, count in zip(shares, self._names, inputs.train_stores, epochs, strict=True)
        ]
        return f"training on {', '.join(parts)}"

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a run that goes on from `step` needs, in numbers, strings, lists and dictionaries."""
        slots = {objective: self.plan.slots_before(objective, step) for objective in Objective}
        return {
            "tokens": self.plan.tokens_before(step),
            "slots": list(slots.values()),
            "rows": [self.streams[objective].rows_before(slot) for objective, slot in slots.items()],
            "corpora": [corpus.to_state() for corpus in (*self._corpora_before(step), *self._left_out)],
            "validated_on": self.validated_on,
        }

    def _corpora_before(self, step: int) -> list[CorpusProgress]:
        """The run's corpora, read as far as all steps before `step` do."""
        places = [stream.places(self.plan.slots_before(key, step)) for key, stream in self.streams.items()]
        lengths = [stream.document_order.stream_length for stream in self._of_corpora[Objective.CLM]]
        return [
            replace(corpus, length=length, places=own)
            for corpus, length, *own in zip(self._corpora, lengths, *places, strict=True)
        ]


def fresh_state() -> dict[str, Any]:
    """The `Progress.state_dict` before a run's first step."""
    return {"tokens": 0, "slots": [0, 0], "rows": [0, 0], "corpora": [], "validated_on": ""}


def check_state(state: Any) -> None:
    """Refuse what cannot be a `Progress.state_dict`.

    Raises:
        InputError: says so.
    """
    is_valid = (
        type(state) is dict
        and set(state) | {"validated_on"} == set(fresh_state())  # earlier versions did not write it
        and _is_count(state["tokens"])
        and all(_are_counts(state[name], len(Objective)) for name in ("slots", "rows"))
        and type(state["corpora"]) is list
        and all(map(_is_corpus, state["corpora"]))
        and type(state.get("validated_on", "")) is str
    )
    if not is_valid:
        raise InputError("its progress has an unexpected form")


def _is_corpus(state: Any) -> bool:
    return (
        type(state) is dict
        and set(state) == {field.name for field in fields(CorpusProgress)}
        and type(state["digest"]) is str
        and _are_counts(state["shuffle"])
        and _is_count(state["length"])
        and (state["num_words"] is None or _is_count(state["num_words"]))
        and type(state["places"]) is list
        and len(state["places"]) == len(Objective)
        and all(_are_counts(place, 2) and place[1] < max(1, state["length"]) for place in state["places"])
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _are_counts(values: Any, number: int | None = None) -> bool:
    return type(values) is list and all(map(_is_count, values)) and number in {None, len(values)}


def _recognized(
    stores: Sequence[TokenStore], known: Sequence[CorpusProgress]
) -> tuple[list[CorpusProgress], list[CorpusProgress]]:
    """Each store's corpus, as known from a checkpoint or new, and the known ones that have no store."""
    left_out, corpora = list(known), []
    for number, store in enumerate(stores):
        digest = corpus_digest(store)
        found = next((corpus for corpus in left_out if corpus.digest == digest), None)
        if found:
            left_out.remove(found)
            corpora.append(replace(found, num_words=store.num_words))
            continue
        taken = {corpus.shuffle for corpus in (*known, *corpora)}
        usual = () if len(stores) == 1 else (number,)
        others = ((other,) for other in range(len(taken) + 1))
        shuffle = next(shuffle for shuffle in (usual, *others) if shuffle not in taken)
        corpora.append(CorpusProgress(digest, shuffle, 0, store.num_words))
    return corpora, left_out


def _with_present_digests(known: Sequence[CorpusProgress], stores: Sequence[TokenStore]) -> list[CorpusProgress]:
    """The corpora of a checkpoint of an earlier version, which digested the ends of a corpus alone."""
    present = {_digest_of_ends(store): corpus_digest(store) for store in stores}
    return [replace(corpus, digest=present.get(corpus.digest, corpus.digest)) for corpus in known]


def _digest_of_ends(store: TokenStore) -> str:
    digest = hashlib.sha256(f"{store.num_tokens} {store.num_documents}".encode())
    for start in (0, max(0, store.num_tokens - 2**16)):
        for _, tokens in store.slices(start, min(start + 2**16, store.num_tokens)):
            digest.update(tokens.astype("<i8").tobytes())
    return digest.hexdigest()


def corpus_digest(store: TokenStore) -> str:
    """A digest of a corpus, however it is cut into files: of its sizes and its tokens, of many tokens a sample.

    The sample is `_DIGESTED` tokens in `_PIECES` pieces from all over the corpus.
    """
    digest = hashlib.sha256(f"{store.num_tokens} {store.num_documents}".encode())
    rest = max(0, store.num_tokens - _DIGESTED)
    for piece in range(_PIECES):
        start, end = (rest * piece // (_PIECES - 1) + _DIGESTED * number // _PIECES for number in (piece, piece + 1))
        for _, tokens in store.slices(start, min(end, store.num_tokens)):
            digest.update(tokens.astype("<u4").tobytes())
    return digest.hexdigest()
