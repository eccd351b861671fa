"""The mixes of `benchmarks.mix_storage`, in PyTorch, are those of the Triton kernels."""

import pytest
import torch

from benchmarks import mix_storage
from gptbert.errors import InputError
from kernels.depth_mix import check, fused


@pytest.mark.parametrize(("num_mixes", "has_dropout"), [(1, False), (5, True), (14, True)])
def test_they_pass_the_kernels_check(monkeypatch, num_mixes, has_dropout):
    monkeypatch.setattr(fused, "triton_kernel", lambda _: mix_storage._Kernels)
    results = list(check.compare_fused(torch.device("cpu"), 7, 24, num_mixes, torch.float32, has_dropout=has_dropout))
    assert [str(result) for result in results if not result.passed] == []


def test_missing_data_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"--data .*: no train.safetensors there; `make demo` makes it"):
        mix_storage.compare(mix_storage.StorageConfig(data=tmp_path))
