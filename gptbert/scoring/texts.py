"""Log-probabilities of texts, or of pairs of texts, in Python; docs/python.md."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from gptbert.errors import InputError
from gptbert.model.eval_mode import eval_mode
from gptbert.model.objective import Objective
from gptbert.scoring.likelihood import log_likelihoods
from gptbert.scoring.trained_model import TrainedModel
from gptbert.text.encoding import encode_sentences

OBJECTIVES = {"causal": Objective.CLM, "mntp": Objective.MLM}


def score(
    model: TrainedModel,
    texts: Iterable[str] | Iterable[tuple[str, str]],
    *,
    backend: Literal["causal", "mntp"] = "causal",
    temperature: float = 1.0,
    batch_tokens: int = 8192,
) -> np.ndarray:
    """Log-probabilities of texts, those that `python -m gptbert.score` compares.

    Args:
        model: from `load_model`; its train/eval mode is restored.
        texts: N texts, or N pairs of texts, as plain text, in which `<mask>` is not a mask.
        backend: "causal" for the log-likelihood; "mntp" for the masked next-token pseudo-log-likelihood, which needs
            one row per token.
        temperature: divides the logits.
        batch_tokens: tokens that go through the model at once.

    Returns:
        [N] fp64 in nats, or [N, 2] for pairs; 0 for an empty text.

    Raises:
        InputError: an argument cannot be used.
    """
    if backend not in OBJECTIVES:
        raise InputError(f"backend is {backend!r}, expected one of {', '.join(OBJECTIVES)}")
    if not 0.01 <= temperature <= 100:
        raise InputError(f"temperature is {temperature}, expected a number from 0.01 to 100")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}, expected at least 1")
    given: list[Any] = list(texts)  # once: it may be a generator
    if isinstance(texts, str) or not (all(map(_is_text, given)) or all(map(_is_pair, given))):
        raise InputError("texts: expected a list of texts, or a list of pairs of texts")
    are_pairs = any(map(_is_pair, given))
    rows = given if are_pairs else [[text] for text in given]
    sentences = encode_sentences(model.tokenizer, [text for row in rows for text in row])
    with eval_mode(model.model):
        of_each = log_likelihoods(model.model, sentences, OBJECTIVES[backend], (temperature,), batch_tokens)
    scores = of_each[:, 0].numpy()
    return scores.reshape(-1, 2) if are_pairs else scores


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_text, value))
