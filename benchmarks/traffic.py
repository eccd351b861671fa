"""Bytes that the kernels move, relative to the minimum: `python -m benchmarks.traffic [--json]`.

The kernels run in Triton's interpreter, where they are counted (`benchmarks.counted`).

The minimum of a job: each input read once, each output written once. The formulas are in the docstrings of the jobs.
Liger-Kernel's cross-entropy (extra `[bench]`) is counted in the same run.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.counted import Counted, CountedJob
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.io.screen import table_row
from gptbert.model import GPTBert
from kernels import IGNORE_INDEX, cross_entropy_from_logits, lamb_step, masked_cross_entropy, span_mask
from kernels.depth_mix.fused import GROUP, FusedMixes
from kernels.gated_norm.fused import gated_norm, gated_norm_backward
from kernels.lamb import PreparedStep
from kernels.normalize.fused import add_rows
from kernels.normalize.fused import backward as normalize_backward
from kernels.normalize.fused import forward as normalize_rows
from kernels.padding import padded_rows

VOCAB_SIZES = (8192, 16384, 32768, 50257, 65536)
LENGTHS = (128, 129, 513, 4096)  # the trainer's rows are one token longer than T
ROWS = 5  # 40 % of it is an integer
Z_LOSS_WEIGHT = 1e-4
OBJECTIVE_WEIGHT = 0.25  # of an objective in the trainer's hybrid loss

CROSS_ENTROPY_BAR = 1.05
LIGER_BAR = 0.65
MASKED_LAUNCHES = 3  # rows, sums over rows, gradients times grad_output
LAMB_BYTES, LAMB_BAR, LAMB_LAUNCHES = 52, 1.01, 4
COPY_BYTES = 2  # more, for a parameter with a copy in bf16
SPAN_MASK_BAR = 1.1
MIX_BYTES = 1650  # per token and D, for the 24 mixes of 12 layers, forward and backward
GATED_NORM_BAR = 1.01
NORMALIZE_BAR = 1.01
TABLE_BAR = 1.15
WIDTHS = (52, 11, 11, 6, 8, 10, 11)  # of the table's columns

Operation = Literal[
    "cross_entropy", "masked_cross_entropy", "lamb", "span_mask", "depth_mix", "gated_norm", "normalize"
]


def cross_entropy_jobs(vocab_size: int, dtype: torch.dtype, rows: int = ROWS) -> Iterator[CountedJob]:
    """Loss and gradient from logits, for the mean and for the mean times an objective's weight.

    Minimum, with N rows, n of them labeled, and s bytes per logit: n·V·s (the labeled logits are read)
    + N·V·s (the gradient is written, zeros too) + 8·N (labels) + 12 (three sums). The factor of the loss is
    known beforehand, so the gradient can include it when first written.
    """
    for ignored in (0, 2 * rows // 5):
        labels = _labels(rows, ignored, vocab_size)
        fewest = (2 * rows - ignored) * vocab_size * dtype.itemsize + 8 * rows + 12
        for loss, weight in (("mean", 1.0), ("trainer", OBJECTIVE_WEIGHT)):
            name = f"cross_entropy {loss} V={vocab_size} {str(dtype).removeprefix('torch.')}"
            name += f" {100 * ignored // rows} % ignored"
            with Counted() as counted:
                logits = _logits(rows, vocab_size, dtype)
                scale = weight / (rows - ignored)
                result = cross_entropy_from_logits(
                    logits, labels, z_loss_weight=Z_LOSS_WEIGHT, scale=scale, backend="triton"
                )
                result.total.backward()
            job = _job(name, counted, fewest, CROSS_ENTROPY_BAR)
            if has_liger():
                with Counted() as counted:
                    liger_cross_entropy(_logits(rows, vocab_size, dtype), labels, weight)
                job.liger = counted.total
            job.liger_bar = LIGER_BAR if loss == "trainer" else None
            yield job


def has_liger() -> bool:
    """Whether Liger-Kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def liger_cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Liger-Kernel's mean with z-loss and accuracy, times `weight`; runs its backward too.

    The loss has no factor argument, so the weight arrives as `grad_output`.
    """
    function = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    # logits, labels, class weights, ignore_index, z-loss weight, smoothing, reduction, softcap, z-loss, accuracy
    loss, *_ = function.apply(logits, labels, None, IGNORE_INDEX, Z_LOSS_WEIGHT, 0.0, "mean", None, True, True)
    total = loss * weight if weight != 1 else loss
    total.backward()
    return total.detach()


def masked_cross_entropy_job(rows: int = 20, hidden_size: int = 32, vocab_size: int = 8192) -> CountedJob:
    """The kernels' part of masked cross-entropy: chunks of logits, between PyTorch's matrix products; two objectives.

    Minimum: n·V·s twice (logits read, gradient written, of the n labeled rows) + 16·n (labels and segments) + 20
    (scales and three sums); and the gradients of hidden and weight, read and written when the backward multiplies
    them: 2·s·D·(N + V).
    """
    ignored = 2 * rows // 5
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(size, hidden_size, generator=generator).requires_grad_() for size in (rows, vocab_size)
    )
    segments, scales = torch.arange(rows) % 2, torch.tensor([0.25, 0.75])
    options = {"segments": segments, "scales": scales, "z_loss_weight": Z_LOSS_WEIGHT, "backend": "triton"}
    with Counted() as counted:
        masked_cross_entropy(hidden, weight, _labels(rows, ignored, vocab_size), **options).total.backward()
    labeled = rows - ignored
    fewest = labeled * (2 * vocab_size * hidden.itemsize + 16) + 20
    fewest += 2 * hidden.itemsize * hidden_size * (rows + vocab_size)
    job = _job(f"masked_cross_entropy N={rows} V={vocab_size} float32", counted, fewest, CROSS_ENTROPY_BAR)
    job.launch_bar = MASKED_LAUNCHES
    return job


def lamb_job(name: str, shapes: list[torch.Size], are_copied: list[bool] | None = None) -> CountedJob:
    """A step of LAMB in fp32 with clipping and EMA, weight decay as upstream (matrices); and bf16 copies of some.

    Minimum per parameter for the exact update, whose trust ratio first needs the norms of the whole tensor:
    4 (gradient, for its norm) + 24 (parameter, gradient and moments read, moments written) + 16 (parameter and moments
    read, parameter written) + 8 (average read and written) = 52; and 2 for a copy.
    """
    are_copied = [False] * len(shapes) if are_copied is None else are_copied
    generator = torch.Generator().manual_seed(2)
    params, grads, exp_avgs, averages = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)
    )
    state = [exp_avgs, [grad.square() for grad in grads], [torch.tensor(3.0) for _ in params]]
    decays = [0.1 if len(shape) > 1 else 0.0 for shape in shapes]
    copies = [param.bfloat16() if is_copied else None for param, is_copied in zip(params, are_copied, strict=True)]
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "max_grad_norm": 2.0, "average_decay": 0.999}
    with Counted() as counted:
        if any(are_copied):
            PreparedStep(params, *state, averages, decays, copies)(grads, **settings)
        else:
            lamb_step(params, grads, *state, weight_decay=decays, averages=averages, backend="triton", **settings)
    parameters = sum(shape.numel() for shape in shapes)
    copied = sum(copy.numel() for copy in copies if copy is not None)
    job = _job(f"lamb {name}", counted, LAMB_BYTES * parameters + COPY_BYTES * copied, LAMB_BAR)
    job.launch_bar, job.parameters = LAMB_LAUNCHES, parameters
    return job


def copied_parameters(model: GPTBert) -> set[Tensor]:
    """The parameters of which fused steps in bf16 have copies."""
    weights = model.pack(torch.bfloat16)
    packed = [weights.words, *(each for block in weights.blocks for sub_layer in block for each in sub_layer)]
    return {part for each in packed for part in each.parts}


def model_shapes(file: str) -> tuple[list[torch.Size], list[bool]]:
    """Parameter shapes of the model in configs/`file`, and which of them `copied_parameters` has."""
    with torch.device("meta"):
        model = GPTBert(ModelConfig.from_json(f"configs/{file}"))
    copied = copied_parameters(model)
    return [param.shape for param in model.parameters()], [param in copied for param in model.parameters()]


def span_mask_jobs(length: int) -> Iterator[CountedJob]:
    """A batch of int64 tokens, without and with masking history, rows padded as in the trainer.

    Minimum: B·T·8·3 (tokens read, inputs and labels written) + B·8 (row ids) + B·T (counts of one byte read).
    """
    rows = max(1, 512 // length)  # the interpreter's scans are slow
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 8192, (rows, length), generator=generator)
    counts = torch.randint(0, 4, (rows, length), generator=generator).to(torch.uint8)
    tokens, counts = padded_rows(tokens).copy_(tokens), padded_rows(counts).copy_(counts)
    for mask_counts in (None, counts):
        with Counted() as counted:
            span_mask(
                tokens,
                mask_p=0.15,
                random_p=0.1,
                keep_p=0.1,
                mask_token_id=4,
                vocab_size=8192,
                num_special_tokens=16,
                seed=1,
                row_ids=torch.arange(rows),
                mask_counts=mask_counts,
                backend="triton",
            )
        fewest = rows * (24 * length + 8) + (0 if mask_counts is None else rows * length)
        name = f"span_mask T={length}" + ("" if mask_counts is None else " with history")
        yield _job(name, counted, fewest, SPAN_MASK_BAR)


def mix_bytes(num_mixes: int) -> int:
    """Fewest bytes of fused mixes per token and D, forward and backward.

    In groups of G = 6 mixes, where x_n, ∂x_n between mixes and partial sums have 4 bytes and the rest 2: each mix's own
    tensors, 14 bytes forward and 16 backward (8 and 12 for x_0); in both directions the group's other representations,
    2 bytes each, and a partial sum for all but one group, 4; to make that sum, all representations of the groups before
    (behind) it, and itself; and for ∂α of a group, all y up to it, and its ∂x.
    """
    groups = [range(first, min(first + GROUP, num_mixes + 1)) for first in range(1, num_mixes + 1, GROUP)]
    forward, backward = 8 + 14 * num_mixes, 12 + 16 * num_mixes
    for group in groups:
        first, last, count = group[0], group[-1], len(group)
        own = count * (count - 1) // 2
        forward += 2 * (own if first > 1 else own + count) + (2 * first + 8 * count if first > 1 else 0)
        with_start = count + (first == 1)
        backward += 2 * (own if first > 1 else own + count) + 2 * (last + 1 + count)
        backward += 2 * (num_mixes - last) + 8 * with_start if last < num_mixes else 0
    return forward + backward


def depth_mix_job(num_mixes: int = 24, rows: int = 64, size: int = 256) -> CountedJob:
    """The fused mixes of a forward in bf16 (every second with a bias), and their backward; see `mix_bytes`."""
    generator = torch.Generator().manual_seed(5)
    alphas = [torch.randn(depth + 1, generator=generator).requires_grad_() for depth in range(1, num_mixes + 1)]
    first = torch.randn(rows, size, generator=generator).requires_grad_()
    out = torch.randn(rows, size, generator=generator).bfloat16()
    bias, seed = torch.zeros(size), torch.tensor([1, 2], dtype=torch.int32)
    # few programs, since the rows are few: a program's partial sums are written for thousands of tokens, not for one
    with Counted() as counted, patch.object(importlib.import_module("kernels.depth_mix.kernel"), "PROGRAMS", 2):
        mixes = FusedMixes(alphas, torch.bfloat16, 0.1, 1e-5)
        x, normalized = mixes.start(first)
        used = [normalized]
        for depth in range(num_mixes):
            x, normalized = mixes.mix(out, None if depth % 2 else bias, x, seed)
            used.append(normalized)
        (x.sum() + sum(each.float().sum() for each in used)).backward()
    fewest = mix_bytes(num_mixes)
    return _job(f"depth_mix {num_mixes} mixes", counted, fewest * rows * size, MIX_BYTES / fewest)


def gated_norm_jobs(rows: int = 32) -> Iterator[CountedJob]:
    """Both gated norms in bf16: 6 bytes an entry forward; 12 backward, with the product for the weight's gradient.

    Besides, the mean and 1/σ of a row, written and read.
    """
    for size, is_tanh in ((2560, True), (768, False)):
        generator = torch.Generator().manual_seed(size)
        wide = torch.randn(1, rows, (2 if is_tanh else 4) * size, generator=generator).bfloat16()
        linear = None if is_tanh else torch.randn(2, 1, rows, size // 2, generator=generator).bfloat16()
        gate = wide if is_tanh else wide[..., 3 * size :]
        with Counted() as counted:
            normalized, *statistics = gated_norm(gate, linear, is_tanh, 1e-5)
            gated_norm_backward(normalized, gate, linear, *statistics, is_tanh)
        kind = "feed-forward" if is_tanh else "attention"
        yield _job(f"gated_norm of {kind}, D={size}", counted, (6 + 12) * rows * size, GATED_NORM_BAR)


def normalize_jobs(rows: int = 32, size: int = 768) -> Iterator[CountedJob]:
    """The embedding, and the head's activation in bf16: each reads its rows and writes them; backward also a gradient.

    Besides, the ids of the embedding's rows. Gradients of these are added to rows of a table, here each to its own: 4
    bytes read, and 8 of the table read and written; and ids of up to 64 rows, from the cache.
    """
    generator = torch.Generator().manual_seed(3)
    weight, ids = torch.randn(99, size, generator=generator), torch.arange(rows)
    x, seed = torch.randn(rows, size, generator=generator).bfloat16(), torch.tensor([1, 2], dtype=torch.int32)
    for name, table, own_ids, width in (("embedding", weight, ids, 4), ("head", x, None, 2)):
        with Counted() as counted:
            result = normalize_rows(table, own_ids, seed, 0.1, 1e-5)
            normalize_backward(result, table, own_ids, seed, 0.1, 1e-5)
        yield _job(f"normalize of the {name}", counted, (2 + 3) * width * rows * size, NORMALIZE_BAR)
    gradient = torch.zeros_like(weight)
    with Counted() as counted:
        add_rows(gradient, ids, weight[:rows])
    yield _job("normalize of the embedding's table", counted, (1 + 2) * 4 * rows * size, TABLE_BAR)


def _job(name: str, counted: Counted, fewest: int, bar: float) -> CountedJob:
    return CountedJob(name, counted.total, fewest, bar, counted.launches, kernels=counted.kernels)


def _logits(rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def _labels(rows: int, ignored: int, vocab_size: int) -> Tensor:
    labels = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(4))
    labels[:ignored] = IGNORE_INDEX
    return labels


@dataclass(frozen=True, kw_only=True)
class TrafficConfig:
    """Count the bytes that the kernels move, in Triton's interpreter."""

    op: tuple[Operation, ...] = get_args(Operation)
    """Operations to count."""
    lamb_config: str = "small.json"
    """Model in configs/ whose parameters LAMB updates."""
    json: bool = False
    """Print one JSON object instead of a table."""


