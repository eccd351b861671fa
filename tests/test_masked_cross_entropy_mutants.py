"""Planted bugs in masked cross-entropy's kernels, each of which the operation's check must find."""

import pytest

from kernels.masked_cross_entropy.check import comparisons
from tests.mutation import mutated

# None writes outside the tensors that the check makes: that would end the tests, not fail them.
MUTANTS = {
    "ignored row has a loss": ("tl.store(loss_ptr + row, 0.0)", "tl.store(loss_ptr + row, 1.0)"),
    "ignored row has a z-loss": ("tl.store(z_loss_ptr + row, 0.0)", "tl.store(z_loss_ptr + row, 1.0)"),
    "ignored row is correct": ("tl.store(correct_ptr + row, 0)", "tl.store(correct_ptr + row, 1)"),
    "ignored row has a gradient": ("tl.zeros([BLOCK], element)", "1 + tl.zeros([BLOCK], element)"),
    "ignored row is not written": (
        "tl.zeros([BLOCK], element), mask=inside",
        "tl.zeros([BLOCK], element), mask=inside & (lanes < 0)",
    ),
    "largest logit of the last block only": ("tl.maximum(largest, entries", "tl.maximum(-1e30, entries"),
    "sum of the last block only": ("total += tl.exp(", "total = tl.exp("),
    "last class left out": (
        "entries = tl.where(inside, entries,",
        "entries = tl.where(inside & (piece * BLOCK + lanes < end - 1), entries,",
    ),
    "missing classes count as zero": (
        'tl.where(inside, entries, tl.full((), float("-inf"), tl.float32)',
        "tl.where(inside, entries, tl.full((), 0.0, tl.float32)",
    ),
    "the next row's classes count": ("entries = tl.where(inside, entries,", "entries = tl.where(readable, entries,"),
    "pieces begin where the row does": ("\n    logits_ptr += first_word", "\n    logits_ptr += row * logits_stride"),
    "gradient begins where its row does": (
        "_first_word(row * gradient_stride, ALIGNED)",
        "row * gradient_stride",
    ),
    "label counted from the row's beginning": ("label.to(tl.int32) - head_size", "label.to(tl.int32)"),
    "end moved by the head twice": ("vocab_size - head_size", "vocab_size - 2 * head_size"),
    "head without its first entry": ("head_lanes >= -head_size", "head_lanes > -head_size"),
    "head longer than the row": (" & (head_lanes < end)", ""),
    "head left out of the largest": ("tl.maximum(tl.max(head, axis=0), tl.max(largest, axis=0))", "tl.max(largest)"),
    "head left out of the prediction": (
        "tl.minimum(tl.min(head_predicted, axis=0), tl.min(predicted, axis=0))",
        "tl.min(predicted, axis=0)",
    ),
    "head left out of the sum": ("total = tl.sum(tl.exp(head - largest), axis=0) +", "total ="),
    "head has no gradient": ("head.to(element), mask=in_head", "head.to(element), mask=head_lanes > 0"),
    "label's entry in the head forgotten": ("scale, head_lanes == column)", "scale, head_lanes > 0)"),
    "head of an ignored row not written": (
        "tl.zeros([_WORD], element), mask=in_head)",
        "tl.zeros([_WORD], element), mask=head_lanes > 0)",
    ),
    "last of equals wins": (
        "tl.minimum(tl.min(head_predicted, axis=0), tl.min(predicted, axis=0))",
        "tl.max(tl.where(predicted == _NO_COLUMN, -1, predicted), axis=0)",
    ),
    "prediction inside its block": ("tl.where(is_largest, piece * BLOCK + lanes,", "tl.where(is_largest, lanes,"),
    "logsumexp not squared": ("tl.store(z_loss_ptr + row, lse * lse)", "tl.store(z_loss_ptr + row, lse)"),
    "loss from the unshifted logit": ("shifted_lse - (target - largest)", "shifted_lse - target"),
    "logsumexp rounded": ("lse = largest + shifted_lse", "lse = (largest + shifted_lse).to(tl.float16).to(tl.float32)"),
    "z-loss has no gradient": ("(1 + 2 * z_loss_weight * lse)", "1"),
    "derivative of a square without its 2": ("(1 + 2 * z_loss_weight * lse)", "(1 + z_loss_weight * lse)"),
    "softmax not normalised": ("* lse) / total", "* lse)"),
    "scale left out of the softmax": ("factor = scale * (", "factor = ("),
    "scale left out at the label": ("entries - scale, entries)", "entries - 1, entries)"),
    "label's entry forgotten": ("entries - scale, entries)", "entries, entries)"),
    "label's entry in every block": ("lanes == column - piece * BLOCK", "lanes == column % BLOCK"),
    "label's entry in the first block": ("lanes == column - piece * BLOCK", "lanes == column"),
    "last class has no gradient": (
        "lanes, entries.to(element), mask=inside)",
        "lanes, entries.to(element), mask=lanes < end - 1 - piece * BLOCK)",
    ),
    "grad_output dropped": ("if scale == 1.0:", "if scale == scale:"),
    "grad_output in the first block only": ("+ block * BLOCK + tl.arange(0, BLOCK)", "+ tl.arange(0, BLOCK)"),
    "grad_output in the first row only": ("row * gradient_stride + block", "block"),
    "grad_output not in the last class": ("tl.arange(0, BLOCK) < left", "tl.arange(0, BLOCK) < left - 1"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects_mutants(device, tmp_path, mutant):
    with mutated("kernels.masked_cross_entropy.kernel", *MUTANTS[mutant], tmp_path):
        assert any(not result.passed for result in comparisons(device, "triton"))
