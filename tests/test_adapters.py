"""Exported models with embeddings as inputs, types of tokens, and the real peft's adapters; run as test_export.py."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gptbert.export import ExportConfig, export
from tests.exported import SHAPE, write_checkpoint

CLASSES = {
    "FEATURE_EXTRACTION": AutoModel,
    None: AutoModelForMaskedLM,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    checkpoint, _ = write_checkpoint(folder)
    export(ExportConfig(checkpoint, folder / "exported"))
    return folder / "exported"


def load(auto, folder):
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


def some_ids():
    return torch.randint(16, SHAPE.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("auto", CLASSES.values())
def test_embeddings_stand_in_for_ids(folder, auto):
    loaded, ids = load(auto, folder), some_ids()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    embeddings = loaded.get_input_embeddings()(ids)
    assert torch.equal(loaded(inputs_embeds=embeddings, attention_mask=mask)[0], loaded(ids, mask)[0])
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
            loaded(**wrong)


@torch.no_grad()
@pytest.mark.parametrize("auto", CLASSES.values())
def test_types_of_tokens_are_zero(folder, auto):
    loaded, ids = load(auto, folder), some_ids()
    assert torch.equal(loaded(ids, token_type_ids=torch.zeros_like(ids))[0], loaded(ids)[0])
    with pytest.raises(ValueError, match="token_type_ids are not all 0"):
        loaded(ids, token_type_ids=torch.ones_like(ids))


def test_embeddings_are_continued_as_ids_are(folder):
    loaded, ids = load(AutoModelForCausalLM, folder), some_ids()
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = loaded.generate(ids, **settings)[:, LENGTH:]
    embeddings = loaded.get_input_embeddings()(ids)
    for use_cache in (True, False):
        assert torch.equal(loaded.generate(inputs_embeds=embeddings, use_cache=use_cache, **settings), expected)


@pytest.mark.parametrize("task", CLASSES)
def test_lora_trains_any_task_and_comes_back(folder, tmp_path, task):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, ids = load(CLASSES[task], folder), some_ids()
    before = base(ids)[0].detach()
    head = ["head"] if task in {"SEQ_CLS", "TOKEN_CLS"} else None
    settings = peft.LoraConfig(r=2, task_type=task, target_modules="all-linear", modules_to_save=head)
    adapted = peft.get_peft_model(base, settings)
    torch.testing.assert_close(adapted(input_ids=ids)[0], before)  # LoRA begins with zeros
    optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids)[0].square().mean().backward()
        optimizer.step()
    adapted.eval()
    after = adapted(input_ids=ids, attention_mask=torch.ones_like(ids))[0].detach()
    assert not torch.allclose(after, before, atol=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(CLASSES[task], folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids)[0], after)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_prompts_are_trained(folder, task):
    peft = pytest.importorskip("peft")
    base, ids = load(CLASSES[task], folder), some_ids()
    adapted = peft.get_peft_model(base, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
    output = adapted(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    output.square().mean().backward()
    prompt = adapted.prompt_encoder.default.embedding.weight
    assert prompt.grad.abs().sum() > 0
    embeddings = torch.cat([prompt.expand(2, -1, -1), base.get_input_embeddings()(ids)], dim=1)
    expected = base(inputs_embeds=embeddings)[0]
    torch.testing.assert_close(output, expected[:, -output.shape[1] :] if output.ndim == 3 else expected)


def test_prompts_are_continued(folder):
    peft = pytest.importorskip("peft")
    base, ids = load(AutoModelForCausalLM, folder), some_ids()
    adapted = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    found = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    prompt = adapted.prompt_encoder.default.embedding.weight.expand(2, -1, -1)
    embeddings = torch.cat([prompt, base.get_input_embeddings()(ids)], dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    expected = base.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(found[:, LENGTH:], expected)
