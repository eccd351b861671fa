"""Published checkpoints in each layout, against a plain computation that reads the layout's own names."""

import json
import math
from dataclasses import asdict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from gptbert.checkpoint.saved_model import load_model
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.export import ExportConfig, export
from gptbert.import_hf import ImportConfig, import_hf
from tests.runs import write_inputs

SHAPE = ModelConfig(
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=3,
    num_hidden_layers=2,
    vocab_size=324,
    max_position_embeddings=20,
    position_bucket_size=8,
    attention_probs_dropout_prob=0.1,
    hidden_dropout_prob=0.1,
    layer_norm_eps=1e-5,
)


class Layout(NamedTuple):
    """How names of a published layout begin."""

    embedding: str
    encoder: str
    head: str


LAYOUTS = {
    "upstream": Layout("embedding.", "transformer.", "classifier."),
    "BabyLM 2025": Layout("model.embedding.", "model.", "lm_head."),
    "BabyLM 2026": Layout("model.embedding.", "model.transformer.", "model.classifier."),
}


def buckets(length):
    """[T, T]: the row of the relative embedding for each query and key, pair by pair."""
    size, most = SHAPE.position_bucket_size, SHAPE.max_position_embeddings
    middle = size // 2

    def bucket(distance):
        far = min(abs(distance), most - 1)
        if far <= middle:
            return distance
        logarithmic = middle + math.ceil(math.log(far / middle) / math.log((most - 1) / middle) * (middle - 1))
        return int(math.copysign(logarithmic, distance))

    return torch.tensor([[size - 1 + bucket(query - key) for key in range(length)] for query in range(length)])


