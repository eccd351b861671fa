"""Weights in files of others: wrappers, containers, formats, and what they say twice."""

import collections
import json
import math
import pickle
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptbert.checkpoint.foreign import read_foreign
from gptbert.checkpoint.saved_model import load_model
from gptbert.errors import InputError
from gptbert.import_hf import ImportConfig, import_hf
from gptbert.model import GPTBert
from gptbert.upstream import TIED_WEIGHT, to_upstream
from tests.exported import SHAPE, random_model, write_checkpoint
from tests.tokenizer_kinds import kinds

EMBEDDING = "embedding.word_embedding.weight"
MATRIX = "transformer.mlp_layers.0.mlp.1.weight"
BUFFER = "transformer.attention_layers.1.position_indices"


@pytest.fixture(scope="module")
def models():
    return {seed: random_model(seed) for seed in (1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where config.json and tokenizer.json are, beside the files of weights."""
    folder = tmp_path_factory.mktemp("foreign")
    checkpoint, _ = write_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(asdict(SHAPE)))
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture
def source(folder, tmp_path):
    """A folder of one's own with config.json and tokenizer.json."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    return tmp_path


def published(model):
    return {name: tensor.clone() for name, tensor in to_upstream(model.state_dict(), SHAPE).items()}


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(state, part="_orig_mod."):
    """As compiled blocks write their names."""
    return {re.sub(r"((?:layers|blocks)\.\d+\.)", rf"\1{part}", name): tensor for name, tensor in state.items()}


def parameters(state):
    return {
        name: torch.nn.Parameter(tensor, requires_grad=index % 2 == 0) if tensor.is_floating_point() else tensor
        for index, (name, tensor) in enumerate(state.items())
    }


def with_attributes(state):
    parameter = torch.nn.Parameter(state[EMBEDDING])
    parameter.is_mine = True  # pickled as another function
    return state | {EMBEDDING: parameter}


def average(state):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1)).state_dict()
    return {"n_averaged": averaged["n_averaged"]} | prefixed("module.", state)


