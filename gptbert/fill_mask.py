"""Fill `<mask>` in a text with the masked objective: `python -m gptbert.fill_mask RUN "text with <mask>"`."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.screen import log, table
from gptbert.model import GPTBert
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.encoding import decode_behind, encode_with_masks
from gptbert.text.special_tokens import MASK_ID
from gptbert.text.tokenizer import ordinary_ids


@dataclass(frozen=True, kw_only=True)
class FillMaskSettings(ModelChoice):
    """Show the likeliest tokens for each `<mask>` in a text."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """Text with at least one <mask>, which stands for one token. Word tokens include the preceding space, so write the
    mask without one: "one<mask> three"."""
    top_k: int = 5
    """Candidates per mask."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"--top_k is {self.top_k}, expected at least 1")


@torch.no_grad()
def fill_masks(model: GPTBert, tokenizer: Tokenizer, text: str, top_k: int = 3) -> list[list[tuple[str, float]]]:
    """The likeliest tokens for each `<mask>` in a text, without special tokens.

    The objective is masked *next*-token prediction, so a mask is predicted from the position before it. Each mask is
    predicted with the others still masked.

    Args:
        model: in eval mode.
        tokenizer: the one it was trained with.
        text: with at least one `<mask>`, which stands for one token.
        top_k: candidates per mask.

    Returns:
        For each mask, `top_k` pairs of text and probability (among non-special tokens), the likeliest first; fewer if
        the vocabulary is smaller.

    Raises:
        InputError: the text has no `<mask>`, or is not UTF-8.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([encode_with_masks(tokenizer, text)], device=device)  # [1, T]
    masks = (ids[0] == MASK_ID).nonzero().squeeze(-1)
    if len(masks) == 0:
        raise InputError(f"no <mask> in {text!r}")
    allowed = torch.tensor(ordinary_ids(tokenizer), device=device)
    hidden_states = model.encode(ids, torch.zeros_like(ids), causal=False)
    logits = model.logits(hidden_states[0, masks - 1]).float()[:, allowed]  # [masks, allowed]
    best = logits.softmax(dim=-1).topk(min(top_k, len(allowed)))  # [masks, top_k]
    before = [ids[0, :mask].tolist() for mask in masks]
    return [
        [(decode_behind(tokenizer, text_ids, [token]), probability) for token, probability in zip(*row, strict=True)]
        for text_ids, *row in zip(before, allowed[best.indices].tolist(), best.values.tolist(), strict=True)
    ]


def fill_mask(settings: FillMaskSettings) -> None:
    """Print a table of candidates, two columns per mask.

    Raises:
        InputError: the checkpoint or the text cannot be used.
    """
    trained = TrainedModel.load(settings)
    masks = fill_masks(trained.model, trained.tokenizer, settings.text, settings.top_k)
    rows = [[""] + [cell for number in range(1, len(masks) + 1) for cell in (f"mask {number}", "")]]
    for rank, candidates in enumerate(zip(*masks, strict=True), start=1):
        cells = [cell for text, probability in candidates for cell in (repr(text), f"{probability:.1%}")]
        rows.append([str(rank), *cells])
    print(table(rows))
    if lone := masks_behind_lone_spaces(trained.tokenizer, settings.text):
        log(
            f"note: mask {', '.join(map(str, lone))} stands behind a space of its own, and words bring theirs: leave "
            'it out, as in "one<mask> three"'
        )
    trained.explain()


def masks_behind_lone_spaces(tokenizer: Tokenizer, text: str) -> list[int]:
    """The masks, from 1, that follow a token that is a space and no more: a word behind it would lack its own."""
    ids = encode_with_masks(tokenizer, text)
    places = [place for place, token in enumerate(ids) if token == MASK_ID]
    return [
        number
        for number, place in enumerate(places, start=1)
        if decode_behind(tokenizer, ids[: place - 1], ids[place - 1 : place]) == " "
    ]


def main() -> None:
    """Entry point."""
    run_command(FillMaskSettings, fill_mask)


if __name__ == "__main__":
    main()
