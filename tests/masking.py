"""Span masking with the settings that most of its tests share."""

import torch

from kernels import span_mask

SPECIAL, VOCAB, MASK = 16, 1000, 4
WORD = 2**32
SHARES = {"mask_p": 0.3, "random_p": 0.1, "keep_p": 0.1}
ALL = {**SHARES, "mask_token_id": MASK, "vocab_size": VOCAB, "num_special_tokens": SPECIAL}


def mask(tokens, row_ids=None, seed=1, *, backend="torch", **changes):
    row_ids = torch.arange(len(tokens)) if row_ids is None else row_ids
    return span_mask(tokens, seed=seed, row_ids=row_ids, backend=backend, **{**ALL, **changes})


def some_tokens(rows, length, lowest=10, seed=2):
    return torch.randint(lowest, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
