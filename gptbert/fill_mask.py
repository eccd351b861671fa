"""Fill `<mask>` in a text with the masked objective."""

import torch
from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.tokenizer import MASK_ID


@torch.no_grad()
def fill_masks(model: GPTBert, tokenizer: Tokenizer, text: str, top_k: int = 3) -> list[list[tuple[str, float]]]:
    """The likeliest tokens for each `<mask>` of a text.

    The objective is masked *next*-token prediction, so a mask is predicted from the position before it.

    Args:
        model: in eval mode.
        tokenizer: puts `<s>` in front, and knows `<mask>` in the text.
        text: with at least one `<mask>`, which stands for one token.
        top_k: candidates per mask.

    Returns:
        For each mask, `top_k` pairs of text and probability, the likeliest first.

    Raises:
        InputError: the text has no `<mask>`.
    """
    ids = torch.tensor([tokenizer.encode(text).ids], device=next(model.parameters()).device)  # [1, T]
    masks = (ids[0] == MASK_ID).nonzero().squeeze(-1)
    if len(masks) == 0:
        raise InputError(f"no <mask> in {text!r}")
    hidden_states = model.encode(ids, torch.zeros_like(ids), causal=False)
    best = model.logits(hidden_states[0, masks - 1]).float().softmax(dim=-1).topk(top_k)  # [masks, top_k]
    return [
        [(tokenizer.decode([token]), probability) for token, probability in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
