"""Attention masks of exported models: their forms, and padding on either side; run as test_export.py."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    modeling_utils,
)

from gptbert.export import ExportConfig, export
from gptbert.text.special_tokens import MASK_ID, PAD_ID
from tests.exported import CLOSE, LENGTH, SHAPE, write_checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported folder, and the model that it comes from."""
    folder = tmp_path_factory.mktemp("masks")
    checkpoint, models = write_checkpoint(folder)
    export(ExportConfig(checkpoint, folder / "exported"))
    return folder / "exported", models["ema"]


@pytest.fixture
def folder(exported):
    return exported[0]


@pytest.fixture
def model(exported):
    return exported[1]


def load(auto, folder, **settings):
    return auto.from_pretrained(folder, trust_remote_code=True, **settings).eval().double()


def some_ids(rows=3, length=LENGTH):
    ids = torch.randint(16, SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    ids[:, 5::7] = MASK_ID
    return ids


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_padding_stands_on_either_side(folder, auto):
    loaded = load(auto, folder)
    ids, lengths = some_ids(), (LENGTH, 23, 2)
    right, left = torch.full_like(ids, 3), torch.full_like(ids, 3)
    masks = torch.zeros(2, *ids.shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        right[row, :length] = left[row, LENGTH - length :] = ids[row, :length]
        masks[0, row, :length] = masks[1, row, LENGTH - length :] = 1
    from_right, from_left = loaded(right, masks[0]).logits, loaded(left, masks[1]).logits
    for row, length in enumerate(lengths):
        alone = loaded(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(from_right[row, :length], alone, **CLOSE)
        torch.testing.assert_close(from_left[row, LENGTH - length :], alone, **CLOSE)
    ignored = loaded(right, torch.ones_like(right)).logits
    assert not torch.allclose(ignored[2, :2], from_right[2, :2], atol=1e-2) or auto is AutoModelForCausalLM


@torch.no_grad()
def test_padding_without_a_mask_is_told(folder, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    loaded, ids = load(AutoModelForMaskedLM, folder), some_ids()
    loaded(ids)
    ids[0, -1] = PAD_ID
    loaded(ids, torch.ones_like(ids))
    assert not said
    loaded(ids)
    assert "attention_mask" in said[0]


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_pairs_of_positions(folder, model, causal):
    """Packed documents, and padding that attends to nothing and is attended by nothing."""
    ids = some_ids(rows=1)
    document_ids = torch.tensor([[0] * 11 + [1] * 20 + [-1] * 9])
    mask = (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids >= 0)[:, None, :]
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    loaded = load(auto, folder, **({} if causal else {"shift_masked_logits": False}))
    expected = model.logits(model.encode(ids, document_ids, causal))
    torch.testing.assert_close(loaded(ids, mask.long()).logits, expected, **CLOSE)
    torch.testing.assert_close(loaded(ids, mask[:, None]).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 39\), expected \(1, 40\) or \(1, 40, 40\)"):
        loaded(ids, torch.ones(1, LENGTH - 1))


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM])
@pytest.mark.parametrize(
    "hiding", [-math.inf, -10_000.0, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min]
)
def test_additive_masks_are_understood(folder, auto, hiding):
    """As transformers makes them: 0 to attend; also of one row or query for all, and with nothing hidden."""
    loaded, ids = load(auto, folder), some_ids()
    mask = torch.rand(3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.7
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(3, 1, LENGTH, LENGTH).masked_fill(~mask[:, None], hiding)
    expected = loaded(ids, mask).logits
    for same in (additive, mask[:, None], mask[:, None].long(), mask[:, None].float(), mask.half()):
        torch.testing.assert_close(loaded(ids, same).logits, expected, **CLOSE)
    torch.testing.assert_close(
        loaded(ids, additive[1:2]).logits, loaded(ids, mask[1:2].expand(3, -1, -1)).logits, **CLOSE
    )
    by_key = loaded(ids, mask[:, 0]).logits
    keys = additive[:, :, :1].clone()
    if auto is AutoModelForCausalLM:
        torch.testing.assert_close(loaded(ids, keys).logits, by_key, **CLOSE)
    torch.testing.assert_close(loaded(ids, keys[:, 0, 0]).logits, by_key, **CLOSE)
    torch.testing.assert_close(loaded(ids, torch.zeros_like(additive)).logits, loaded(ids).logits, **CLOSE)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_unclear_masks_are_refused(folder, auto):
    loaded, ids = load(auto, folder), some_ids()
    pairs = torch.zeros(3, 1, LENGTH, LENGTH)
    for mask, message in (
        (pairs - 0.5, "values from -0.5 to -0.5"),
        (torch.where(torch.rand_like(pairs) < 0.5, 1.0, -math.inf), "values from -inf to 1"),
        (pairs + math.nan, "values from nan to nan"),
        ((pairs - 10_000).long(), "values from -10000 to -10000"),
        (torch.arange(3 * LENGTH).view(3, LENGTH) // 20, "values from 0 to 5"),
        (torch.zeros(3, LENGTH), "0 everywhere, of floats"),
        (pairs.expand(3, 2, LENGTH, LENGTH).bool(), "attention_mask has shape"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask .*{message}|{message}"):
            loaded(ids, mask)


@torch.no_grad()
def test_a_classifier_reads_its_token_by_an_additive_mask(folder):
    ids = torch.nn.functional.pad(some_ids(rows=1, length=9), (4, 0), value=3)
    mask = (ids != 3).long()
    for is_decoder in (False, True):
        loaded = load(AutoModelForSequenceClassification, folder, num_labels=3, is_decoder=is_decoder)
        torch.manual_seed(0)
        loaded.head.nonlinearity[5].reset_parameters()
        additive = torch.zeros(ids.shape).masked_fill(mask == 0, -math.inf)
        torch.testing.assert_close(loaded(ids, additive).logits, loaded(ids, mask).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("padding_sees", ["nothing", "text", "padding"])
def test_left_padding_is_no_context_by_a_mask_of_pairs_either(folder, padding_sees):
    """A text's first token is predicted from nothing, as without padding, whatever the mask lets padding see."""
    loaded, ids = load(AutoModelForMaskedLM, folder), some_ids(rows=1, length=9)
    padded = torch.nn.functional.pad(ids, (4, 0), value=3)
    is_text = padded[0] != 3
    pairs = is_text[:, None] & is_text
    if padding_sees == "text":
        pairs = is_text.expand(13, 13)
    elif padding_sees == "padding":
        pairs = is_text[:, None] == is_text
    alone = loaded(ids).logits
    for mask in (pairs[None], pairs[None, None], torch.zeros(1, 1, 13, 13).masked_fill(~pairs, -math.inf)):
        torch.testing.assert_close(loaded(padded, mask).logits[:, 4:], alone, **CLOSE)
    if padding_sees == "text":
        torch.testing.assert_close(loaded(padded, is_text[None, None, None]).logits[:, 4:], alone, **CLOSE)
    two = torch.cat([padded, ids], dim=1)  # another document before it is none either
    documents = torch.tensor([[0] * 4 + [1] * 9 + [2] * 9])
    found = loaded(two, documents[:, :, None] == documents[:, None]).logits
    torch.testing.assert_close(found[:, 13:], alone, **CLOSE)
