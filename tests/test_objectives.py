"""Inputs and labels of each objective."""

import pytest
import torch

from gptbert.data.objectives import Masking, causal_batch, masked_batch
from gptbert.data.packing import RowStream
from gptbert.text.special_tokens import BOS_ID, MASK_ID, PAD_ID


@pytest.fixture(scope="module")
def some_rows(make_store):
    rows = RowStream(make_store([9, 3, 21, 0, 6]), 12, (1,)).rows(0, 4)
    return rows, *(torch.from_numpy(array) for array in (rows.tokens, rows.document_ids, rows.row_ids))


def test_causal_labels_are_the_next_tokens_of_the_same_piece(some_rows):
    _, tokens, document_ids, _ = some_rows
    batch = causal_batch(tokens, document_ids)
    assert batch.is_causal.all()
    rows, width = tokens.shape
    assert batch.input_ids.shape == batch.document_ids.shape == batch.labels.shape == (rows, width - 1)
    seen = 0
    for row in range(rows):
        for position in range(width - 1):
            following = tokens[row, position + 1].item()
            assert batch.input_ids[row, position] == tokens[row, position]
            assert batch.document_ids[row, position] == document_ids[row, position]
            if following in {BOS_ID, PAD_ID}:
                assert batch.labels[row, position] == -100
            else:
                seen += 1
                assert batch.labels[row, position] == following
                assert document_ids[row, position] == document_ids[row, position + 1]  # predicted from its own document
    assert seen == 39
    assert batch.label_counts.tolist() == [0, 39]


def test_masked_labels_are_masked_one_position_later(some_rows):
    _, tokens, document_ids, row_ids = some_rows
    masking = Masking(mask_p=0.4, random_p=0.0, keep_p=0.0, vocab_size=300, special_ids=tuple(range(16)), seed=5)
    batch = masked_batch(tokens, document_ids, row_ids, masking)
    assert not batch.is_causal.any()
    hidden = tokens[:, :-1] != batch.input_ids
    assert hidden.any()
    assert (batch.input_ids[hidden] == MASK_ID).all()
    assert torch.equal(batch.document_ids, document_ids[:, :-1])
    # every masked input but the first is a label one position earlier; the last label's input is cut off
    assert torch.equal(hidden[:, 1:], batch.labels[:, :-1] != -100)
    labeled = batch.labels != -100
    assert torch.equal(batch.labels[labeled], tokens[:, 1:][labeled])
    again = masked_batch(tokens, document_ids, row_ids, masking)
    assert torch.equal(again.labels, batch.labels)
