"""LAMB over all tensors of a model in at most four launches: norm, clip factor, moments, update.

Each program of the norm, moments and update kernels handles one chunk of one tensor (`chunk.py`), in blocks of BLOCK
elements: whole blocks first, without masks, so that loads and stores are 128 bits wide; then at most one masked block.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps
from kernels.lamb import chunk, chunk_table
from kernels.lamb.arguments import Clipping, Settings, Tensors
from kernels.lamb.reference import clip_factor
from kernels.lamb.rounding import narrow, random_bits, round_to
from kernels.lamb.shards import add_up_chunks, whole_norms

BLOCK = 2048  # elements: eight per thread, 128 bits of bf16 or two words of 128 bits of fp32
NUM_WARPS = 8
SUMS_BLOCK = 1024

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

# Per tensor, written by the moments kernel and read by the update kernel.
_AGE = tl.constexpr(0)
_EXP_AVG_SCALE = tl.constexpr(1)
_DENOMINATOR_SCALE = tl.constexpr(2)
_SCALARS = tl.constexpr(3)


@triton.jit
def _adam_update(exp_avg, exp_avg_sq, exp_avg_scale, denominator_scale, eps):
    """Adam's update, u of docs/model.md#lamb without decay; the scales are 1/(1 − β1ᵗ) and 1/√(1 − β2ᵗ)."""
    return exp_avg * exp_avg_scale / (tl.sqrt(exp_avg_sq) * denominator_scale + eps)