# what may hold the weights of the models 1 and 2: (content, model, average, what is left out)
WRAPPED = {
    "torch.compile(DDP(model))": lambda one, two: (prefixed("_orig_mod.module.", one), 1, 1, []),
    "DDP(torch.compile(model))": lambda one, two: (prefixed("module._orig_mod.", one), 1, 1, []),
    "three of them": lambda one, two: (prefixed("model.module._fsdp_wrapped_module.", one), 1, 1, []),
    "compiled layers": lambda one, two: (inside(one), 1, 1, []),
    "layers in FSDP and checkpointing": lambda one, two: (
        prefixed("module.", inside(one, "_fsdp_wrapped_module._checkpoint_wrapped_module.")), 1, 1, []),
    "Lightning": lambda one, two: ({"state_dict": prefixed("model.", one), "epoch": 3}, 1, 1, []),
    "Lightning under another name": lambda one, two: ({"state_dict": prefixed("net.bert.", one)}, 1, 1, []),
    "DeepSpeed": lambda one, two: ({"module": one, "optimizer": {"exp_avg": two}}, 1, 1, []),
    "model_state_dict": lambda one, two: ({"model_state_dict": one, "loss": 1.0}, 1, 1, []),
    "in two dictionaries": lambda one, two: ({"checkpoint": {"model": prefixed("module.", one)}}, 1, 1, []),
    "the same in two places": lambda one, two: ({"model": one, "state_dict": dict(one)}, 1, 1, []),
    "with and without a prefix": lambda one, two: (one | prefixed("module.", one), 1, 1, []),
    "an average of its own": lambda one, two: ({"model": one, "ema": prefixed("module.", two)}, 1, 2, []),
    "an average by prefix": lambda one, two: (prefixed("model.", one) | prefixed("ema_model.", two), 1, 2, []),
    "only an average": lambda one, two: ({"ema_state_dict": two}, 2, 2, []),
    "AveragedModel": lambda one, two: (average(one), 1, 1, ["n_averaged"]),
    "parameters": lambda one, two: (parameters(one), 1, 1, []),
    "a parameter with attributes": lambda one, two: (with_attributes(one), 1, 1, []),
    "a module's state_dict": lambda one, two: (collections.OrderedDict(parameters(one)), 1, 1, []),
    "without the embedding's name": lambda one, two: (
        {name: one[name] for name in one if name != EMBEDDING}, 1, 1, []),
    "without the output's name": lambda one, two: ({name: one[name] for name in one if name != TIED_WEIGHT}, 1, 1, []),
    "an average as a list": lambda one, two: (
        {"model": one, "ema": {"shadow_params": [*two.values()], "decay": 0.99}}, 1, 1, ["ema.shadow_params"]),
    "settings that name types": lambda one, two: ({"model": one, "dtype": torch.float32}, 1, 1, ["dtype"]),
    "with another task's head": lambda one, two: (
        prefixed("module.", one | {"head.bias": torch.ones(2)}), 1, 1, ["head.bias"]),
    "half precision": lambda one, two: (
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in one.items()}, "half", 1, []),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_weights_come_out_of_any_wrapper(source, models, case, capsys):
    content, model, ema, left_out = WRAPPED[case](published(models[1]), published(models[2]))
    torch.save(content, source / "any.bin")
    import_hf(ImportConfig(source / "any.bin", source / "out"))
    for name, seed in (("model", model), ("ema", ema)):
        found = load_model(source / "out", name).state_dict()
        expected = models[1 if seed == "half" else seed].state_dict()
        if model == "half":
            expected = {key: tensor.half().float() for key, tensor in expected.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert (f"without {', '.join(left_out)}" if left_out else "bin to") in capsys.readouterr().out


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_names_of_this_trainers_own_model(source, models, wrapped):
    state = models[1].state_dict()
    torch.save(prefixed("module.", inside(state)) if wrapped else state, source / "own.pt")
    import_hf(ImportConfig(source, source / "out"))  # the only file of weights in the folder
    found = load_model(source / "out").state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


def changed(state, name):
    tensor = state[name].clone()
    tensor.view(-1)[-1] += 1
    return state | {name: tensor}


BIAS = "classifier.nonlinearity.5.bias"
TWICE = {
    "tied weights": (lambda one: changed(one, TIED_WEIGHT), f"{EMBEDDING} and {TIED_WEIGHT} differ"),
    "tied weights of two shapes": (
        lambda one: one | {TIED_WEIGHT: one[TIED_WEIGHT][:-1].clone()}, f"{EMBEDDING} and {TIED_WEIGHT} differ"),
    "a buffer": (lambda one: changed(one, BUFFER), f"{BUFFER} differs from what position_bucket_size"),
    "a buffer for another length": (lambda one: one | {BUFFER: one[BUFFER][1:, 1:].clone()}, f"{BUFFER} differs"),
    "with and without a prefix": (
        lambda one: one | prefixed("module.", changed(one, BIAS)), f"{BIAS} and module.{BIAS} are the same weight"),
    "two wrappers": (
        lambda one: prefixed("_orig_mod.", one) | prefixed("module.", changed(one, BIAS)),
        f"_orig_mod.{BIAS} and module.{BIAS} are the same weight, and differ"),
    "two containers": (
        lambda one: {"model": one, "state_dict": changed(one, BIAS)},
        f"holds 'model' and 'state_dict', which differ in {BIAS}; --weights_key names the one"),
    "two modules": (
        lambda one: prefixed("student.", one) | prefixed("teacher.", changed(one, BIAS)),
        f"holds 'student' and 'teacher', which differ in {BIAS}; --weights_key"),
    "two averages": (
        lambda one: {"model": one, "ema": one, "swa": changed(one, BIAS)},
        f"holds 'ema' and 'swa', which differ in {BIAS}"),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_what_a_file_says_twice_must_agree(source, models, case):
    change, message = TWICE[case]
    torch.save(change(published(models[1])), source / "any.bin")
    with pytest.raises(InputError, match=f"any.bin: {re.escape(message)}"):
        import_hf(ImportConfig(source / "any.bin", source / "out"))
    assert not (source / "out").exists()


def test_a_flag_chooses_among_several(source, models):
    torch.save({"model": published(models[1]), "last": {"net": published(models[2])}}, source / "any.bin")
    import_hf(ImportConfig(source / "any.bin", source / "out", weights_key="last.net"))
    assert torch.equal(load_model(source / "out").head.bias, models[2].head.bias)
    with pytest.raises(InputError, match=r"--weights_key first: the file has 'model' and 'last\.net'"):
        import_hf(ImportConfig(source / "any.bin", source / "again", weights_key="first"))


def test_files_side_by_side_must_agree(source, models):
    state = published(models[1])
    save_file(state, source / "model.safetensors")
    torch.save(prefixed("module.", state), source / "pytorch_model.bin")
    import_hf(ImportConfig(source, source / "out"))
    torch.save(changed(state, BIAS), source / "pytorch_model.bin")
    with pytest.raises(InputError, match=rf"model.safetensors and .* differ in {BIAS}; name the file"):
        import_hf(ImportConfig(source, source / "again"))
    import_hf(ImportConfig(source / "pytorch_model.bin", source / "again"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_parts(source, models, kind):
    state = published(models[1])
    names = sorted(state)
    parts = {f"part-{number}.{kind}": names[number::2] for number in (0, 1)}
    for file, chosen in parts.items():
        (save_file if kind == "safetensors" else torch.save)({name: state[name] for name in chosen}, source / file)
    index = source / f"{'model' if kind == 'safetensors' else 'pytorch_model'}.{kind}.index.json"
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    import_hf(ImportConfig(source, source / "out"))
    assert torch.equal(load_model(source / "out").head.bias, models[1].head.bias)
    for wrong, message in (
        (weight_map | {"more": f"part-0.{kind}"}, f"it and its file part-0.{kind} differ in more"),
        ({name: weight_map[name] for name in names[1:]}, f"it and its file part-0.{kind} differ in {names[0]}"),
        (weight_map | {"more": f"../part-0.{kind}"}, "which is not a file beside it"),
        (weight_map | {"more": f"part-2.{kind}"}, f"its file part-2.{kind}: no such file"),
        (7, "has no weight_map"),
        (weight_map | {"more": 7}, "has no weight_map of names and files"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(InputError, match=re.escape(message)):
            import_hf(ImportConfig(source, source / "again"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, f"tie_word_embeddings is false, and the weights have no {TIED_WEIGHT}"),
        ({"mask_token_id": 7}, "says mask_token_id 7, and tokenizer .* gives <mask> the id 4"),
        ({"mask_token_id": [7, 8]}, r"says mask_token_id \[7, 8\], and tokenizer"),
        ({"vocab_size": 400}, r"any.safetensors: .* does not fit .* \(shape by .*config.json\)"),
        ({"num_hidden_layers": 2}, r"not a weight of a model of this shape \(shape by .*config.json\)"),
        ({"max_position_embeddings": 32}, r"position_indices differs .* \(shape by .*config.json\)"),
        ({"vocab_size": 100}, r"tokenizer .*tokenizer.json has \d+ tokens, more than vocab_size 100 in .*config.json"),
    ],
)
def test_the_config_must_agree_with_weights_and_tokenizer(source, models, changes, message):
    state = published(models[1])
    del state[TIED_WEIGHT]
    save_file(state, source / "any.safetensors")
    (source / "config.json").write_text(json.dumps(asdict(SHAPE) | {"tie_word_embeddings": True} | changes))
    with pytest.raises(InputError, match=message):
        import_hf(ImportConfig(source / "any.safetensors", source / "out"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"mask_token": "[MASK]"}, "that mask_token is '[MASK]', and in tokenizer "),
        ("special_tokens_map.json", {"pad_token": {"content": "</s>"}}, "that pad_token is '</s>', and in tokenizer "),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<x>"}}}, "that '<x>' has the id 5, and"),
        ("added_tokens.json", {"<mask>": 7}, "that '<mask>' has the id 7, and tokenizer "),
        ("tokenizer_config.json", {"extra_special_tokens": ["<x>"]}, "that '<x>' is a special token, and tokenizer "),
        ("tokenizer_config.json", {"add_prefix_space": True}, "true of add_prefix_space, and the pre_tokenizer of"),
    ],
)
def test_files_beside_the_tokenizer_must_agree_with_it(source, models, file, content, message):
    torch.save(published(models[1]), source / "any.bin")
    if "add_prefix_space" in content:
        (source / "tokenizer.json").write_text(kinds()["five special tokens"])
    (source / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(f"{source / file} says {message}")):
        import_hf(ImportConfig(source / "any.bin", source / "out"))
    as_it_is = {"eos_token": None, "added_tokens_decoder": {"4": {"content": "<mask>"}}, "add_prefix_space": False}
    (source / file).write_text(json.dumps({} if file == "added_tokens.json" else as_it_is))
    import_hf(ImportConfig(source / "any.bin", source / "out"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(source, models, value):
    state = published(models[1])
    state[BIAS] = state[BIAS].double()
    state[BIAS][3] = value
    torch.save(state, source / "any.bin")
    with pytest.raises(InputError, match=r"any.bin: head.bias has values that are NaN or infinite in fp32 \(shape by"):
        import_hf(ImportConfig(source / "any.bin", source / "out"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(source, models, dtype):
    state = published(models[1])
    state[MATRIX] = state[MATRIX].to(dtype)
    save_file(state | {f"{MATRIX}_scale": torch.tensor(0.1)}, source / "any.safetensors")
    with pytest.raises(InputError, match=r"up.weight is of type (int8|float8\w+), expected floats of 16 bits or more"):
        import_hf(ImportConfig(source / "any.safetensors", source / "out"))


def test_a_file_whose_end_was_never_written_is_refused(source, models):
    """Downloaders reserve the whole file at first."""
    state = published(models[1])
    state[MATRIX].zero_()
    save_file(state, source / "any.safetensors")
    with pytest.raises(InputError, match=r"up.weight is 0 everywhere, as in a file that was not written to its end"):
        import_hf(ImportConfig(source / "any.safetensors", source / "out"))


def test_a_config_beside_the_weights_that_is_not_taken_is_told(source, models, capsys):
    save_file(published(models[1]), source / "any.safetensors")
    for content in (asdict(SHAPE), asdict(SHAPE) | {"num_attention_heads": 4}, {"of": "another kind"}):
        (source / "config.json").write_text(json.dumps(content))
        (source / "named.json").write_text(json.dumps(asdict(SHAPE)))
        output = source / f"out {len(str(content))} {content.get('num_attention_heads')}"
        import_hf(ImportConfig(source / "any.safetensors", output, config_file=source / "named.json"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("config.json, which differs: num_attention_heads 4 there, 2 here")


def test_untied_in_name_only(source, models):
    """Both weights are there, and they are the same."""
    save_file(published(models[1]), source / "any.safetensors")
    (source / "config.json").write_text(json.dumps(asdict(SHAPE) | {"tie_word_embeddings": False}))
    import_hf(ImportConfig(source / "any.safetensors", source / "out"))


def test_formats_are_recognized_by_content(source, models):
    state = published(models[1])
    save_file(state, source / "a.bin")
    torch.save(state, source / "b.safetensors")
    for name in ("a.bin", "b.safetensors"):
        assert torch.equal(read_foreign([source / name]).model[BIAS], state[BIAS])
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS; git lfs pull"),
        (b"\x1f\x8b" + b"0" * 30, "is compressed by gzip"),
        (b"GGUF" + b"0" * 30, "is GGUF"),
        (pickle.dumps({"a": 1}), "is a bare pickle"),
        (b"<!doctype html>", "is a web page"),
        (b'{"hidden_size": 3}', "is JSON and no file of weights"),
        (b"", "refused, since it is not an archive"),
    ):
        for name in ("c.bin", "c.safetensors"):
            (source / name).write_bytes(content)
            with pytest.raises(InputError, match=message if content else f"{name}: "):
                read_foreign([source / name])
    for name in ("c.bin", "c.safetensors"):
        (source / name).unlink()
    with pytest.raises(InputError, match=r"several files that may be the weights \(a.bin, b.safetensors\)"):
        import_hf(ImportConfig(source, source / "out"))


def test_where_the_weights_are_is_said(source, models, capsys):
    """Of parts without their index, of one part, of the hub's cache, and of a folder with something else."""
    state = published(models[1])
    part, index = source / "model-00001-of-00002.safetensors", source / "model.safetensors.index.json"
    save_file(state, part)
    with pytest.raises(
        InputError, match=r"weights in parts \(model-00001.*\) without their index, model.safetensors.ind"
    ):
        import_hf(ImportConfig(source, source / "out"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, part.name)}))
    with pytest.raises(
        InputError, match=r"00002.safetensors: is a part of the weights; name .*index.json, or the folder"
    ):
        import_hf(ImportConfig(part, source / "out"))
    cache = source / "models--some--one"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, name in enumerate(("config.json", "tokenizer.json", part.name, index.name)):
        (source / name).rename(cache / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    with pytest.raises(
        InputError, match=r"some--one: holds neither .*; weights are in snapshots/abc: name that folder"
    ):
        import_hf(ImportConfig(cache, source / "out"))
    torch.save(state, snapshot / "ema.bin")
    import_hf(ImportConfig(snapshot, source / "out"))
    assert "abc: takes model.safetensors.index.json, not ema.bin beside it" in capsys.readouterr().err
    (cache / "blobs" / "model.onnx").touch()
    with pytest.raises(
        InputError, match=r"holds neither .* \(it has 0, 1, 2, 3, model.onnx\); name the file of weights"
    ):
        import_hf(ImportConfig(cache / "blobs", source / "out"))


def test_foreign_tensors_beside_the_weights_are_named(source, models, capsys):
    torch.save({"model": published(models[1]), "extra": torch.ones(2)}, source / "any.bin")
    import_hf(ImportConfig(source / "any.bin", source / "out"))
    assert "without extra" in capsys.readouterr().out


def test_a_resumed_checkpoint_whose_weights_disagree_is_damaged(models, tmp_path):
    """The same comparison where a trainer's own files are read."""
    from gptbert.checkpoint.weights import read_weights  # noqa: PLC0415

    save_file(changed(published(models[1]), TIED_WEIGHT), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{EMBEDDING} and {TIED_WEIGHT} differ"):
        read_weights(tmp_path / "model.safetensors", SHAPE)
    assert isinstance(models[1], GPTBert)
    assert load_file(tmp_path / "model.safetensors")
