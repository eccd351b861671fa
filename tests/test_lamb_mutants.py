"""Planted bugs in LAMB's kernels; the operation's check must find each of them."""

import pytest

from kernels.lamb import check, kernel
from tests.mutation import mutated

MUTANTS = {
    "corrections of the age before": ("tl.pointer_type(tl.float32))) + 1.0", "tl.pointer_type(tl.float32)))"),
    "correction in fp32": ("tl.exp(age.to(tl.float64) * log_beta2)", "tl.exp((age * log_beta2).to(tl.float32))"),
    "corrections exchanged": ("age.to(tl.float64) * log_beta1", "age.to(tl.float64) * log_beta2"),
    "second correction without its root": ("1.0 / tl.sqrt(1.0 - tl.exp", "1.0 / (1.0 - tl.exp"),
    "second moment not corrected": ("tl.sqrt(exp_avg_sq) * denominator_scale", "tl.sqrt(exp_avg_sq)"),
    "eps inside the root": ("(exp_avg_sq) * denominator_scale + eps", "(exp_avg_sq + eps) * denominator_scale"),
    "eps before the correction": ("(exp_avg_sq) * denominator_scale + eps)", "(exp_avg_sq) + eps) / denominator_scale"),
    "not clipped": ("is_last) * clip", "is_last)"),
    "clipped twice": ("is_last) * clip", "is_last) * clip * clip"),
    "second moment not clipped": ("(grad * grad)", "(grad * grad / (clip * clip))"),
    "short gradients made longer": ("tl.where(factor > 1.0, 1.0, factor)", "factor"),
    "an infinite norm is none": ('norm < float("inf")', "norm == norm"),
    "a NaN is a norm": ('tl.where(norm < float("inf"), factor, -1.0)', 'tl.where(norm == float("inf"), -1.0, factor)'),
    "norm of a skipped step": ("tl.store(norm_ptr, norm)", "tl.store(norm_ptr, tl.where(factor > 0.0, norm, 0.0))"),
    "moments of a skipped step": ("length = tl.where(clip < 0, 0, length)", "pass"),
    "update not told to skip": ("tl.where(clip < 0, -1.0, exp_avg_scale)", "exp_avg_scale"),
    "update of a skipped step": ("length = tl.where(is_taken, length, 0)", "pass"),
    "averages of a skipped step": (
        "length = tl.where(is_taken, length, 0)", "lr_scale = tl.where(is_taken, lr_scale, 0.0)"
    ),
    "age of a skipped step": ("(start == 0) & is_taken", "start == 0"),
    "norm without its root": ("norm = tl.sqrt(tl.sum(sums))", "norm = tl.sum(sums)"),
    "norm without the last chunk": ("mask=first + lanes < num_chunks", "mask=first + lanes < num_chunks - 1"),
    "betas exchanged": ("= beta2 * exp_avg_sq", "= (1 - one_minus_beta1) * exp_avg_sq"),
    "no decay in the norm": ("update += weight_decay * param\nif", "if"),
    "no decay in the update": ("update += weight_decay * param\nparam", "param"),
    "ratio inverted": ("where(is_scaled, param_norm, 1.0) / tl", "where(is_scaled, 1 / param_norm, 1.0) * tl"),
    "ratio of squares": ("param_norm = tl.sqrt(", "param_norm = ("),
    "ratio without decay": ("(weight_decay != 0) & ", ""),
    "ratio of a zero parameter": ("& (param_norm > 0) &", "&"),
    "ratio clamped": ("tl.load(lr_ptr) * ratio", "tl.load(lr_ptr) * tl.minimum(ratio, 1.0)"),
    "learning rate never read": ("lr_scale * tl.load(lr_ptr) * ratio", "lr_scale * ratio"),
    "sums of the neighbor": ("FIRST_CHUNK)\nown", "FIRST_CHUNK) + 1\nown"),
    "sum of one chunk": ("is_own = own < ", "is_own = own < 0 * own + 1 + 0 * "),
    "a sum too many": ("is_own = own < ", "is_own = own <= "),
    "sums exchanged": ("tl.sum(param_sums)", "tl.sum(update_sums)"),
    "average of the old parameter": ("(param - average)", "(param + step_size * update - average)"),
    "average exchanged": ("average += one_minus_decay * (", "average = param - one_minus_decay * ("),
    "average not kept": ("chunk.store(averages, lanes, average, length, is_last)", "pass"),
    "copy of the old parameter": ("narrow(param, COPY", "narrow(param + step_size * update, COPY"),
    "copy without the trust ratio": (
        "narrow(param, COPY", "narrow(param + step_size * update - lr_scale * tl.load(lr_ptr) * update, COPY"
    ),
    "copy of the average": ("narrow(param, COPY", "narrow(average if HAS_AVERAGES else param, COPY"),
    "copy cut off": ("narrow(param, COPY_TYPE)", "param.to(COPY_TYPE)"),
    "copy rounded half up": (
        "narrow(param, COPY_TYPE)", "round_to(param, 0x8000, COPY_TYPE, COPY_TYPE.is_bf16())"
    ),
    "copy not kept": ("chunk.store(copies, lanes, narrow(param, COPY_TYPE), length, is_last)", "pass"),
    "copy past the end": ("COPY_TYPE), length, is_last", "COPY_TYPE), length + 1, is_last"),
    "copy without its last element": ("COPY_TYPE), length, is_last", "COPY_TYPE), length - 1, is_last"),
    "copy without its last block": ("is not None and has_copy", "is not None and has_copy and not is_last"),
    "copy in the neighboring chunk's place": ("(row_ptr, chunk.COPY, start,", "(row_ptr, chunk.COPY, start // 2,"),
    "age not kept": ("tl.store(tl.load(row_ptr + chunk.STEP).to(tl.pointer_type(tl.float32)), age)", "pass"),
    "scalars of the first tensor": ("tensor * _SCALARS + _DENOMINATOR_SCALE)\n", "_DENOMINATOR_SCALE)\n"),
    "decay of the first tensor": ("decays_ptr + tensor)\nexp", "decays_ptr)\nexp"),
    "one noise for both moments": ("noise >> 16, MOMENT_TYPE", "noise & 0xFFFF, MOMENT_TYPE"),
    "one noise for all chunks": ("tensor, start + first, BLOCK", "tensor, first, BLOCK"),
}  # fmt: skip
OF_CHUNK = {
    "stores past the end": ("values, mask=lanes < length", "values, mask=lanes <= length"),
    "last element not stored": ("values, mask=lanes < length", "values, mask=lanes < length - 1"),
    "last element not loaded": ("mask=lanes < length, other", "mask=lanes < length - 1, other"),
    "no last block": (".to(tl.int32)\nreturn tensor", ".to(tl.int32) // 2048 * 2048\nreturn tensor"),
    "every chunk is the first": ("start = (program - tl.load(row_ptr + FIRST_CHUNK))", "start = (program - program)"),
}
OF_ROUNDING = {
    "moments cut off": ("noise = 0x7FFF + ((bits >> 16) & 1)", "noise = 0"),
    "one noise for all tensors": ("low * 0 + tensor.to(tl.uint32)", "low * 0"),
    "one noise for all steps": ("low * 0 + age.to(tl.uint32)", "low * 0"),
}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name, device, tmp_path):
    with mutated("kernels.lamb.kernel", *MUTANTS[name], tmp_path):
        assert not all(result.passed for result in check.comparisons(device, "triton")), name


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", OF_CHUNK)
def test_a_planted_bug_of_a_chunk_is_found(name, device, tmp_path):
    with mutated("kernels.lamb.chunk", *OF_CHUNK[name], tmp_path):
        assert not all(result.passed for result in check.comparisons(device, "triton")), name


@pytest.mark.parametrize("name", OF_ROUNDING)
def test_a_planted_bug_of_rounding_is_found(name, device, tmp_path):
    with mutated("kernels.lamb.rounding", *OF_ROUNDING[name], tmp_path, users=[kernel]):
        assert not all(result.passed for result in check.comparisons(device, "triton")), name