@triton.jit
def norm_kernel(table_ptr, owners_ptr, sums_ptr, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squared gradients of each chunk, to `sums_ptr` [chunks] fp32."""
    # 1. Find the chunk.
    _, row_ptr, start, length = chunk.find(table_ptr, owners_ptr)
    grads = chunk.pointer(row_ptr, chunk.GRAD, start, GRAD_TYPE, ALIGNED)
    # 2. Each lane of [BLOCK] sums its squares in fp32: whole blocks, then the masked rest.
    whole = length // BLOCK * BLOCK
    sums = tl.zeros([BLOCK], tl.float32)
    for is_last in tl.static_range(2):
        for first in range(whole if is_last else 0, length if is_last else whole, BLOCK):
            grad = chunk.load(grads, first + tl.arange(0, BLOCK), length, is_last)
            sums += grad * grad
    # 3. One partial sum per chunk: no atomics, a fixed order of additions.
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=["num_chunks"])
def clip_kernel(sums_ptr, num_chunks, max_norm: tl.float32, norm_ptr, clip_ptr, BLOCK: tl.constexpr):
    """One program: the global norm, and the clip factor of `reference.clip_factor`; −1 skips the step."""
    # 1. Add all chunks' sums, in a fixed order.
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_chunks, BLOCK):
        sums += tl.load(sums_ptr + first + lanes, mask=first + lanes < num_chunks, other=0.0)
    # 2. Norm and factor = min(1, max_norm / (norm + 1e-6)).
    norm = tl.sqrt(tl.sum(sums))
    factor = max_norm / (norm + 1e-6)
    tl.store(norm_ptr, norm)
    factor = tl.where(factor > 1.0, 1.0, factor)
    tl.store(clip_ptr, tl.where(norm < float("inf"), factor, -1.0))  # NaN compares false, so it skips the step too


@triton.jit(do_not_specialize=["num_chunks", "seed"])
def moments_kernel(
    table_ptr,
    owners_ptr,
    decays_ptr,
    clip_ptr,
    sums_ptr,
    scalars_ptr,
    num_chunks,
    beta2: tl.float32,
    one_minus_beta1: tl.float32,
    one_minus_beta2: tl.float32,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float32,
    seed: tl.int64,
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New moments in place; ‖p‖² and ‖u‖² of each chunk to `sums_ptr` [2, chunks]; `scalars_ptr` [tensors, 3].

    Skipped step: length is set to 0, and a scale < 0 tells the update kernel.
    """
    # 1. Find the chunk; a skipped step has no elements.
    tensor, row_ptr, start, length = chunk.find(table_ptr, owners_ptr)
    params = chunk.pointer(row_ptr, chunk.PARAM, start, tl.float32, ALIGNED)
    grads = chunk.pointer(row_ptr, chunk.GRAD, start, GRAD_TYPE, GRAD_ALIGNED)
    exp_avgs = chunk.pointer(row_ptr, chunk.EXP_AVG, start, MOMENT_TYPE, ALIGNED)
    exp_avg_sqs = chunk.pointer(row_ptr, chunk.EXP_AVG_SQ, start, MOMENT_TYPE, ALIGNED)
    weight_decay = tl.load(decays_ptr + tensor)
    clip = tl.load(clip_ptr)
    length = tl.where(clip < 0, 0, length)
    # 2. Bias corrections 1/(1 − β1ᵗ) and 1/√(1 − β2ᵗ); the tensor's first chunk stores them.
    age = tl.load(tl.load(row_ptr + chunk.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    # fp64, because 1 − βᵗ cancels in fp32
    exp_avg_scale = (1.0 / (1.0 - tl.exp(age.to(tl.float64) * log_beta1))).to(tl.float32)
    denominator_scale = (1.0 / tl.sqrt(1.0 - tl.exp(age.to(tl.float64) * log_beta2))).to(tl.float32)
    if start == 0:
        tl.store(scalars_ptr + tensor * _SCALARS + _AGE, age)
        tl.store(scalars_ptr + tensor * _SCALARS + _EXP_AVG_SCALE, tl.where(clip < 0, -1.0, exp_avg_scale))
        tl.store(scalars_ptr + tensor * _SCALARS + _DENOMINATOR_SCALE, denominator_scale)

    # 3. Load p, g, m and v block by block: whole blocks, then the masked rest.
    whole = length // BLOCK * BLOCK
    param_sums = tl.zeros([BLOCK], tl.float32)
    update_sums = tl.zeros([BLOCK], tl.float32)
    for is_last in tl.static_range(2):
        for first in range(whole if is_last else 0, length if is_last else whole, BLOCK):
            lanes = first + tl.arange(0, BLOCK)
            param = chunk.load(params, lanes, length, is_last)
            grad = chunk.load(grads, lanes, length, is_last) * clip
            exp_avg = chunk.load(exp_avgs, lanes, length, is_last)
            exp_avg_sq = chunk.load(exp_avg_sqs, lanes, length, is_last)
            # 4. m and v in fp32, rounded to MOMENT_TYPE and stored.
            exp_avg += one_minus_beta1 * (grad - exp_avg)
            exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
            noise = random_bits(seed, age, tensor, start + first, BLOCK) if STOCHASTIC else 0
            new_exp_avg = round_to(exp_avg, noise & 0xFFFF, MOMENT_TYPE, STOCHASTIC)
            new_exp_avg_sq = round_to(exp_avg_sq, noise >> 16, MOMENT_TYPE, STOCHASTIC)
            chunk.store(exp_avgs, lanes, new_exp_avg, length, is_last)
            chunk.store(exp_avg_sqs, lanes, new_exp_avg_sq, length, is_last)
            # 5. u = Adam's update + decay · p from the rounded moments, which are what the update kernel loads.
            update = _adam_update(
                new_exp_avg.to(tl.float32), new_exp_avg_sq.to(tl.float32), exp_avg_scale, denominator_scale, eps
            )
            update += weight_decay * param
            if is_last:
                update = tl.where(lanes < length, update, 0.0)  # past the end it is 0/0 where eps is 0
            param_sums += param * param
            update_sums += update * update
    # 6. One partial sum per chunk of each.
    tl.store(sums_ptr + tl.program_id(0), tl.sum(param_sums))
    tl.store(sums_ptr + num_chunks + tl.program_id(0), tl.sum(update_sums))


@triton.jit(do_not_specialize=["num_chunks"])
def update_kernel(
    table_ptr,
    owners_ptr,
    decays_ptr,
    lr_ptr,
    lr_scale: tl.float32,
    sums_ptr,
    scalars_ptr,
    num_chunks,
    eps: tl.float32,
    one_minus_decay: tl.float32,
    MOMENT_TYPE: tl.constexpr,
    HAS_AVERAGES: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """New parameters, averages, copies and step counts, in place.

    The learning rate is `lr_scale` · the scalar at `lr_ptr`. COPY_TYPE is None if no parameter has a copy.
    """
    # 1. Find the chunk; a skipped step has no elements, and its step count stays.
    tensor, row_ptr, start, length = chunk.find(table_ptr, owners_ptr)
    params = chunk.pointer(row_ptr, chunk.PARAM, start, tl.float32, ALIGNED)
    exp_avgs = chunk.pointer(row_ptr, chunk.EXP_AVG, start, MOMENT_TYPE, ALIGNED)
    exp_avg_sqs = chunk.pointer(row_ptr, chunk.EXP_AVG_SQ, start, MOMENT_TYPE, ALIGNED)
    if HAS_AVERAGES:
        averages = chunk.pointer(row_ptr, chunk.AVERAGE, start, tl.float32, ALIGNED)
    if COPY_TYPE is not None:
        copies = chunk.pointer(row_ptr, chunk.COPY, start, COPY_TYPE, ALIGNED)
        has_copy = tl.load(row_ptr + chunk.COPY) != 0
    weight_decay = tl.load(decays_ptr + tensor)
    exp_avg_scale = tl.load(scalars_ptr + tensor * _SCALARS + _EXP_AVG_SCALE)
    denominator_scale = tl.load(scalars_ptr + tensor * _SCALARS + _DENOMINATOR_SCALE)
    is_taken = exp_avg_scale > 0
    length = tl.where(is_taken, length, 0)
    if (start == 0) & is_taken:  # only now: every program of the moments kernel reads the old count
        age = tl.load(scalars_ptr + tensor * _SCALARS + _AGE)
        tl.store(tl.load(row_ptr + chunk.STEP).to(tl.pointer_type(tl.float32)), age)

    # 2. Add the tensor's partial sums, up to MAX_CHUNKS: every program of a tensor gets the same trust ratio.
    sums_ptr += tl.load(row_ptr + chunk.FIRST_CHUNK)
    own = tl.arange(0, MAX_CHUNKS)
    is_own = own < tl.cdiv(tl.load(row_ptr + chunk.SIZE), tl.load(row_ptr + chunk.CHUNK_SIZE))
    param_norm = tl.sqrt(tl.sum(tl.load(sums_ptr + own, mask=is_own, other=0.0)))
    update_norm = tl.sqrt(tl.sum(tl.load(sums_ptr + num_chunks + own, mask=is_own, other=0.0)))
    is_scaled = (weight_decay != 0) & (param_norm > 0) & (update_norm > 0)
    ratio = tl.where(is_scaled, param_norm, 1.0) / tl.where(is_scaled, update_norm, 1.0)
    step_size = lr_scale * tl.load(lr_ptr) * ratio

    # 3. Recompute the update from p, m and v, so that no buffer holds it; then parameter, moving average and copy.
    whole = length // BLOCK * BLOCK
    for is_last in tl.static_range(2):
        for first in range(whole if is_last else 0, length if is_last else whole, BLOCK):
            lanes = first + tl.arange(0, BLOCK)
            param = chunk.load(params, lanes, length, is_last)
            exp_avg = chunk.load(exp_avgs, lanes, length, is_last)
            exp_avg_sq = chunk.load(exp_avg_sqs, lanes, length, is_last)
            update = _adam_update(exp_avg, exp_avg_sq, exp_avg_scale, denominator_scale, eps)
            update += weight_decay * param
            param -= step_size * update
            chunk.store(params, lanes, param, length, is_last)
            if HAS_AVERAGES:
                average = chunk.load(averages, lanes, length, is_last)
                average += one_minus_decay * (param - average)
                chunk.store(averages, lanes, average, length, is_last)
            if COPY_TYPE is not None and has_copy:
                chunk.store(copies, lanes, narrow(param, COPY_TYPE), length, is_last)


def launch(
    tensors: Tensors,
    clipping: Clipping,
    settings: Settings,
    *,
    copies: Sequence[Tensor | None] = (),
    addresses: chunk_table.Addresses | None = None,
) -> None:
    """`kernels.lamb_step` for checked tensors: at least one fp32 parameter.

    `copies` are as for `kernels.lamb.PreparedStep`. `addresses` saves computing them if the caller has them.
    """
    params, grads, exp_avgs, *_, averages = tensors
    max_norm, norm, clip = clipping
    lr, beta1, beta2, eps, weight_decays, average_decay, seed, group = settings
    device = params[0].device
    if addresses is None:
        addresses = chunk_table.addresses(*tensors, copies)
    tables = chunk_table.find_chunk_table(addresses, tuple(map(Tensor.numel, params)), tuple(weight_decays), device)
    num_chunks = len(tables.owners)
    chunks = (tables.table, tables.owners)
    sums = torch.empty(2 * num_chunks, dtype=torch.float32, device=device)
    scalars = torch.empty(len(params) * _SCALARS.value, dtype=torch.float32, device=device)
    grad_type, moment_type = grads[0].dtype, exp_avgs[0].dtype
    copy_type = next((copy.dtype for copy in copies if copy is not None), None)
    clip, num_warps = tables.one if clip is None else clip, launch_warps(NUM_WARPS)
    with torch.cuda.device_of(params[0]):
        if max_norm is not None:
            norm_kernel[(num_chunks,)](
                *chunks, sums, **_norm_constants(grad_type, tables.grad_aligned), num_warps=num_warps
            )
            if group is None:
                clip = torch.empty_like(tables.one)
                clip_kernel[(1,)](sums, num_chunks, max_norm, norm, clip, BLOCK=SUMS_BLOCK)
            else:
                norm.copy_(whole_norms(sums[:num_chunks].sum().sqrt(), group))
                clip = clip_factor(norm, max_norm)
        moments_kernel[(num_chunks,)](
            *chunks,
            tables.decays,
            clip,
            sums,
            scalars,
            num_chunks,
            beta2,
            1 - beta1,
            1 - beta2,
            _log(beta1),
            _log(beta2),
            eps,
            seed or 0,
            **_moments_constants(grad_type, moment_type, seed is not None, tables.grad_aligned, tables.aligned),
            num_warps=num_warps,
        )
        if group is not None:
            add_up_chunks(sums.view(2, -1), tables.table[:, chunk_table.FIRST_CHUNK], group)
        update_kernel[(num_chunks,)](
            *chunks,
            tables.decays,
            *((lr, 1.0) if isinstance(lr, Tensor) else (tables.one, lr)),
            sums,
            scalars,
            num_chunks,
            eps,
            1 - average_decay,
            **_update_constants(moment_type, bool(averages), copy_type, tables.aligned),
            num_warps=num_warps,
        )


def configurations() -> list[Configuration]:
    """Every variant of a kernel that `launch` can start."""
    clip_types = {**_pointers("sums", "norm", "clip"), "num_chunks": "i32", "max_norm": "fp32"}
    found = [Configuration("lamb/clip", clip_kernel, clip_types, {"BLOCK": SUMS_BLOCK}, streams=False)]  # one program
    for grad_type, aligned in product(_TYPES, (True, False)):
        found.append(
            _configuration(
                f"lamb/norm {_named('gradients', grad_type, aligned)}",
                norm_kernel,
                _pointers("sums"),
                _norm_constants(grad_type, aligned),
            )
        )
    moments_types = {
        **_pointers("decays", "clip", "sums", "scalars"),
        **dict.fromkeys(("beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32"),
        **dict.fromkeys(("log_beta1", "log_beta2"), "fp64"),
        "num_chunks": "i32",
        "seed": "i64",
    }
    roundings = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    alignments = ((True, True), (False, True), (False, False))
    for grad_type, (moment_type, stochastic), (grad_aligned, aligned) in product(_TYPES, roundings, alignments):
        named = f"{_named('gradients', grad_type, grad_aligned)}, {_named('moments', moment_type, aligned)}"
        found.append(
            _configuration(
                f"lamb/moments {named}{', stochastic' if stochastic else ''}",
                moments_kernel,
                moments_types,
                _moments_constants(grad_type, moment_type, stochastic, grad_aligned, aligned),
            )
        )
    update_types = {
        **_pointers("decays", "lr", "sums", "scalars"),
        **dict.fromkeys(("lr_scale", "eps", "one_minus_decay"), "fp32"),
        "num_chunks": "i32",
    }
    copy_types = (None, torch.bfloat16, torch.float32)
    for moment_type, average, copy_type, aligned in product(_TYPES, (True, False), copy_types, (True, False)):
        written = f"{', averages' if average else ''}{f', {_NAMES[copy_type]} copies' if copy_type else ''}"
        found.append(
            _configuration(
                f"lamb/update {_named('moments', moment_type, aligned)}{written}",
                update_kernel,
                update_types,
                _update_constants(moment_type, average, copy_type, aligned),
            )
        )
    return found


def _norm_constants(grad_type: torch.dtype, aligned: bool) -> dict[str, Any]:
    return {"GRAD_TYPE": _TYPES[grad_type], "ALIGNED": aligned, "BLOCK": BLOCK}


def _moments_constants(
    grad_type: torch.dtype, moment_type: torch.dtype, stochastic: bool, grad_aligned: bool, aligned: bool
) -> dict[str, Any]:
    return {
        "GRAD_TYPE": _TYPES[grad_type],
        "MOMENT_TYPE": _TYPES[moment_type],
        "STOCHASTIC": stochastic,
        "GRAD_ALIGNED": grad_aligned and aligned,  # saves a variant
        "ALIGNED": aligned,
        "BLOCK": BLOCK,
    }


def _update_constants(
    moment_type: torch.dtype, average: bool, copy_type: torch.dtype | None, aligned: bool
) -> dict[str, Any]:
    return {
        "MOMENT_TYPE": _TYPES[moment_type],
        "HAS_AVERAGES": average,
        "COPY_TYPE": None if copy_type is None else _TYPES[copy_type],
        "ALIGNED": aligned,
        "BLOCK": BLOCK,
        "MAX_CHUNKS": chunk_table.MAX_CHUNKS,
    }


def _configuration(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Configuration:
    types = {"table_ptr": "*i64", "owners_ptr": "*i32", **types}
    return Configuration(
        name, kernel, types, constants, num_warps=NUM_WARPS, streams=constants["ALIGNED"],
        most_spilled={"any": 0 if constants["ALIGNED"] else 16},  # of sm_80; no run has unaligned moments
    )  # fmt: skip


def _pointers(*names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*fp32" for name in names}


def _named(what: str, dtype: torch.dtype, aligned: bool) -> str:
    return f"{_NAMES[dtype]} {what}{'' if aligned else ' (unaligned)'}"


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
