"""LAMB in C++: which tensors it takes, and bitwise equality across thread counts; see also `kernels/lamb/check.py`."""

import copy

import pytest
import torch

from kernels import lamb_step
from kernels.lamb import cpp, eager
from tests.numerics import close, on_threads, same

SIZES = ((300, 301), (8192,), (8193,), (0,), (5,))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)
    lists = [[torch.randn(size, generator=generator) for size in SIZES] for _ in range(5)]
    params, grads, exp_avgs, exp_avg_sqs, averages = lists
    return params, grads, exp_avgs, [each.square() for each in exp_avg_sqs], averages


def step(tensors, **changes):
    params, grads, exp_avgs, exp_avg_sqs, averages = copy.deepcopy(tensors)
    ages = [torch.tensor(float(index)) for index in range(len(params))]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 2.0}
    norm = lamb_step(params, grads, exp_avgs, exp_avg_sqs, ages, averages=averages, **settings | changes)
    return [*params, *exp_avgs, *exp_avg_sqs, *averages, *ages, norm]


@pytest.fixture
def steps_taken(monkeypatch):
    """Records the implementation that each step used."""
    taken = []
    for module in (eager, cpp):
        own = module.lamb_step
        monkeypatch.setattr(
            module, "lamb_step", lambda *a, own=own, module=module, **k: taken.append(module) or own(*a, **k)
        )
    return taken


def test_the_backend_decides_and_results_are_close(tensors, steps_taken):
    without = step(tensors)
    by_cpp = step(tensors, backend="cpp")
    assert steps_taken == [eager, cpp]
    assert close(by_cpp, without, tolerance=1e-5)


@pytest.mark.parametrize("types", [(torch.float64,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_other_types_are_left_to_pytorch(tensors, steps_taken, types):
    of_grads, of_others = types
    params, grads, *moments = tensors
    others = [[tensor.to(of_others) for tensor in each] for each in (params, *moments)]
    step([others[0], [grad.to(of_grads) for grad in grads], *others[1:]], backend="cpp")
    assert steps_taken == [eager]


def test_threads_change_no_bit(tensors):
    assert same(*(on_threads(count, lambda: step(tensors, backend="cpp")) for count in (1, 2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_skips_the_step(tensors, bad):
    tensors[1][1][7] = bad
    *after, norm = step(tensors, backend="cpp")
    assert not norm.isfinite()
    params, _, *moments = tensors
    assert same(
        after,
        [
            *params,
            *(each for tensors in moments for each in tensors),
            *(torch.tensor(float(n)) for n in range(len(params))),
        ],
    )
