"""Sizes are rounded to a few values, so that per-shape caches of libraries stay small."""

import ctypes
import platform

import pytest
import torch

from gptbert.model.batch import Batch
from gptbert.model.gptbert import select_labeled
from kernels import IGNORE_INDEX, masked_cross_entropy
from kernels.padding import ROWS, rounded_rows


class _Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost"]
    ]


def heap_in_use():
    """Bytes that glibc has allocated."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Heap
    heap = mallinfo2()
    return heap.used + heap.hblkhd


def test_labeled_rows_are_rounded_up_to_a_multiple():
    assert [rounded_rows(count) for count in (0, 1, 63, 64, 65)] == [0, ROWS, 64, 64, 128]


def test_rows_that_are_selected_recur():
    hidden_states = torch.randn(3, 100, 4)
    for count in (1, 64, 65, 290):
        labels = torch.full((300,), IGNORE_INDEX)
        labels[torch.randperm(300)[:count]] = 5
        labels = labels.view(3, 100)
        rows, chosen, _ = select_labeled(hidden_states, Batch(labels, labels, labels, num_masked=3))
        assert len(rows) == len(chosen) == min(300, rounded_rows(count))
        assert torch.equal(rows[chosen == 5], hidden_states[labels == 5])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_memory_stays_whatever_the_number_of_labels():
    """oneDNN caches code per matmul shape: half a megabyte or more for each number of rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 128), torch.randn(1024, 128)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()

    def step(count):
        labels = torch.full((2048,), IGNORE_INDEX)
        labels[:count] = 3
        masked_cross_entropy(hidden, weight, labels, backend="torch").total.backward()

    for count in range(64, 1024, 64):  # every number of rows after rounding
        step(count)
    before = heap_in_use()
    for count in range(101, 1000, 11):
        step(count)
    assert heap_in_use() - before < 2e6
