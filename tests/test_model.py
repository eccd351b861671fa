"""The model against upstream's numbers (tests/golden), and properties they do not cover: leaks, padding, shapes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from gptbert.model.batch import Batch
from gptbert.model.embedding import position_bucket
from gptbert.model.gptbert import select_labeled
from gptbert.upstream import from_upstream, to_upstream
from kernels import IGNORE_INDEX
from tests.conftest import TINY
from tests.numerics import relative_error

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", params=["model_a", "model_b"])
def golden(request):
    with safe_open(GOLDEN / f"{request.param}.safetensors", "pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return config, tensors, float(file.metadata()["z_loss_weight"])


def golden_model(config, tensors):
    model = GPTBert(config)
    published = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    model.load_state_dict(from_upstream(published), strict=True)
    return model


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_parity_with_upstream(golden, objective):
    config, tensors, z_loss_weight = golden
    model = golden_model(config, tensors)
    inputs = (tensors[f"{objective}.input_ids"], tensors["document_ids"])
    hidden = model.encode(*inputs, causal=objective == "causal")
    assert relative_error(hidden, tensors[f"{objective}.hidden"]) < 1e-5
    result = model.sums(
        *inputs, tensors[f"{objective}.labels"], causal=objective == "causal", z_loss_weight=z_loss_weight
    )
    assert result.count == tensors[f"{objective}.num_tokens"]
    assert relative_error(result.loss / result.count, tensors[f"{objective}.loss"]) < 1e-5
    assert relative_error(result.z_loss / result.count, tensors[f"{objective}.z_loss"]) < 1e-5
    torch.testing.assert_close(result.correct / result.count, tensors[f"{objective}.accuracy"])
    (result.total / result.count).backward()
    gradients = to_upstream({name: param.grad for name, param in model.named_parameters()})
    expected = {name.partition(".grad.")[2]: tensors[name] for name in tensors if name.startswith(f"{objective}.grad.")}
    assert set(gradients) - set(expected) == {"classifier.nonlinearity.5.weight"}, "only the tied name is extra"
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


def test_position_buckets_are_upstreams():
    table = json.loads((GOLDEN / "position_buckets.json").read_text())
    (shapes,) = table.values()
    for shape, expected in shapes.items():
        bucket, longest = (int(part.partition("=")[2]) for part in shape.split(","))
        config = dataclasses.replace(TINY, position_bucket_size=bucket, max_position_embeddings=longest)
        distances = torch.arange(-longest + 1, longest)
        assert position_bucket(distances, config).tolist() == expected


# in shapes such as (8, 384), upstream's fp32 puts the last distance one bucket further, past the position vectors
@pytest.mark.parametrize("longest", [*range(17, 40), 60, 128, 300, 384, 512, 600, 768, 1024])
def test_the_farthest_distances_have_the_last_buckets(longest):
    for bucket in range(4, 17, 2):
        config = dataclasses.replace(TINY, position_bucket_size=bucket, max_position_embeddings=longest)
        buckets = position_bucket(torch.arange(-longest + 1, longest), config)
        assert (buckets[0], buckets[-1]) == (1 - bucket, bucket - 1)
        assert torch.equal(buckets, buckets.sort().values)


def test_position_bucket_table_is_query_minus_key(golden):
    config, tensors, _ = golden
    table = GPTBert(config).position_buckets(config.max_position_embeddings)
    assert torch.equal(table, tensors["position_indices"].long())


def test_rows_longer_than_the_table_use_the_farthest_bucket():
    buckets = GPTBert(TINY).position_buckets(100)
    assert buckets[99, 0] == 2 * TINY.position_bucket_size - 2
    assert buckets[0, 99] == 0


def test_matrices_begin_at_upstreams_standard_deviations():
    config = dataclasses.replace(TINY, hidden_size=96, intermediate_size=200, num_hidden_layers=3)
    model = GPTBert(config)
    std = (2 / (5 * 96)) ** 0.5
    truncated = 0.8796 * std  # standard deviation of a normal truncated at ±2 std
    matrices = {name: param for name, param in model.named_parameters() if param.ndim == 2}
    assert len(matrices) == 3 * 5 + 3
    for name, param in matrices.items():
        layer = int(name.split(".")[1]) if ".feed_forward." in name else None
        scale = 1 if layer is None else (1 / (2 * (1 + layer))) ** 0.5
        assert param.abs().max() <= 2 * std * scale + 1e-7, name
        assert param.std().item() == pytest.approx(truncated * scale, rel=0.1), name
    for layer, block in enumerate(model.blocks):
        assert block.attention_mix.alpha.tolist() == [0] * (2 * layer + 1) + [1]
        assert block.feed_forward_mix.alpha.tolist() == [0] * (2 * layer + 2) + [1]
    assert all(param.abs().sum() == 0 for name, param in model.named_parameters() if name.endswith("bias"))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(16, TINY.vocab_size, (2, 12), generator=generator)
    return ids, torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [-1] * 4])


def randomize(model):
    """Move weights far from their initial values, so that every path affects the output."""
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_stays_in_its_document(batch, causal):
    ids, documents = batch
    model = randomize(GPTBert(TINY))
    before = model.encode(ids, documents, causal)
    changed = ids.clone()
    changed[0, 7] = 16 + (changed[0, 7] - 15) % (TINY.vocab_size - 16)
    difference = (model.encode(changed, documents, causal) - before).abs().amax(-1)
    assert (difference[0, :5] == 0).all()
    assert (difference[1] == 0).all()
    sees_it = difference[0, 5:] > 0
    assert sees_it.tolist() == ([False, False] + [True] * 5 if causal else [True] * 7)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_gives_finite_numbers_and_changes_nothing(batch, causal):
    ids, documents = batch
    model = randomize(GPTBert(TINY))
    hidden = model.encode(ids, documents, causal)
    assert hidden.isfinite().all()
    alone = model.encode(ids[1:, :8], documents[1:, :8], causal)
    torch.testing.assert_close(hidden[1:, :8], alone)


def test_no_labels_gives_zero_loss_that_touches_every_parameter(batch):
    ids, documents = batch
    model = GPTBert(TINY)
    result = model.sums(ids, documents, torch.full_like(ids, IGNORE_INDEX), causal=False, z_loss_weight=1e-4)
    assert result.total == 0
    assert result.count == 0
    result.total.backward()
    assert all(param.grad is not None and param.grad.abs().sum() == 0 for param in model.parameters())


@pytest.mark.parametrize("capacity", [5, 9, 24])
def test_capacity_above_the_number_of_labels_changes_nothing(batch, capacity):
    ids, documents = batch
    model = randomize(GPTBert(TINY))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, [1, 4, 6]], labels[1, [0, 7]] = 20, 33
    rows = Batch(ids, documents, labels, num_masked=1)
    exact = model(rows, z_loss_weight=1e-2)
    roomy = model(dataclasses.replace(rows, most_labels=capacity), z_loss_weight=1e-2)
    for name, value in exact._asdict().items():
        torch.testing.assert_close(getattr(roomy, name), value, msg=name)


def test_rows_of_both_objectives_together_are_as_each_alone(batch):
    ids, documents = batch
    labels = torch.where(documents >= 0, ids.roll(-1, dims=1), IGNORE_INDEX)
    model = randomize(GPTBert(TINY))
    scales = torch.tensor([0.5, 3.0])
    together = model(Batch(ids, documents, labels, num_masked=1), scales, z_loss_weight=0.1)
    together.total.backward()
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for row, scale in enumerate(scales):
        rows = slice(row, row + 1)
        alone = model.sums(ids[rows], documents[rows], labels[rows], row == 1, z_loss_weight=0.1)
        torch.testing.assert_close([sums[row] for sums in together[1:]], list(alone[1:]))
        (scale * alone.total).backward()
        total += scale * alone.total.detach()
    torch.testing.assert_close(together.total, total)
    for name, param in model.named_parameters():
        assert relative_error(gradients[name], param.grad) < 1e-5, name


def test_select_labeled_keeps_order_and_fills_with_unlabeled_rows():
    hidden = torch.arange(12.0).view(2, 3, 2)
    labels = torch.tensor([[IGNORE_INDEX, 3, IGNORE_INDEX], [5, IGNORE_INDEX, IGNORE_INDEX]])
    rows, chosen, objectives = select_labeled(hidden, Batch(labels, labels, labels, num_masked=1, most_labels=4))
    assert chosen.tolist() == [3, 5, IGNORE_INDEX, IGNORE_INDEX]
    assert rows[:2].tolist() == hidden.flatten(0, 1)[[1, 3]].tolist()
    assert len(rows[2:].unique(dim=0)) == 2, "different ones: a GPU adds gradients of equal ones in sequence"
    assert objectives[:2].tolist() == [0, 1]


def test_nothing_as_large_as_a_vector_per_pair_of_positions():
    length, config = 64, dataclasses.replace(TINY, hidden_size=96, intermediate_size=96, num_attention_heads=1)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    ids = torch.randint(16, config.vocab_size, (1, length))
    with Largest():
        GPTBert(config).sums(ids, torch.zeros_like(ids), ids, causal=True).total.backward()
    assert length * length <= largest < length * length * config.hidden_size / 4


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_autocast_stays_near_fp32(batch, causal):
    ids, documents = batch
    torch.manual_seed(0)
    model = GPTBert(TINY)
    exact = model.sums(ids, documents, ids, causal)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.sums(ids, documents, ids, causal)
    assert rounded.loss.dtype == torch.float32
    assert relative_error(rounded.loss, exact.loss) < 1e-2
