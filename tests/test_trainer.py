"""White-box tests of a training step and of the run around it."""

import io
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from gptbert import trainer as trainer_module
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.saved_model import load_model
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.token_store import TokenStore
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.model.objective import Objective
from gptbert.monitoring.display import validation_progress
from gptbert.monitoring.records import read_records
from gptbert.report import ReportConfig, report
from gptbert.schedules import learning_rate
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.special_tokens import BOS_ID, MASK_ID, SPECIAL_TOKENS
from gptbert.train import fit
from gptbert.trainer import Trainer
from kernels import IGNORE_INDEX
from tests.runs import flags, losses, write_inputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("trainer"))


def make_trainer(inputs, world=World(0, 1, CPU), **changes):  # noqa: B008  a frozen constant
    config = parse(TrainConfig, flags(inputs, **changes))
    return Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)


def test_the_step_is_the_formula(inputs):
    """Clipped gradient of (num/den)·mean MLM + (1−num/den)·mean CLM + z-loss, from one plain forward over all rows."""
    settings = {"optimizer": "adamw", "local_batch_size": 3, "max_gradient": 0.5}  # LAMB clips inside its kernel
    trainer = make_trainer(inputs, config_file=inputs / "no_dropout.json", **settings)
    rows = trainer.loader.load(0)
    batch = trainer.loader.batch(rows, 0)
    of_objective = {Objective.MLM: slice(batch.num_masked), Objective.CLM: slice(batch.num_masked, None)}
    loss = 0.0
    for objective, weight in ((Objective.MLM, 1 / 4), (Objective.CLM, 3 / 4)):
        own = batch[of_objective[objective]]
        result = trainer.model.sums(own.input_ids, own.document_ids, own.labels, objective.causal, 1e-4)
        loss = loss + weight * result.total / result.count
    expected = torch.autograd.grad(loss, list(trainer.model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in expected]).norm()
    assert norm > 0.5, "or clipping is not tested"
    seen = {}
    step = trainer.optimizer.step

    def look(*args):
        seen.update((name, param.grad.clone()) for name, param in trainer.model.named_parameters())
        return step(*args)

    trainer.optimizer.step = look
    torch.testing.assert_close(trainer.train_step(rows), norm)
    for gradient, (name, _) in zip(expected, trainer.model.named_parameters(), strict=True):
        torch.testing.assert_close(seen[name], gradient * 0.5 / norm, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(("random_p", "keep_p"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_masks_follow_the_flags_and_the_step(inputs, random_p, keep_p):
    masks = {"mask_p_start": 0.9, "mask_p_end": 0.1, "mask_random_p": random_p, "mask_keep_p": keep_p}
    trainer = make_trainer(inputs, max_steps=10, hybrid_numerator=4, **masks)
    for step in (0, 4, 9):
        ((_, rows),) = loaded = trainer.loader.load(step)
        batch = trainer.loader.batch(loaded, step)
        is_label = batch.labels != IGNORE_INDEX
        expected = (0.9 - 0.08 * step) * (rows["tokens"] >= len(SPECIAL_TOKENS)).sum(dim=1)
        more = is_label.sum(dim=1) - expected  # from the rounding of k, and from ties with the last span
        assert (more > -1.01).all()
        assert (more < 3.01).all()
        is_label = is_label[:, :-1]  # whose token is among the inputs
        read, labels = batch.input_ids[:, 1:][is_label], batch.labels[:, :-1][is_label]
        assert torch.equal(read == MASK_ID, torch.full_like(read, random_p + keep_p == 0, dtype=torch.bool))
        assert (read == labels).float().mean() == pytest.approx(keep_p, abs=0.05)  # a random token may be the same


def test_averages_and_learning_rate_follow_every_step(inputs):
    trainer = make_trainer(inputs, ema_decay=0.9)
    expected = [param.detach().clone() for param in trainer.model.parameters()]
    for step in range(3):
        trainer.train_step(trainer.loader.load(step))
        rates = {group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == {np.float32(learning_rate(trainer.config, step)).item()}
        expected = [0.9 * mean + 0.1 * param for mean, param in zip(expected, trainer.model.parameters(), strict=True)]
    torch.testing.assert_close(list(trainer.ema.model.parameters()), expected)
    assert all(param.dtype == torch.float32 for param in trainer.ema.model.parameters())


class HostReads(TorchDispatchMode):
    """Records operations that would sync with a GPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero.default", "masked_select", "unique", "equal.default")

    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in self.FORBIDDEN) and id(args[0]) not in self.allowed():
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask_history", [False, True])
def test_a_step_reads_nothing_back_from_the_device(inputs, mask_history):
    trainer = make_trainer(inputs, mask_history=mask_history, mixed_precision=True, local_batch_size=2)
    trainer.micro_batches.has_fixed_shapes = True
    steps_on_host = lambda: {id(state["step"]) for state in trainer.optimizer.state.values() if state}  # noqa: E731
    rows = [trainer.loader.load(step) for step in range(2)]
    with HostReads(steps_on_host) as reads:
        for row in rows:
            trainer.train_step(row)
    assert reads.seen == []
    with HostReads(steps_on_host) as reads:
        trainer.training_record(torch.tensor(1.0), trainer_module.Throughput(0))
    assert reads.seen, "or the test sees nothing at all"


def test_longer_rows_come_in_fewer_at_a_time(inputs, monkeypatch):
    settings = {"local_batch_size": 8, "global_batch_size": 64, "batch_reduction": 1, "max_steps": 10}
    trainer = make_trainer(inputs, seq_length_growth=True, **settings)
    forward, shapes = trainer.training_step.forward, []

    def watched(batch, *others):
        shapes.append(tuple(batch.labels.shape))
        return forward(batch, *others)

    monkeypatch.setattr(trainer.training_step, "forward", watched)
    widest = []
    for trainer.step in (0, 7, 9):
        shapes.clear()
        trainer.train_step(trainer.loader.load(trainer.step))
        widest.append(max(shapes))
    length = trainer.config.seq_length
    assert widest == [(8, length), (4, 2 * length), (2, 4 * length)]


def test_rows_of_both_objectives_go_through_the_model_together(inputs, monkeypatch):
    trainer = make_trainer(inputs, local_batch_size=8, global_batch_size=12, batch_reduction=1)
    forward, seen = trainer.training_step.forward, []
    watched = lambda batch, *others: seen.append(batch) or forward(batch, *others)  # noqa: E731
    monkeypatch.setattr(trainer.training_step, "forward", watched)
    trainer.train_step(trainer.loader.load(0))
    assert [(batch.num_masked, len(batch) - batch.num_masked) for batch in seen] == [(2, 4), (1, 5)]


def test_resumed_moments_follow_the_settings_of_the_command_line(inputs):
    fit(parse(TrainConfig, flags(inputs, name="settings", max_steps=3, save_every=2)))
    last = list_checkpoints(inputs / "runs" / "settings")[0]
    again = flags(inputs, name="settings-again", max_steps=3, resume=last, weight_decay=0.5, optimizer_beta2=0.9)
    fit(parse(TrainConfig, again))
    (end,) = list_checkpoints(inputs / "runs" / "settings-again")
    groups = torch.load(end / "training_state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.5, (0.9, 0.9)), (0.0, (0.9, 0.9))]


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_reduced_once_a_step_however_many_micro_batches(inputs, process_group):
    trainer = make_trainer(inputs, local_batch_size=1, global_batch_size=12, batch_reduction=1)
    trainer.training_step.parallel_model = DistributedDataParallel(trainer.model)
    reduced = []

    def hook(state, bucket):
        reduced.extend(id(param) for param in bucket.parameters())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    trainer.training_step.parallel_model.register_comm_hook(None, hook)
    for step in range(2):
        reduced.clear()
        trainer.train_step(trainer.loader.load(step))
        assert sorted(reduced) == sorted(id(param) for param in trainer.model.parameters())


def test_a_rank_without_rows_takes_part(inputs):
    trainer = make_trainer(inputs)
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.step = 5
    assert trainer.train_step([]) == 0
    assert all(param.isfinite().all() for param in trainer.model.parameters())
    moved = [not torch.equal(param, old) for param, old in zip(trainer.model.parameters(), before, strict=True)]
    assert any(moved), "weight decay moves weights even without a gradient"
    assert trainer.sums.sums.abs().sum() == 0


RECORDED = {
    "train/loss", "train/perplexity", "train/accuracy", "train/z_loss", "train/gradient_norm", "train/skipped_steps",
    "train/learning_rate", "train/batch_size", "train/sequence_length", "train/mask_p", "train/tokens", "train/words",
    "train/tokens_per_second", "train/mfu", "train/waiting_share", "train/peak_memory_gb",
    *(f"train/mlm/{name}" for name in ("loss", "perplexity", "accuracy", "z_loss")),
    *(f"train/clm/{name}" for name in ("loss", "perplexity", "accuracy", "z_loss")),
}  # fmt: skip
VALIDATED = {
    f"{weights}/{objective}/{name}"
    for weights in ("validation", "validation_ema")
    for objective in ("mlm", "clm")
    for name in ("loss", "perplexity", "accuracy")
}


def test_a_run_leaves_everything_it_promises(inputs):
    fit(parse(TrainConfig, flags(inputs, name="whole", max_steps=12, save_every=4, keep_checkpoints=2, log_every=5)))
    run = inputs / "runs" / "whole"
    records = read_records(run / "metrics.jsonl")
    training = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in training] == [5, 10, 12]
    assert all(set(record) == RECORDED | {"step"} for record in training)
    validation = [record for record in records if "validation/mlm/loss" in record]
    assert [record["step"] for record in validation] == [10, 12]
    assert all(set(record) == VALIDATED | {"step"} for record in validation)
    assert training[-1]["train/tokens"] == 32 * sum(record_rows for record_rows in batch_sizes(12))
    assert [path.name for path in list_checkpoints(run)] == ["step_00000008", "step_00000012"]
    settings = json.loads((run / "config.json").read_text())
    assert settings["train"]["learning_rate"] == 1e-2
    assert settings["model"]["hidden_size"] == 32
    model = load_model(run, weights="model")
    assert isinstance(model.embedding.word_embedding.weight, torch.Tensor)


def test_upstreams_token_file_trains_the_same(inputs):
    store = TokenStore.open(inputs / "train.safetensors")
    documents = [
        torch.tensor([BOS_ID, *store.shards[0][start : start + length]], dtype=torch.int16)
        for start, length in zip(*store.documents(), strict=True)
    ]
    torch.save(documents, inputs / "train.bin")
    records = []
    for name, path in (("own", inputs / "train.safetensors"), ("upstream", inputs / "train.bin")):
        fit(parse(TrainConfig, flags(inputs, name=name, train_path=path, max_steps=2, validation_steps=1)))
        records.append([record.get("train/loss") for record in read_records(inputs / "runs" / name / "metrics.jsonl")])
    assert records[0] == records[1]


def batch_sizes(steps):
    return [int(8 + 8 * step / steps + 0.5) for step in range(steps)]


def test_validation_is_the_same_every_time_and_leaves_training_alone(inputs):
    trainer, keeps_graph = make_trainer(inputs, validation_steps=0), set()
    trainer.model.register_forward_pre_hook(lambda *_: keeps_graph.add(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    first, second = trainer.validation_record(), trainer.validation_record()
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.model.training
    assert keeps_graph == {False}
    few = make_trainer(inputs, validation_steps=1, seed=7)
    few.model.load_state_dict(trainer.model.state_dict())
    assert few.validation.num_rows == 16 < trainer.validation.num_rows
    assert few.validation_record() != first
    other_seed = make_trainer(inputs, validation_steps=0, seed=8)
    other_seed.model.load_state_dict(trainer.model.state_dict())
    assert other_seed.validation_record()["validation/mlm/loss"] == first["validation/mlm/loss"]


def test_a_bounded_validation_is_spread_over_the_file(inputs, monkeypatch):
    trainer = make_trainer(inputs, validation_steps=0)
    slots = trainer.validation.num_rows
    assert not trainer.validation.coverage
    usual = make_trainer(inputs, validation_steps=None)
    assert usual.validation.num_rows == slots, "all of a small file"
    monkeypatch.setattr("gptbert.monitoring.validation.DEFAULT_TOKENS", 20 * 32)
    bounded = make_trainer(inputs, validation_steps=None)
    assert bounded.validation.num_rows == 20 < slots
    assert bounded.validation.coverage == f"20 of {slots} rows, spread evenly over the file"
    rows = bounded.validation._rows(0, 20)
    assert rows.row_ids.tolist() == [row * slots // 20 for row in range(20)]
    assert set(np.diff(rows.row_ids)) <= {slots // 20, slots // 20 + 1}
    every = trainer.validation._rows(0, slots)
    np.testing.assert_array_equal(rows.tokens, every.tokens[rows.row_ids])
    np.testing.assert_array_equal(bounded.validation._rows(3, 2).tokens, rows.tokens[3:5])
    assert (np.diff(every.positions[every.positions >= 0]) == 1).all(), "in the file's order, for any run"


def test_a_validation_shows_how_far_it_is(inputs, monkeypatch):
    """The bar stands still meanwhile; behind it is the part done of both kinds of weights."""
    trainer, shown = make_trainer(inputs, validation_steps=2), []
    bar = tqdm(total=10, file=io.StringIO(), mininterval=0)
    monkeypatch.setattr(bar, "set_postfix_str", lambda text, refresh=True: shown.append(text))
    with validation_progress(bar, 2 * trainer.validation.num_rows) as advance:
        trainer.validation_record(advance)
    assert shown[:-1] == [f"validating {part}%" for part in (12, 25, 38, 50, 62, 75, 88, 100)]
    assert shown[-1] == "", "what was there before"


def test_an_average_that_has_not_forgotten_its_start_is_explained(inputs, capfd):
    """With the usual --ema_decay it has 98 % of the initial weights after 20 steps: its loss looks like a fault."""
    settings = {"no_compile": True, "validation_steps": 1}
    fit(parse(TrainConfig, flags(inputs, name="short", **settings, max_steps=20)))
    said = capfd.readouterr().err
    assert "after --max_steps 20 the moving average" in said
    assert "still has 98% of the initial ones; --ema_decay 0.79 instead of 0.999" in said
    run_dir = inputs / "runs" / "short"
    for weights, count in (("ema", 1), ("model", 0)):
        TrainedModel.load(ModelChoice(run=run_dir, weights=weights)).explain()
        said = capfd.readouterr().err
        assert said.count("after 20 steps the average of the weights still has 98% of the initial ones") == count
    report(ReportConfig(run_dir))
    assert "98% still initial ones" in (run_dir / "report.html").read_text()
    capfd.readouterr()
    fit(parse(TrainConfig, flags(inputs, name="suited", **settings, max_steps=20, ema_decay=0.79)))
    TrainedModel.load(ModelChoice(run=inputs / "runs" / "suited")).explain()
    assert "moving average" not in capfd.readouterr().err


def run_with_kernels(inputs, kernels, **changes):
    """A short run with a backend; returns its losses and the checkpoint of its first step."""
    settings = {"name": kernels, "kernels": kernels, "config_file": inputs / "no_dropout.json", "max_steps": 2}
    settings |= {"save_every": 1, "keep_checkpoints": 2}
    fit(
        parse(TrainConfig, flags(inputs, **settings, seq_length=16, global_batch_size=8, validation_steps=1, **changes))
    )
    run_dir = inputs / "runs" / kernels
    assert json.loads((run_dir / "config.json").read_text())["kernels"] == kernels
    return losses(read_records(run_dir / "metrics.jsonl")), list_checkpoints(run_dir)[0]


@pytest.mark.usefixtures("parallel_scans")
def test_both_backends_train_the_same(inputs):
    """Masks are bitwise equal, so losses differ only by rounding, which LAMB amplifies; states have the same format.

    States are compared after the first step: its update divides rounding errors by gradients that are as small.
    """
    torch_losses, torch_checkpoint = run_with_kernels(inputs, "torch")
    triton_losses, triton_checkpoint = run_with_kernels(inputs, "triton", kernel_check="off")
    assert len(torch_losses) == 2 * 3 + 2, "of two steps, and of a validation"
    assert triton_losses[0] == pytest.approx(torch_losses[0], rel=1e-6), "before the first update"
    assert triton_losses == pytest.approx(torch_losses, rel=2e-5)
    states = [
        torch.load(checkpoint / "training_state.pt", weights_only=True)["optimizer"]["state"]
        for checkpoint in (torch_checkpoint, triton_checkpoint)
    ]
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert [(key, value.dtype, value.shape) for key, value in ours.items()] == [
            (key, value.dtype, value.shape) for key, value in theirs.items()
        ]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_triton_without_a_gpu_is_one_line(inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=r"--kernels triton: Triton kernels need a GPU.*'torch' works"):
        fit(parse(TrainConfig, flags(inputs, name="no_gpu", kernels="triton")))
    assert not (inputs / "runs" / "no_gpu").exists()
