"""What storing representations in bf16 does to a run: `python -m benchmarks.mix_storage`, after `make demo`; on a CPU.

The fused mixes (`kernels.depth_mix`) keep older y_m and ∂x_m in bf16 under autocast. Here they are computed by PyTorch,
with the roundings of the Triton kernels, and stored in bf16 or in fp32; else nothing differs. Runs differ in their
seeds too, which shows what a difference of losses means.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.io.screen import table
from gptbert.model import gptbert as model_module
from gptbert.monitoring.records import read_records
from gptbert.train import fit
from kernels.depth_mix import fused
from kernels.dropout import dropout

STORAGES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOSSES = {"masked": "validation/mlm/loss", "causal": "validation/clm/loss"}


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Train runs that differ in the storage of representations, and compare their losses."""

    data: Path = Path("demo")
    """Folder with train.safetensors, validation.safetensors and tokenizer.json, as `make demo` leaves them."""
    config_file: Path = Path("configs/tiny.json")
    """The model."""
    steps: int = 300
    """Steps of each run."""
    seeds: int = 4
    """Runs of each storage."""
    json: bool = False
    """Print one JSON object instead of a table."""


def mix(
    out: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    values: Tensor,
    partials: Tensor,
    mixed: Tensor,
    normalized: Tensor,
    inverse_std: Tensor,
    depth: int,
    num_mixes: int,
    dropout_prob: float,
    eps: float,
) -> None:
    """`kernels.depth_mix.fused.forward`, in PyTorch."""
    del partials, num_mixes
    newest = x
    if out is not None:
        out = out.float() if bias is None else out.float() + bias
        newest = x + (out if seed is None else dropout(out, seed, dropout_prob))
    values[depth] = newest.flatten()
    if depth:
        weights = _row(alpha, depth)
        mixed.copy_((weights[:-1] @ values[:depth].float()).view(x.shape) + weights[-1] * newest)
    else:
        mixed = x
    centered = mixed - mixed.mean(dim=-1, keepdim=True)
    inverse_std.copy_((centered.square().mean(dim=-1) + eps).rsqrt())
    normalized.copy_(centered * inverse_std[:, None])


def mix_backward(
    grad_x: Tensor | None,
    grad_h: Tensor | None,
    normalized: Tensor,
    inverse_std: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    values: Tensor,
    partials: Tensor,
    grad_newest: Tensor,
    grad_out: Tensor | None,
    grad_bias: Tensor | None,
    grad_alpha: Tensor,
    depth: int,
    num_mixes: int,
    dropout_prob: float,
) -> None:
    """`kernels.depth_mix.fused.backward`, in PyTorch; ∂α mix by mix."""
    del partials
    grad = torch.zeros_like(grad_newest) if grad_x is None else grad_x.clone()
    if grad_h is not None:
        of_h, h = grad_h.float(), normalized.float()
        along_h = (of_h * h).mean(dim=-1, keepdim=True)
        grad += inverse_std[:, None] * (of_h - of_h.mean(dim=-1, keepdim=True) - h * along_h)
    own_weight = 1.0
    if depth:
        own_weight = _row(alpha, depth)[-1]
        values[depth + fused.GROUP] = grad.flatten()
        _row(grad_alpha, depth).copy_(values[: depth + 1].float() @ values[depth + fused.GROUP].float())
    deeper = range(depth + 1, num_mixes + 1)
    weights = [_row(alpha, k)[depth] for k in deeper]
    grad_newest.copy_(own_weight * grad)
    if weights:
        stored = values[depth + 1 + fused.GROUP : num_mixes + 1 + fused.GROUP].float()
        grad_newest += (torch.stack(weights) @ stored).view(grad.shape)
    if grad_out is not None:
        of_out = grad_newest if seed is None else dropout(grad_newest, seed, dropout_prob)
        grad_out.copy_(of_out)
        if grad_bias is not None:
            grad_bias.copy_(of_out.sum(dim=0))


def _row(alpha: Tensor, depth: int) -> Tensor:
    """The weights of one mix, [depth + 1]."""
    start = (depth - 1) * (depth + 2) // 2
    return alpha[start : start + depth + 1]


class _Kernels:
    """Takes the place of `kernels.depth_mix.kernel`."""

    forward = staticmethod(mix)
    backward = staticmethod(mix_backward)


def losses(config: StorageConfig, storage: str, seed: int) -> dict[str, float]:
    """Validation losses at the end of one run, in nats, by objective."""

    def mixes(alphas: Sequence[Tensor], dtype: torch.dtype, dropout_prob: float, eps: float) -> fused.FusedMixes:
        del dtype
        return fused.FusedMixes(alphas, STORAGES[storage], dropout_prob, eps)

    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(fused, "triton_kernel", lambda _: _Kernels),
        patch.object(model_module, "are_mixes_fused", lambda *_: True),
        patch.object(model_module, "FusedMixes", mixes),
    ):
        run = TrainConfig(
            train_path=(config.data / "train.safetensors",),
            valid_path=config.data / "validation.safetensors",
            tokenizer_path=config.data / "tokenizer.json",
            config_file=config.config_file,
            output_dir=Path(folder),
            name="run",
            seed=seed,
            mixed_precision=True,
            hybrid_numerator=1,
            hybrid_denominator=2,
            seq_length=128,
            global_batch_size=32,
            batch_reduction=1,
            learning_rate=2e-2,
            warmup_proportion=0.05,
            max_steps=config.steps,
            validate_every=config.steps,
            save_every=config.steps,
            trackers=(),
        )
        fit(run)
        last = [record for record in read_records(run.run_dir / "metrics.jsonl") if LOSSES["masked"] in record][-1]
        return {name: last[key] for name, key in LOSSES.items()}


def compare(config: StorageConfig) -> dict[str, dict[str, list[float]]]:
    """Losses by storage and objective, of all seeds in order.

    Raises:
        InputError: the data is missing.
    """
    if not (config.data / "train.safetensors").exists():
        raise InputError(f"--data {config.data}: no train.safetensors there; `make demo` makes it")
    cases = list(itertools.product(STORAGES, range(config.seeds)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as workers:
        found = list(workers.map(losses, itertools.repeat(config), *zip(*cases, strict=True)))
    results = {storage: {name: [] for name in LOSSES} for storage in STORAGES}
    for (storage, _), of_run in zip(cases, found, strict=True):
        for name, loss in of_run.items():
            results[storage][name].append(loss)
    return results


def show(config: StorageConfig) -> None:
    """Print the losses, their means and spreads, and how far runs of one seed differ."""
    results = compare(config)
    if config.json:
        print(json.dumps(results))
        return
    rows = [["", "storage", "mean", "standard deviation", "losses"]]
    for name in LOSSES:
        for storage, by_name in results.items():
            values = by_name[name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = " ".join(f"{value:.3f}" for value in values)
            rows.append([name, storage, f"{statistics.mean(values):.4f}", f"{spread:.4f}", each])
    print(table(rows))
    for name in LOSSES:
        pairs = zip(*(by_name[name] for by_name in results.values()), strict=True)
        differences = [bf16 - fp32 for bf16, fp32 in pairs]
        print(f"{name}: bf16 − fp32, of one seed each: " + " ".join(f"{value:+.4f}" for value in differences))


def main() -> None:
    """Entry point."""
    run_command(StorageConfig, show)


if __name__ == "__main__":
    main()