def published_state(layout, seed=0):
    """Random weights under a layout's names, the tied one under both of its names, with the buffers of positions."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.vocab_size
    shapes = {
        f"{layout.embedding}word_embedding.weight": (vocab, hidden),
        f"{layout.embedding}relative_embedding": (2 * SHAPE.position_bucket_size - 1, hidden),
        f"{layout.embedding}relative_layer_norm.weight": (hidden,),
        f"{layout.embedding}relative_layer_norm.bias": (hidden,),
        f"{layout.head}nonlinearity.1.weight": (hidden, hidden),
        f"{layout.head}nonlinearity.1.bias": (hidden,),
        f"{layout.head}nonlinearity.5.bias": (vocab,),
    }
    for layer in range(SHAPE.num_hidden_layers):
        for name, rows in (("in_proj_qk", 2), ("in_proj_vg", 2), ("out_proj", 1)):
            shapes[f"{layout.encoder}attention_layers.{layer}.{name}.weight"] = (rows * hidden, hidden)
            shapes[f"{layout.encoder}attention_layers.{layer}.{name}.bias"] = (rows * hidden,)
        shapes[f"{layout.encoder}mlp_layers.{layer}.mlp.1.weight"] = (2 * inner, hidden)
        shapes[f"{layout.encoder}mlp_layers.{layer}.mlp.4.weight"] = (hidden, inner)
        for half in (0, 1):
            shapes[f"{layout.encoder}dwa_modules.alphas.{2 * layer + half}"] = (2 * layer + half + 2,)
    state = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    for layer in range(SHAPE.num_hidden_layers):
        positions = buckets(SHAPE.max_position_embeddings)
        state[f"{layout.encoder}attention_layers.{layer}.position_indices"] = positions
    state[f"{layout.head}nonlinearity.5.weight"] = state[f"{layout.embedding}word_embedding.weight"].clone()
    return state


def logits_of(state, layout, ids, causal):
    """[T, V] of one text [T], where the published code computes them: those of token t + 1 at position t."""
    heads, size = SHAPE.num_attention_heads, SHAPE.hidden_size // SHAPE.num_attention_heads

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=SHAPE.layer_norm_eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def attention(x, name):
        x = norm(x)
        query, key = linear(x, f"{name}.in_proj_qk").chunk(2, -1)
        value, gate = linear(x, f"{name}.in_proj_vg").chunk(2, -1)
        pairs = linear(relative, f"{name}.in_proj_qk")[buckets(len(ids))]  # [T, T, 2D]
        pair_query, pair_key = pairs.chunk(2, -1)
        output = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k = query[:, part], key[:, part]
            scores = q @ k.T + torch.einsum("qd,qkd->qk", q, pair_key[..., part])
            scores = (scores + torch.einsum("kd,qkd->qk", k, pair_query[..., part])) / math.sqrt(3 * size)
            if causal:
                scores = scores + torch.full_like(scores, -math.inf).triu(1)
            output.append(scores.softmax(-1) @ value[:, part])
        return linear(norm(torch.cat(output, -1) * F.gelu(gate)), f"{name}.out_proj")

    def feed_forward(x, name):
        up, gate = linear(norm(x), f"{name}.mlp.1").chunk(2, -1)
        return linear(norm(up * F.gelu(gate, approximate="tanh")), f"{name}.mlp.4")

    def mixed(x):
        seen.append(x)
        alpha = state[f"{layout.encoder}dwa_modules.alphas.{len(seen) - 2}"]
        return sum(weight * one for weight, one in zip(alpha, seen, strict=True))

    relative = norm(state[f"{layout.embedding}relative_embedding"])
    relative = relative * state[f"{layout.embedding}relative_layer_norm.weight"]
    relative = relative + state[f"{layout.embedding}relative_layer_norm.bias"]
    x = norm(state[f"{layout.embedding}word_embedding.weight"][ids])
    seen = [x]
    for layer in range(SHAPE.num_hidden_layers):
        x = mixed(x + attention(x, f"{layout.encoder}attention_layers.{layer}"))
        x = mixed(x + feed_forward(x, f"{layout.encoder}mlp_layers.{layer}"))
    x = norm(F.gelu(linear(norm(x), f"{layout.head}nonlinearity.1")))
    return F.linear(x, state[f"{layout.embedding}word_embedding.weight"], state[f"{layout.head}nonlinearity.5.bias"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_inputs(folder, train_characters=20_000)
    return folder / "tokenizer.json"


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A published folder without its weights."""
    (tmp_path / "config.json").write_text(json.dumps(asdict(SHAPE)))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imported_and_exported_logits_are_the_published_ones(folder, layout):
    layout = LAYOUTS[layout]
    state = published_state(layout)
    torch.save(state, folder / "pytorch_model.bin")
    import_hf(ImportConfig(folder, folder / "imported"))
    export(ExportConfig(folder / "imported", folder / "exported"))
    ids = torch.randint(16, SHAPE.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    model = load_model(folder / "imported")
    for causal, auto in ((True, AutoModelForCausalLM), (False, AutoModelForMaskedLM)):
        expected = torch.stack([logits_of(state, layout, row, causal) for row in ids])
        with torch.no_grad():
            imported = model.logits(model.encode(ids, torch.zeros_like(ids), causal))
            loaded = auto.from_pretrained(folder / "exported", trust_remote_code=True).eval()(ids).logits
        torch.testing.assert_close(imported, expected, rtol=1e-5, atol=1e-5)
        shift = int(not causal)  # the exported masked model has the scores of token t at position t
        torch.testing.assert_close(loaded[:, shift:], expected[:, : 30 - shift], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_redundant_may_be_left_out(folder, layout):
    """As safetensors leave out the tied weight, and BabyLM's baselines the buffers."""
    layout = LAYOUTS[layout]
    state = published_state(layout)
    bare = {name: tensor for name, tensor in state.items() if "position_indices" not in name}
    del bare[f"{layout.head}nonlinearity.5.weight"]
    for name, content in (("all", state), ("bare", bare)):
        save_file(content, folder / f"{name}.safetensors")
        import_hf(ImportConfig(folder / f"{name}.safetensors", folder / name))
    one, other = (load_file(folder / name / "model.safetensors") for name in ("all", "bare"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def refused(folder, state):
    torch.save(state, folder / "any.bin")
    with pytest.raises(InputError) as error:
        import_hf(ImportConfig(folder / "any.bin", folder / "out"))
    assert not (folder / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_contradict_each_other_are_both_named(folder, layout):
    layout = LAYOUTS[layout]
    state = published_state(layout)
    word, output = f"{layout.embedding}word_embedding.weight", f"{layout.head}nonlinearity.5.weight"
    assert f"{word} and {output} differ" in refused(folder, state | {output: state[output] + 1})
    positions = f"{layout.encoder}attention_layers.1.position_indices"
    assert f"{positions} differs from what position" in refused(folder, state | {positions: state[positions] + 1})
    for other in LAYOUTS.values():  # the same weight under another layout's name
        name, alias = (f"{one.encoder}mlp_layers.0.mlp.1.weight" for one in (layout, other))
        if alias != name:
            message = refused(folder, state | {alias: state[name] + 1})
            assert f"{name} and {alias} are the same weight, and differ" in message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_are_unknown_missing_or_unfit_are_named(folder, layout, capsys):
    layout = LAYOUTS[layout]
    state = published_state(layout)
    more = {f"{layout.encoder}attention_layers.0.q_norm.weight": torch.ones(3), f"{layout.head}scale": torch.ones(1)}
    message = refused(folder, state | more)
    assert all(name in message for name in more)
    assert "no parameter of a GPT-BERT" in message
    deep = f"{layout.encoder}mlp_layers.2.mlp.1.weight"
    message = refused(folder, state | {deep: torch.ones(2)})
    assert "blocks.2.feed_forward.up.weight is not a weight of a model of this shape" in message
    assert (f", {deep} in the file" in message) == (layout is not LAYOUTS["upstream"])
    bias = f"{layout.head}nonlinearity.5.bias"
    assert "head.bias does not fit the model: [3] for [324]" in refused(folder, state | {bias: torch.ones(3)})
    without = {name: tensor for name, tensor in state.items() if not name.startswith(layout.head)}
    assert "head.bias is missing, and so are head.dense.weight, head.dense.bias" in refused(folder, without)
    torch.save({"model": state, "epoch": 3, "optimizer": {"lr": 1}, "head.weight": torch.ones(2)}, folder / "any.bin")
    import_hf(ImportConfig(folder / "any.bin", folder / "out"))
    assert "without epoch, optimizer, head.weight;" in capsys.readouterr().out


def test_both_names_of_the_number_of_layers(folder):
    state = published_state(LAYOUTS["BabyLM 2025"])
    save_file(state, folder / "model.safetensors")
    shape = asdict(SHAPE)
    del shape["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(shape | {"num_layers": 2}))
    import_hf(ImportConfig(folder, folder / "out"))
    assert load_model(folder / "out").config == SHAPE
    (folder / "config.json").write_text(json.dumps(asdict(SHAPE) | {"num_layers": 3}))
    with pytest.raises(InputError, match="num_hidden_layers 2 and num_layers 3 are the same, and differ"):
        import_hf(ImportConfig(folder, folder / "again"))


def test_a_model_of_another_kind_is_refused(folder):
    """Newer models of the same family have other layers under other names."""
    state = {
        "model.embedding.word_embedding.weight": torch.ones(324, 24),
        "model.layers.0.attention.q.weight": torch.ones(2),
    }
    assert "model.layers.0.attention.q.weight is no parameter of a GPT-BERT" in refused(folder, state)
