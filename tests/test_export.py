"""Exported folders in real transformers: `make test` runs this file with the newest release, 5.0 and 4.51."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from gptbert.checkpoint import manifest
from gptbert.errors import InputError
from gptbert.export import ExportConfig, export
from gptbert.huggingface.tokenizer_files import write_tokenizer_files
from gptbert.text.encoding import encode_sentences, encode_with_masks
from gptbert.text.special_tokens import MASK_ID
from gptbert.text.tokenizer import load_tokenizer
from tests.exported import CLOSE, LENGTH, SHAPE, assert_same_model, write_checkpoint
from tests.tokenizer_kinds import TEXT, kinds


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The exported folders of EMA and plain weights, and the models that they come from."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint, models = write_checkpoint(folder)
    export(ExportConfig(checkpoint, folder / "ema"))
    export(ExportConfig(checkpoint, folder / "model", weights="model"))
    return folder, models


@pytest.fixture
def folder(exported):
    return exported[0] / "ema"


@pytest.fixture
def model(exported):
    return exported[1]["ema"]


def load(auto, folder, **settings):
    loaded, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **settings)
    assert not info["unexpected_keys"]
    assert all(name.startswith("head.") for name in info["missing_keys"])
    assert loaded.dtype == torch.float32
    return loaded.eval().double()


def some_ids(rows=3, length=LENGTH):
    ids = torch.randint(16, SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    ids[:, 5::7] = MASK_ID
    return ids


@torch.no_grad()
def expected_logits(model, ids, causal, document_ids=None):
    document_ids = torch.zeros_like(ids) if document_ids is None else document_ids
    return model.logits(model.encode(ids, document_ids, causal))


@torch.no_grad()
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_logits_are_the_trainers(exported, weights):
    folder, models = exported
    ids = some_ids()
    causal = load(AutoModelForCausalLM, folder / weights)(ids).logits
    torch.testing.assert_close(causal, expected_logits(models[weights], ids, causal=True), **CLOSE)
    raw = expected_logits(models[weights], ids, causal=False)
    masked = load(AutoModelForMaskedLM, folder / weights)(ids).logits
    torch.testing.assert_close(masked[:, 1:], raw[:, :-1], **CLOSE)  # logits that predict token t are at position t
    as_computed = load(AutoModelForMaskedLM, folder / weights, shift_masked_logits=False)(ids).logits
    torch.testing.assert_close(as_computed, raw, **CLOSE)


@torch.no_grad()
def test_representations_are_the_trainers(folder, model):
    ids = some_ids()
    for settings, causal in (({}, False), ({"is_decoder": True}, True)):
        output = load(AutoModel, folder, **settings)(ids, output_hidden_states=True, output_attentions=True)
        expected = model.encode(ids, torch.zeros_like(ids), causal)
        # transformers' attention maps come with a softmax in fp32
        torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-5, atol=3e-5)
        assert len(output.hidden_states) == SHAPE.num_hidden_layers + 1
        assert len(output.attentions) == SHAPE.num_hidden_layers
        sums = output.attentions[1].sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert sums.shape == (3, SHAPE.num_attention_heads, LENGTH)


@torch.no_grad()
def test_a_cache_changes_nothing(folder):
    loaded = load(AutoModelForCausalLM, folder)
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole = loaded(ids, mask, use_cache=False)
    assert whole.get("past_key_values", whole.get("cache")) is None
    parts, cache = [], None
    for first, end in ((0, 17), (17, 18), (18, 31), (31, LENGTH)):
        output = loaded(ids[:, first:end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.get("past_key_values", output.get("cache"))
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole.logits[mask.bool()], **CLOSE)
    torch.testing.assert_close(loaded(ids, mask, logits_to_keep=1).logits, whole.logits[:, -1:], **CLOSE)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(loaded(ids, mask, logits_to_keep=some).logits, whole.logits[:, some], **CLOSE)


def test_generate_with_and_without_cache(folder):
    loaded = load(AutoModelForCausalLM, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = ["The following example shows how to", "A"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    settings = {"max_new_tokens": 20, "do_sample": False}
    cached = loaded.generate(**inputs, **settings)
    assert torch.equal(cached, loaded.generate(**inputs, **settings, use_cache=False))
    prompt = inputs.input_ids.shape[1]
    assert cached.shape == (2, prompt + 20)
    assert cached[:, prompt:].min() >= 16
    assert cached.max() < len(tokenizer)
    for row, text in enumerate(texts):
        alone = loaded.generate(**tokenizer(text, return_tensors="pt"), **settings)
        assert torch.equal(alone[0, -20:], cached[row, -20:])
    assert loaded.generate(**inputs, max_new_tokens=3, num_beams=3, do_sample=False).shape == (2, prompt + 3)


def test_what_generate_is_asked_for_reaches_the_model(folder):
    loaded, ids = load(AutoModelForCausalLM, folder), some_ids(rows=1, length=5)
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **wanted)
    assert [states[-1].shape[1] for states in output.hidden_states] == [5, 1]
    assert [probabilities[0].shape[-1] for probabilities in output.attentions] == [5, 6]
    with pytest.raises(ValueError, match="token_type_ids are not all 0"):
        loaded.generate(ids, token_type_ids=torch.ones_like(ids), max_new_tokens=2)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_losses_are_means_over_labels(folder, auto):
    loaded, ids = load(auto, folder), some_ids()
    labels = torch.where(torch.arange(LENGTH) % 3 == 0, ids, -100)
    output = loaded(ids, labels=labels)
    shift = int(auto is AutoModelForCausalLM)
    log_probabilities = output.logits.log_softmax(-1)
    terms = [
        -log_probabilities[row, position - shift, ids[row, position]]
        for row in range(3)
        for position in range(shift, LENGTH)
        if labels[row, position] >= 0
    ]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean().float())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_masked_loss_is_the_same_wherever_the_logits_are(folder):
    ids = some_ids()
    labels = torch.where(torch.arange(LENGTH) % 3 == 1, ids, -100)
    shifted, raw = (load(AutoModelForMaskedLM, folder, shift_masked_logits=shift) for shift in (True, False))
    torch.testing.assert_close(raw(ids, labels=labels).loss, shifted(ids, labels=labels).loss)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_classification_reads_one_token_whatever_the_padding(folder, is_decoder):
    loaded = load(AutoModelForSequenceClassification, folder, num_labels=3, is_decoder=is_decoder)
    ids = some_ids(rows=1, length=9)
    right, left = (torch.nn.functional.pad(ids, sides, value=3) for sides in ((0, 4), (4, 0)))
    alone = loaded(ids).logits
    assert alone.shape == (1, 3)
    for padded in (right, left):
        torch.testing.assert_close(loaded(padded, (padded != 3).long()).logits, alone, **CLOSE)
    assert loaded(ids, labels=torch.tensor([2])).loss > 0
    regression = load(AutoModelForSequenceClassification, folder, num_labels=1)
    torch.testing.assert_close(
        regression(ids, labels=torch.tensor([0.5])).loss, (regression(ids).logits[0, 0] - 0.5).square().float()
    )
    assert load(AutoModelForTokenClassification, folder, num_labels=5)(ids).logits.shape == (1, 9, 5)


def damaged(folder, tmp_path, change):
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("transformer.dwa_modules.alphas.3"), "1 missing weights: .*alphas.3"),
        (lambda weights: weights.pop("classifier.nonlinearity.5.bias"), "1 missing weights: classifier"),
        (lambda weights: weights.update(more=torch.ones(2)), "1 unknown weights: more"),
    ],
)
def test_loading_is_strict(folder, tmp_path, change, message):
    copy = damaged(folder, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForMaskedLM.from_pretrained(copy, trust_remote_code=True)


def test_classes_have_lists_where_transformers_has_lists(folder):
    """Releases from 4.57 to 5.8 add a list to what may be unexpected, so there a tuple ends every `from_pretrained`."""
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSequenceClassification):
        loaded = load(auto, folder)
        for known in type(loaded).__mro__[: type(loaded).__mro__.index(PreTrainedModel)]:
            assert isinstance(known.__dict__.get("_keys_to_ignore_on_load_unexpected", []), list)
        assert isinstance(type(loaded)._no_split_modules, list)


def test_tokenizer_is_the_trainers(folder, exported):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.is_fast
    text = "This is a list<mask> strings, and ünïcode."
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == load_tokenizer(folder / "tokenizer.json").encode(text).ids
    assert encoded["input_ids"][0] == tokenizer.bos_token_id == 1
    assert encoded["offset_mapping"][0] == (0, 0)
    assert encoded["offset_mapping"][-1][1] == len(text)
    mask = encoded["input_ids"].index(tokenizer.mask_token_id)
    assert text[slice(*encoded["offset_mapping"][mask])] == "<mask>"
    assert set(encoded) == {"input_ids", "attention_mask", "offset_mapping"}
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text.replace("<mask>", "")
    assert tokenizer.pad_token_id == 3


TEXTS = (TEXT, " The cook", "U\N{COMBINING DIAERESIS}nï \N{GRINNING FACE}", "red  red\n\n boat", "")


@pytest.mark.parametrize("kind", kinds())
def test_tokenizers_of_every_kind_give_the_ids_that_training_saw(tmp_path, kind):
    (tmp_path / "trained.json").write_text(kinds()[kind])
    trained = load_tokenizer(tmp_path / "trained.json")
    write_tokenizer_files(trained, tmp_path, 200)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    exported.save_pretrained(tmp_path / "again")
    for tokenizer in (exported, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in TEXTS:
            assert tokenizer(text)["input_ids"] == encode_sentences(trained, [text])[0]
        # a normalizer that puts a space in front does so behind each special token
        masked = "The cook<mask>a boat." if "Prepend" in kinds()[kind] else "The cook<mask> a boat."
        assert tokenizer(masked)["input_ids"] == encode_with_masks(trained, "The cook<mask> a boat.")
        assert tokenizer(TEXT, "a", return_token_type_ids=False)["input_ids"].count(1) == 2
        ids = tokenizer(TEXT)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == trained.decode(ids)
        assert len(tokenizer) == trained.get_vocab_size()
        assert tokenizer.mask_token_id == MASK_ID


def test_an_exported_folder_has_the_tokenizer_that_its_card_promises(exported, tmp_path):
    """Of a checkpoint whose tokenizer asks for other tokens around a text, random merges and at most four tokens."""
    checkpoint = shutil.copytree(exported[0] / "checkpoint", tmp_path / "checkpoint")
    content = json.loads(kinds()["RoBERTa's post-processor"])
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content |= {"model": content["model"] | {"dropout": 0.5}, "truncation": truncation}
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    manifest.write(checkpoint)
    export(ExportConfig(checkpoint, tmp_path / "out"))
    trained = load_tokenizer(checkpoint / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    (expected,) = encode_sentences(trained, [TEXT])
    assert all(tokenizer(TEXT)["input_ids"] == expected for _ in range(5))
    assert "The tokenizer prepends `<s>`" in (tmp_path / "out" / "README.md").read_text()
    never = json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"]
    assert never == [*range(5), *range(320, SHAPE.vocab_size)], "special tokens, and ids that the tokenizer lacks"


def test_pipelines_find_the_tokenizer(folder):
    """Those of transformers 4.51 to 4.53 ask config.json whether there is one."""
    tokenizer_class = json.loads((folder / "config.json").read_text())["tokenizer_class"]
    assert tokenizer_class == json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    fill = pipeline("fill-mask", model=str(folder), trust_remote_code=True)
    found = fill("One<mask> three", top_k=2)
    inputs = fill.tokenizer("One<mask> three", return_tensors="pt")
    scores = load(AutoModelForMaskedLM, folder)(**inputs).logits[inputs.input_ids == MASK_ID]
    assert [each["token"] for each in found] == scores[0].topk(2).indices.tolist()


def test_what_transformers_saves_again_is_the_same(folder, tmp_path):
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        loaded = load(auto, folder)
        loaded.float().save_pretrained(tmp_path / auto.__name__)
        ids = some_ids()
        for other in (AutoModelForMaskedLM, AutoModelForCausalLM):  # the code is saved too, for every class
            again = load(other, tmp_path / auto.__name__)
            assert_same_model(again, load(other, folder), ids)
        weights = (load_file(path / "model.safetensors") for path in (folder, tmp_path / auto.__name__))
        assert next(weights).keys() == next(weights).keys()


def test_refusals_leave_nothing(exported, tmp_path, capsys):
    checkpoint = exported[0] / "checkpoint"
    (tmp_path / "there").mkdir()
    for settings, message in (
        (ExportConfig(tmp_path, tmp_path / "out"), "neither a checkpoint nor a run"),
        (ExportConfig(checkpoint, tmp_path / "there"), "is there already"),
        (ExportConfig(checkpoint, tmp_path / "out", words=True), "--words: .* has no checkpoints by words"),
    ):
        with pytest.raises(InputError, match=message):
            export(settings)
    copy = tmp_path / "cut"
    shutil.copytree(checkpoint, copy)
    (copy / "train_config.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        export(ExportConfig(copy, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "there"]


def test_configuration_keeps_the_published_keys(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name, value in vars(SHAPE).items():
        assert getattr(config, name) == value
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


@torch.no_grad()
def test_the_config_says_where_masked_logits_are(exported, tmp_path, capsys):
    """Each backend of BabyLM's evaluation reads a token's score where the trainer computes it."""
    folder, models = exported
    ids = some_ids(rows=1)
    raw = expected_logits(models["ema"], ids, causal=False)
    for settings, alignment, backend in (
        ({}, "token", "mlm"), ({"babylm": True}, "previous", "mntp"),
        ({"shift_masked_logits": False}, "previous", "mntp"),
    ):  # fmt: skip
        output = tmp_path / "-".join(["out", *settings])
        export(ExportConfig(folder / "checkpoint", output, **settings))
        assert f"--backend {backend} (or causal)" in capsys.readouterr().out
        assert json.loads((output / "config.json").read_text())["masked_logits_alignment"] == alignment
        assert f"`--backend {backend}`" in " ".join((output / "README.md").read_text().split())
        logits = load(AutoModelForMaskedLM, output)(ids).logits
        position = 7  # of a token: mlm reads its own position, mntp the one before
        read = logits[0, position if backend == "mlm" else position - 1]
        torch.testing.assert_close(read, raw[0, position - 1], **CLOSE)


def test_a_config_that_contradicts_itself_does_not_load(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"shift_masked_logits": False}))
    with pytest.raises(ValueError, match=r'shift_masked_logits is false, .*: "previous", not "token"; change both'):
        AutoConfig.from_pretrained(copy, trust_remote_code=True)
    del values["masked_logits_alignment"]  # as older folders
    (copy / "config.json").write_text(json.dumps(values | {"shift_masked_logits": False}))
    assert AutoConfig.from_pretrained(copy, trust_remote_code=True).masked_logits_alignment == "previous"
    turned = AutoConfig.from_pretrained(folder, trust_remote_code=True, shift_masked_logits=False)
    turned.save_pretrained(tmp_path / "turned")
    assert json.loads((tmp_path / "turned" / "config.json").read_text())["masked_logits_alignment"] == "previous"
