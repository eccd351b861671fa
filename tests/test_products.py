"""The matrix products of a training step: sizes with fast library code, and finite padding."""

import json
from collections import Counter

import pytest
import torch
from torch.utils import deterministic

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.model import embedding
from gptbert.trainer import Trainer
from kernels import cross_entropy_from_logits
from kernels.padding import rows_apart
from tests.operations import Operations, is_product
from tests.runs import MODEL, flags, write_inputs

WORD = 16  # bytes per vectorized load of a GPU's fast kernels


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("products"))
    (folder / "odd.json").write_text(json.dumps(MODEL | {"vocab_size": 331}))
    return folder


@pytest.fixture
def nothing_is_written(monkeypatch):
    """PyTorch fills uninitialized memory with NaN."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(inputs, look, steps=1, *, has_fixed_shapes=False, **changes):
    """Train steps of a hybrid run in mixed precision while `look` observes operations; returns the trainer."""
    settings = {"mixed_precision": True, "hybrid_numerator": 1, "hybrid_denominator": 2, "batch_reduction": 1}
    config = parse(TrainConfig, flags(inputs, **settings | changes))
    trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, torch.device("cpu")))
    trainer.micro_batches.has_fixed_shapes = has_fixed_shapes
    for step in range(steps):
        rows = trainer.loader.load(step)
        with Operations(look):
            trainer.train_step(rows)
    return trainer


def odd_places(tensor):
    """Sizes and strides of the last two dimensions whose bytes are not a multiple of WORD."""
    places = [*tensor.shape[-2:], *(stride for stride in tensor.stride() if stride != 1)]
    return [place for place in places if place * tensor.element_size() % WORD]


def test_on_a_gpu_all_sizes_are_multiples_of_a_word(inputs, monkeypatch):
    """With odd sizes rows are misaligned, and cuBLAS falls back to kernels that are many times slower.

    Layer weighting's matrix-vector products are memory-bound, and their sizes are depths, so they are left out.
    """
    odd, seen = [], Counter()

    def look(name, tensors):
        matrices = [tensor for tensor in tensors if tensor.ndim > 1]
        if is_product(name) and not any(1 in matrix.shape[-2:] for matrix in matrices):
            seen.update(matrices[0].shape[-1:])
            odd.extend((name, tuple(matrix.shape), matrix.stride()) for matrix in matrices if odd_places(matrix))

    own = embedding.position_rows
    monkeypatch.setattr(embedding, "position_rows", lambda count, device: own(count, torch.device("cuda")))
    train(inputs, look, has_fixed_shapes=True)
    assert seen.total() >= 30 * MODEL["num_hidden_layers"], "or some are not seen"
    assert not odd


@pytest.mark.parametrize("vocab_size", [130, 131, 1009])
def test_zeros_stand_between_rows(nothing_is_written, vocab_size):
    like = torch.empty(0, dtype=torch.bfloat16)
    for stride in (vocab_size, vocab_size + 1, vocab_size + 14):
        rows = rows_apart(like, 5, vocab_size, stride)
        assert (rows.shape, rows.stride()) == ((5, vocab_size), (stride, 1))
        assert rows.isnan().all(), "or nothing is seen"
        between = rows.as_strided((5, stride - vocab_size), (stride, 1), vocab_size)
        assert torch.equal(between, torch.zeros_like(between))


def behind_rows(matrix):
    """The padding between rows of a matrix, or between its columns if those are contiguous."""
    rows = matrix if matrix.stride(-1) == 1 else matrix.mT
    length, stride = rows.shape[-1], rows.stride(0)
    if rows.stride(-1) != 1 or stride <= length:
        return rows.new_empty(0)
    return rows.as_strided((len(rows) - 1, stride - length), (stride, 1), rows.storage_offset() + length)


def test_what_stands_behind_rows_that_a_product_reads_is_finite(inputs, nothing_is_written):
    """On CPUs with AMX a matmul reads the padding; this test inspects the memory, so it fails on any CPU."""
    apart, wrong = [], []

    def look(name, tensors):
        if is_product(name):
            behind = [behind_rows(tensor) for tensor in tensors if tensor.ndim == 2]
            apart.extend(name for entries in behind if len(entries))
            wrong.extend(name for entries in behind if not entries.isfinite().all())

    trainer = train(inputs, look, steps=3, config_file=inputs / "odd.json")
    assert {"aten::addmm.out", "aten::mm.out"} <= set(apart), "or the logits and their gradient are not seen"
    assert not wrong
    assert all(param.isfinite().all() for param in trainer.model.parameters())
    assert trainer.skipped_steps.total() == 0


@pytest.mark.parametrize("row_size", [144, 149])
def test_zeros_stand_behind_rows_of_the_gradient_of_logits(nothing_is_written, row_size):
    """The gradient's next use is a matmul, in the backward of whatever computed the logits."""
    logits = torch.zeros(7, row_size, dtype=torch.bfloat16)[:, :131].requires_grad_()
    gradients = []
    logits.register_hook(gradients.append)
    cross_entropy_from_logits(logits, torch.arange(7)).total.backward()
    assert gradients[0].isfinite().all()
    behind = behind_rows(gradients[0])
    assert behind.numel()
    assert torch.equal(behind, torch.zeros_like(behind))
