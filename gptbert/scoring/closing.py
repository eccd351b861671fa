"""The figures that a command ends with, which would show a mistake in what it was given."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.text.tokenizer import unknown_id

_FEW, _MOST = 0.05, 0.5  # shares of unknown tokens: above the first a warning, above the second an error


def unknown_share(tokenizer: Tokenizer, ids: Sequence[np.ndarray]) -> float:
    """The share of unknown tokens in arrays of token ids; 0 if the tokenizer has no such token."""
    unknown, total = unknown_id(tokenizer), sum(map(len, ids))
    if unknown is None or not total:
        return 0.0
    return sum(int((tokens == unknown).sum()) for tokens in ids) / total


def unknown_line(share: float, what: str) -> str:
    """The line about unknown tokens, a warning if there are many.

    Args:
        share: of the tokens.
        what: of which data, for the message.

    Raises:
        InputError: they are so many that the tokenizer cannot be meant for this text.
    """
    if share > _MOST:
        raise InputError(f"{what}: {share:.0%} of its tokens are unknown: the tokenizer does not know this text")
    return f"{_warning(share > _FEW)}{share:.1%} unknown tokens"


def ties_line(good: np.ndarray, bad: np.ndarray, backend: str) -> str:
    """The line about pairs whose sentences score the same, which count as wrong.

    Args:
        good: scores [pairs] of the good sentences.
        bad: scores [pairs] of the bad ones.
        backend: its name.

    Raises:
        InputError: a score is not finite, or all pairs are ties.
    """
    if not (np.isfinite(good).all() and np.isfinite(bad).all()):
        raise InputError(f"--backend {backend}: the model's scores are not finite, so that its weights are of no use")
    share = float((good == bad).mean())
    if share == 1 and len(good) > 1:
        raise InputError(f"--backend {backend}: both sentences score the same in every pair; are they the same text?")
    return f"{_warning(share > _FEW)}{share:.1%} ties ({backend})"


def repeated_share(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of pairs that are there again, in either order: they count again, or against each other."""
    return 1 - len(set(map(frozenset, pairs))) / len(pairs)


def repeats_line(share: float) -> str:
    """The line about repeated pairs, a warning if there are many."""
    return f"{_warning(share > _FEW)}{share:.1%} repeated pairs"


def right_ties_line(share: float, task: str, backend: str) -> str:
    """The line about items whose best texts score the same, where these count as right.

    Args:
        share: of the task's items.
        task: the one with the most.
        backend: its name.
    """
    return f"{_warning(share > _FEW)}{share:.1%} ties in {task}, counted as right ({backend})"


def _warning(is_one: bool) -> str:
    return "WARNING: " if is_one else ""