def count(config: TrafficConfig) -> Iterator[CountedJob]:
    """Run the jobs of the chosen operations."""
    if "cross_entropy" in config.op:
        for dtype in (torch.bfloat16, torch.float32):
            for vocab_size in VOCAB_SIZES:
                yield from cross_entropy_jobs(vocab_size, dtype)
    if "masked_cross_entropy" in config.op:
        yield masked_cross_entropy_job()
    if "lamb" in config.op:
        shapes, are_copied = model_shapes(config.lamb_config)
        name = f"configs/{config.lamb_config} {len(shapes)} tensors"
        yield lamb_job(name, shapes)
        yield lamb_job(f"{name}, {sum(are_copied)} copies", shapes, are_copied)
    if "span_mask" in config.op:
        for length in LENGTHS:
            yield from span_mask_jobs(length)
    if "depth_mix" in config.op:
        yield depth_mix_job()
    if "gated_norm" in config.op:
        yield from gated_norm_jobs()
    if "normalize" in config.op:
        yield from normalize_jobs()


def run(config: TrafficConfig) -> None:
    """Count, and print a row for each job. Exit status 1 if a bar is broken.

    Raises:
        InputError: Triton is not installed, or there is no such model.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed: pip install triton (Linux only)")
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    jobs = []
    if not config.json:
        header = ("job", "bytes", "fewest", "ratio", "launches", "of Liger's", "bytes/param")
        print(table_row(header, WIDTHS))
    for job in count(config):
        jobs.append(job)
        if not config.json:
            liger = "" if job.liger_ratio is None else f"{job.liger_ratio:.3f}"
            each = "" if job.parameters is None else f"{job.moved / job.parameters:.3f}"
            counts = (f"{job.moved}", f"{job.fewest}", f"{job.ratio:.4f}", f"{job.launches}")
            print(table_row((job.name, *counts, liger, each), WIDTHS), flush=True)
    broken = [line for job in jobs for line in job.broken_bars()]
    if config.json:
        rows = [asdict(job) | {"ratio": job.ratio, "liger_ratio": job.liger_ratio} for job in jobs]
        print(json.dumps({"jobs": rows, "liger_installed": has_liger(), "broken_bars": broken}))
    elif not has_liger() and "cross_entropy" in config.op:
        print("Liger-Kernel is not installed, so nothing is compared with it: pip install -e '.[bench]'")
    for line in broken:
        print(line, file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    run_command(TrafficConfig, run)
