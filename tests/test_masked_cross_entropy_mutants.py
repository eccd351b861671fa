"""Planted bugs in masked cross-entropy's kernels; the operation's check must find each of them."""

import pytest
import torch

from kernels.masked_cross_entropy import op
from kernels.masked_cross_entropy.check import comparisons
from tests.mutation import mutated

# No bug writes out of bounds: that would crash the tests, not fail them.
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
    "pieces begin where the row does": ("\nlogits_ptr += first_word", "\nlogits_ptr += row * logits_stride"),
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
    "softmax not normalized": ("* lse) / total", "* lse)"),
    "every row has the first segment's scale": ("scales_ptr + segment,", "scales_ptr,"),
    "every row is in the first row's segment": ("row * segment_stride", "row * 0"),
    "the last segment has no scale": ("segment < num_segments", "segment < num_segments - 1"),
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

MUTANTS_BESIDE_ROWS = {
    "loss of the last rows only": ("loss += tl.load(loss_ptr", "loss = tl.load(loss_ptr"),
    "z-loss of the last rows only": ("z_loss += tl.load(z_loss_ptr", "z_loss = tl.load(z_loss_ptr"),
    "correct among the last rows only": ("correct += tl.load(correct_ptr", "correct = tl.load(correct_ptr"),
    "labeled among the last rows only": (
        "labeled += (is_member & is_labeled)",
        "labeled = (is_member & is_labeled)",
    ),
    "every block is the first": ("rows = first + lanes", "rows = lanes"),
    "rows that are none": ("labeled += (is_member & is_labeled)", "labeled += ((is_member | ~inside) & is_labeled)"),
    "ignored rows are labeled": ("labeled += (is_member & is_labeled)", "labeled += is_member"),
    "labeled rows of all segments": ("labeled += (is_member & is_labeled)", "labeled += (inside & is_labeled)"),
    "rows of all segments": ("is_member = segments == segment", "is_member = segments >= 0"),
    "every row is in the first row's segment": ("rows * segment_stride", "rows * 0"),
    "every segment has the first one's scale": ("tl.load(scales_ptr + segment)", "tl.load(scales_ptr)"),
    "total of the last segment alone": ("total += tl.load(scales_ptr", "total = tl.load(scales_ptr"),
    "the last row left out": ("inside = rows < num_rows", "inside = rows < num_rows - 1"),
    "z-loss not in the total": ("(loss_sum + z_loss_weight * z_loss_sum)", "loss_sum"),
    "total without its scale": ("tl.load(scales_ptr + segment) * (loss_sum", "(loss_sum"),
    "loss and z-loss exchanged": (
        "tl.store(sums_ptr + segment, loss_sum)\ntl.store(sums_ptr + num_segments + segment, z_loss_sum)",
        "tl.store(sums_ptr + segment, z_loss_sum)\ntl.store(sums_ptr + num_segments + segment, loss_sum)",
    ),
    "correct and labeled exchanged": (
        "segment, tl.sum(correct, axis=0).to(tl.int64))\ntl.store(counts_ptr + num_segments + segment, tl.sum(labeled",
        "segment, tl.sum(labeled, axis=0).to(tl.int64))\ntl.store(counts_ptr + num_segments + segment, tl.sum(correct",
    ),
    "grad_output forgotten": ("scale = tl.load(scale_ptr)", "scale = 1.0"),
    "grad_output not in full blocks": (
        "entries = tl.load(source_ptr + lanes).to(tl.float32) * scale",
        "entries = tl.load(source_ptr + lanes).to(tl.float32)",
    ),
    "grad_output not in the last block": (
        "mask=lanes < left).to(tl.float32) * scale",
        "mask=lanes < left).to(tl.float32)",
    ),
    "every block of a gradient is the first": ("source_ptr += block * BLOCK", "source_ptr += 0 * BLOCK"),
    "no block of a gradient but the first": ("target_ptr += block * BLOCK", "target_ptr += 0 * BLOCK"),
    "a gradient's last entry": ("mask=lanes < left)\n", "mask=lanes < left - 1)\n"),
    "a tensor's blocks counted from the first": (
        "second_out_ptr, scale, block - first_blocks,",
        "second_out_ptr, scale, block - first_blocks + 1,",
    ),
    "the third tensor's blocks counted from the second": (
        "third_out_ptr, scale, block - first_blocks - second_blocks,",
        "third_out_ptr, scale, block - first_blocks - second_blocks + 1,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects_mutants(device, tmp_path, mutant):
    with mutated("kernels.masked_cross_entropy.kernel", *MUTANTS[mutant], tmp_path):
        assert any(not result.passed for result in comparisons(device, "triton"))


@pytest.mark.parametrize("mutant", MUTANTS_BESIDE_ROWS)
def test_the_check_rejects_mutants_beside_rows(device, tmp_path, mutant):
    with mutated("kernels.masked_cross_entropy.sum_kernel", *MUTANTS_BESIDE_ROWS[mutant], tmp_path):
        assert any(not result.passed for result in comparisons(device, "triton"))


WRONG_ROWS_MISSED = {
    "negative ones": ("(labels < 0) | (labels >= vocab_size)", "labels >= vocab_size"),
    "too large ones": ("(labels < 0) | (labels >= vocab_size)", "labels < 0"),
    "negative segments": ("| (segments < 0)", ""),
    "too large segments": ("(is_wrong | (segments >= num_segments))", "is_wrong"),
    "all but in the last block": ("wrong += (inside", "wrong = (inside"),
    "all": ("tl.sum(wrong, axis=0) == 0", "tl.sum(wrong, axis=0) >= 0"),
}


def wrong_rows_are_found():
    """5,000 rows in two blocks: one row in each has a label or a segment that is too small or too large."""
    found = []
    for row, label, segment in ((7, 11, 0), (7, -1, 1), (4999, 11, 1), (4999, -99, 0), (7, 3, -1), (4999, -100, 2)):
        labels, segments = torch.full((5000,), -100), torch.zeros(5000, dtype=torch.long)
        labels[row], segments[row] = label, segment
        rows = (torch.zeros(5000), torch.zeros(5000), torch.zeros(5000, dtype=torch.int32))
        try:
            op.sum_rows(*rows, labels, segments, torch.ones(2), [], [], -100, 0.0, 11, False, "triton")
        except RuntimeError as error:
            found.append("0 … 10" in str(error) and "0 … 1" in str(error))
    return found == [True] * 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assert would end the tests")
@pytest.mark.parametrize("mutant", [None, *WRONG_ROWS_MISSED])
def test_wrong_labels_and_segments_are_found_wherever_they_are(tmp_path, mutant):
    if mutant is None:
        assert wrong_rows_are_found()
        return
    with mutated("kernels.masked_cross_entropy.sum_kernel", *WRONG_ROWS_MISSED[mutant], tmp_path):
        assert not wrong_rows_are_found()
