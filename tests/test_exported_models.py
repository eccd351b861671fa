"""Exported models as transformers' users run them: implementations of attention, caches, checkpointing, heads.

`make test` runs this file with the newest transformers, 5.0 and 4.51.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from gptbert.export import ExportConfig, export
from tests.exported import SHAPE, assert_same_model, write_checkpoint

LENGTH = 30  # beyond max_position_embeddings
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    export(ExportConfig(write_checkpoint(folder)[0], folder / "exported"))
    return folder / "exported"


def load(auto, folder, **settings):
    return auto.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def some_ids(*shape):
    return torch.randint(16, 300, shape, generator=torch.Generator().manual_seed(0))


def padded_mask():
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, 20:] = mask[1, :9] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_sdpa_is_the_default_and_computes_what_eager_does(folder, auto):
    sdpa, eager = load(auto, folder), load(auto, folder, attn_implementation="eager")
    assert [each.config._attn_implementation for each in (sdpa, eager)] == ["sdpa", "eager"]
    ids, calls = some_ids(3, LENGTH), []
    nothing = torch.rand(3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    nothing[:, 4] = False  # a query that sees no key
    with pytest.MonkeyPatch.context() as patch:
        original = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or original(*args, **kw))
        for mask in (None, padded_mask(), nothing):
            assert sdpa(ids, mask).logits.isfinite().all()
            torch.testing.assert_close(sdpa(ids, mask).logits, eager(ids, mask).logits, **CLOSE)
    assert len(calls) == 3 * 2 * SHAPE.num_hidden_layers, "sdpa alone, in each layer"
    found, expected = (each(ids, output_attentions=True).attentions for each in (sdpa, eager))
    torch.testing.assert_close(found, expected)  # which sdpa does not have: computed by eager


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_gives_the_same_text(folder, implementation):
    loaded = load(AutoModelForCausalLM, folder, attn_implementation=implementation)
    ids, mask = some_ids(3, LENGTH), padded_mask()
    mask[0] = 1
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = loaded.generate(ids, **settings)
    shapes = set()
    loaded.register_forward_pre_hook(lambda _, __, given: shapes.add(given["attention_mask"].shape), with_kwargs=True)
    assert torch.equal(loaded.generate(ids, cache_implementation="static", **settings), expected)
    assert len(shapes) == 1, "a compiled step would be recorded once for each"
    assert len(set(expected[:, LENGTH:].flatten().tolist())) > 10


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(folder, use_reentrant):
    """With dropout, whose masks are drawn again."""
    loaded, ids = load(AutoModelForMaskedLM, folder).train(), some_ids(2, 12)
    calls = []
    loaded.transformer.mlp_layers[1].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        loaded.zero_grad()
        torch.manual_seed(5)
        loaded(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in loaded.named_parameters()}

    expected = gradients()
    assert len(calls) == 1
    loaded.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert len(calls) == 2, "the backward computes the layer again"
    torch.testing.assert_close(found, expected)
    loaded.gradient_checkpointing_disable()
    gradients()
    assert len(calls) == 1


def test_the_trainer_checkpoints(folder, tmp_path):
    pytest.importorskip("accelerate")
    # beside 4.51, a newer `datasets` may not load
    trainer = pytest.importorskip("transformers.trainer", exc_type=ImportError)
    loaded = load(AutoModelForCausalLM, folder)
    calls = []
    loaded.transformer.mlp_layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    arguments = trainer.TrainingArguments(
        str(tmp_path / "out"), gradient_checkpointing=True, use_cpu=True, disable_tqdm=True, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in some_ids(4, 9)]
    trainer.Trainer(loaded, arguments, train_dataset=rows).train()
    assert len(calls) == 2 * 2


def test_outputs_are_tuples_if_the_configuration_says_so(folder):
    ids, loaded = some_ids(2, 9), load(AutoModelForMaskedLM, folder, return_dict=False)
    (logits,) = loaded(ids)
    torch.testing.assert_close(loaded(ids, return_dict=True).logits, logits)


def test_answers_to_questions(folder, tmp_path):
    torch.manual_seed(0)
    loaded, ids, mask = load(AutoModelForQuestionAnswering, folder), some_ids(3, LENGTH), padded_mask()
    first, last = torch.tensor([2, 12, 7]), torch.tensor([4, 12, LENGTH + 5])
    output = loaded(ids, mask, start_positions=first, end_positions=last)
    assert output.start_logits.shape == output.end_logits.shape == (3, LENGTH)
    # the last end is outside of the row, and is ignored
    expected = F.cross_entropy(output.start_logits, first) + F.cross_entropy(output.end_logits[:2], last[:2])
    torch.testing.assert_close(output.loss, expected / 2)
    assert loaded(ids, mask).loss is None
    assert len(loaded(ids, mask, start_positions=first, end_positions=last, return_dict=False)) == 3
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(load(AutoModelForQuestionAnswering, tmp_path / "again"), loaded, ids, mask)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_choices_are_scored_one_by_one(folder, tmp_path, is_decoder):
    torch.manual_seed(0)
    loaded = load(AutoModelForMultipleChoice, folder, is_decoder=is_decoder)
    ids, mask = some_ids(2, 3, 9), torch.ones(2, 3, 9, dtype=torch.long)
    mask[0, 1, 5:] = mask[1, 2, :4] = 0
    labels = torch.tensor([1, 2])
    output = loaded(ids, mask, labels=labels)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(loaded(ids[1:, 2:, 4:]).logits, output.logits[1:, 2:], **CLOSE)  # without padding
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    embeddings = loaded.get_input_embeddings()(ids)
    types = torch.zeros_like(ids)
    again = loaded(inputs_embeds=embeddings, attention_mask=mask, token_type_ids=types)
    assert torch.equal(again.logits, output.logits)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(load(AutoModelForMultipleChoice, tmp_path / "again"), loaded, ids, mask)
    assert load(AutoModelForSequenceClassification, folder, num_labels=3)(ids[0]).logits.shape == (3, 3)


def test_a_new_model_is_initialized(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    for alpha in model.transformer.dwa_modules.alphas:
        assert alpha.tolist() == [0.0] * (len(alpha) - 1) + [1.0]
    std = (2 / (5 * config.hidden_size)) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.abs().max() <= 2 * std + 1e-6, name
            assert parameter.std().item() == pytest.approx(0.88 * std, rel=0.2), name


def test_loaded_weights_are_not_initialized_again(folder):
    """In transformers 5.0 to 5.2 all modules are initialized after loading; loaded parameters have a mark."""
    model = load(AutoModel, folder)
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for alpha in model.transformer.dwa_modules.alphas:
        alpha._is_hf_initialized = True
    model._init_weights(model.transformer.dwa_modules.alphas)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_weights_are_offloaded(folder, auto):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    loaded, ids = load(auto, folder), some_ids(2, 9)
    expected = loaded(ids).logits
    accelerate.cpu_offload(loaded, execution_device="cpu")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    torch.testing.assert_close(loaded(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_eager_is_in_fp64_what_sdpa_is(folder, auto):
    ids, mask, outputs = some_ids(3, LENGTH), padded_mask(), []
    for implementation in ("sdpa", "eager"):
        loaded = load(auto, folder, attn_implementation=implementation).double()
        logits = loaded(ids, mask).logits
        logits.square().mean().backward()  # also of queries that see no key
        outputs.append((logits, {name: parameter.grad for name, parameter in loaded.named_parameters()}))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
