"""LAMB's tables of chunks, and its launches, none of which is left out of `configurations`."""

import pytest
import torch
import triton.language as tl

from kernels.lamb import check, chunk_table, kernel
from tests.numerics import close, same
from tests.test_lamb import Model


def test_larger_chunks_where_a_tensor_would_have_too_many(device, monkeypatch):
    monkeypatch.setattr(chunk_table, "MIN_CHUNK", 2048)
    monkeypatch.setattr(chunk_table, "MAX_CHUNKS", 4)
    chunk_table.make_chunk_table.cache_clear()
    models = [Model(device, [(20_001,), (2048,), (8192,), (5000,)]) for _ in "ab"]
    norms = [model.step(backend, max_grad_norm=1.0) for model, backend in zip(models, ("torch", "triton"), strict=True)]
    chunk_table.make_chunk_table.cache_clear()
    assert close(models[1].state(), models[0].state())
    torch.testing.assert_close(*norms)


def test_chunks_of_tensors_of_any_size_are_few_and_short_enough_to_count_in_32_bits():
    for size in (0, 1, 2**14, 2**14 + 1, 2**23, 2**23 + 1, 12_582_912, 2**31, 2**33 + 5, 2**39):
        addresses = ((16,),) * 5
        tables = chunk_table.make_chunk_table(addresses, (size,), (0.1,), torch.device("cpu"))
        chunk_size = tables.table[0, chunk_table.CHUNK_SIZE].item()
        assert chunk_size < 2**31
        assert chunk_size & (chunk_size - 1) == 0
        assert (len(tables.owners) - 1) * chunk_size <= size <= len(tables.owners) * chunk_size
        assert 1 <= len(tables.owners) <= chunk_table.MAX_CHUNKS


def test_elements_beyond_32_bits_are_found(device):
    """A chunk that starts 2³² elements after the table's address, which is as many elements before the data."""
    grad, beginning, chunk_size = torch.arange(5000.0, device=device), 2**32, 2**22
    row = torch.zeros(1, chunk_table.COLUMNS, dtype=torch.int64)
    row[0, chunk_table.GRAD] = grad.data_ptr() - beginning * grad.itemsize
    row[0, chunk_table.SIZE], row[0, chunk_table.CHUNK_SIZE] = beginning + len(grad), chunk_size
    row[0, chunk_table.FIRST_CHUNK] = -beginning // chunk_size
    total, owner = torch.empty(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    constants = kernel._norm_constants(torch.float32, aligned=True)
    kernel.norm_kernel[(1,)](row.to(device), owner, total, **constants)
    assert total.item() == pytest.approx(grad.double().square().sum().item(), rel=1e-6)


class Launches:
    """Wraps a kernel and records its launches."""

    def __init__(self, kernel, noted):
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.noted.append((self.kernel, options))
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Kernel launches with their options, in order."""
    noted = []
    for name in ("norm_kernel", "clip_kernel", "moments_kernel", "update_kernel"):
        monkeypatch.setattr(kernel, name, Launches(getattr(kernel, name), noted))
    return noted


def test_a_model_of_many_tensors_takes_four_launches(device, launches):
    shapes = [(index % 7, index) for index in range(200)]
    models = [Model(device, shapes) for _ in "ab"]
    models[0].step("triton", max_grad_norm=1.0)
    assert len(launches) == 4
    models[1].step("torch", max_grad_norm=1.0)
    assert close(models[0].state(), models[1].state())
    launches.clear()
    Model(device).step("triton")
    assert len(launches) == 2, "without clipping nobody asks for the norm"


def test_configurations_are_what_is_launched(device, launches, monkeypatch):
    """Every case of the check, and every combination of moments and averages."""
    for _ in check.comparisons(device, "triton"):
        pass
    for moments, offset, averaged in ((torch.float32, 0, False), (torch.float32, 1, False), (torch.bfloat16, 1, False)):
        model = Model(device)
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            dtype = torch.float32 if name == "params" else moments
            setattr(model, name, [misaligned(tensor.to(dtype), offset) for tensor in getattr(model, name)])
        model.step("triton", averaged=averaged)
    assert {options["COPY_TYPE"] for kernel, options in launches if "COPY_TYPE" in options} > {None, tl.bfloat16}
    listed = [describe(found.kernel.kernel, found.constants, found.num_warps) for found in kernel.configurations()]
    assert len(set(listed)) == len(listed)
    launched = {describe(kernel, options, options.get("num_warps", 4)) for kernel, options in launches}
    assert launched <= set(listed)
    assert len(launched) > 15


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "steps"])
def test_words_are_wide_where_all_tensors_are_aligned(device, launches, name, offset):
    model = Model(device)
    getattr(model, name)[1] = misaligned(getattr(model, name)[1], offset)
    model.step("triton", max_grad_norm=1.0)
    norm, _, moments, update = (options for _, options in launches)
    assert norm["ALIGNED"] == (not offset or name != "grads")
    assert moments["ALIGNED"] == update["ALIGNED"] == (not offset or name in {"grads", "steps"})
    assert moments["GRAD_ALIGNED"] == (not offset or name == "steps")


def test_fp64_runs_in_pytorch_whatever_the_backend(backend, device, launches):
    model, exact = Model(device, dtype=torch.float64), Model(device, dtype=torch.float64)
    model.step(backend, max_grad_norm=1.0)
    exact.step("torch", max_grad_norm=1.0)
    assert same(model.state(), exact.state())
    assert not launches


def misaligned(tensor, offset):
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return memory[offset:].copy_(tensor.flatten()).view(tensor.shape)


def describe(kernel, options, num_warps):
    constants = sorted((name, str(value)) for name, value in options.items() if name != "num_warps")
    return kernel.fn.__name__, tuple(constants), num_warps
