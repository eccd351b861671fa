"""A batch of rows of both objectives, and batches of some of its rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptbert.model.batch import Batch
from gptbert.model.objective import Objective
from kernels import IGNORE_INDEX

CPU = torch.device("cpu")


def numbered(masked, causal, length=3):
    """A batch whose rows hold their own index, and in each tensor another number on top."""
    ids = torch.arange(masked + causal)[:, None].expand(-1, length)
    return Batch(ids, ids + 1000, ids + 2000, num_masked=masked)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
def test_every_row_is_in_one_of_the_batches_that_take_each_nth(masked, causal, step):
    batch = numbered(masked, causal)
    pieces = [batch[first::step] for first in range(step)]
    sizes = [len(piece) for piece in pieces]
    assert sum(sizes) == len(batch)
    assert max(sizes) - min(sizes) <= 1
    assert max(piece.num_masked for piece in pieces) - min(piece.num_masked for piece in pieces) <= 1
    rows = [row for piece in pieces for row in piece.input_ids[:, 0].tolist()]
    assert sorted(rows) == list(range(len(batch)))
    for piece in pieces:
        causal_rows = piece.input_ids[:, 0] >= masked
        assert torch.equal(piece.is_causal, causal_rows), "rows keep their objective"
        assert torch.equal(piece.document_ids, piece.input_ids + 1000)
        assert torch.equal(piece.labels, piece.input_ids + 2000)


def test_an_objective_is_known_by_its_index():
    batch = numbered(2, 1)
    objectives = [list(Objective)[index] for index in batch.objectives]
    assert objectives == [Objective.MLM, Objective.MLM, Objective.CLM]
    assert batch.is_causal.tolist() == [objective.causal for objective in objectives]


def test_labels_are_counted_for_each_objective():
    batch = numbered(2, 2)
    labels = batch.labels.clone()
    labels[0, :2] = labels[3, 1] = IGNORE_INDEX
    assert Batch(labels, labels, labels, num_masked=2).label_counts.tolist() == [4, 5]
    assert batch[:2].label_counts.tolist() == [6, 0]


def test_masked_rows_come_first_in_a_joined_batch():
    masked, causal = numbered(2, 0), numbered(0, 3)
    joined = Batch.cat([masked, causal])
    assert (len(joined), joined.num_masked) == (5, 2)
    assert joined.labels[:, 0].tolist() == [2000, 2001, 2000, 2001, 2002]
    assert Batch.cat([masked, masked, causal, causal]).num_masked == 4
    assert Batch.cat([causal]) is causal
    with pytest.raises(ValueError, match="come first"):
        Batch.cat([causal, masked])


def test_padding_has_no_label():
    batch = Batch.padding(7, CPU)
    assert batch.input_ids.shape == batch.document_ids.shape == (1, 7)
    assert batch.label_counts.tolist() == [0, 0]
    assert (batch.document_ids == -1).all()


def test_a_clone_shares_no_memory():
    batch = numbered(1, 1)
    clone = batch.clone()
    clone.copy_(Batch.cat([numbered(1, 0), numbered(0, 1)]))
    assert (clone.num_masked, clone.labels[:, 0].tolist()) == (1, [2000, 2000])
    for one, other in ((batch, numbered(1, 1)), (clone, Batch.cat([numbered(1, 0), numbered(0, 1)]))):
        for name in ("input_ids", "document_ids", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
