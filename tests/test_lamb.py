"""LAMB against recorded steps, against another library's, and against its own promises."""

import io
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import Lamb as OtherLamb
from safetensors.torch import load_file

from gptbert.optim import Lamb
from kernels import lamb_step
from tests.numerics import relative_error

GOLDEN = load_file(Path(__file__).parent / "golden" / "lamb.safetensors")
BETAS = (0.9, 0.98)
STEP = {"step": 1, "lr": 0.5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8}
SHAPES = ((7, 5), (33,), (1,), (16, 24))


def test_six_recorded_steps():
    params = [GOLDEN[f"param{i}.init"].clone().requires_grad_() for i in range(5)]
    groups = [
        {"params": [params[i] for i in (0, 3, 4)], "weight_decay": 0.1},
        {"params": [params[i] for i in (1, 2)], "weight_decay": 0.0},
    ]
    optimizer = Lamb(groups, lr=1e-2, betas=BETAS, eps=1e-8)
    for step in range(6):
        for index, param in enumerate(params):
            param.grad = GOLDEN[f"step{step}.grad{index}"].clone()
        optimizer.step()
        for index, param in enumerate(params):
            expected = GOLDEN[f"step{step}.param{index}"]
            assert relative_error(param.detach(), expected) < 1e-6, (step, index)


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]


def set_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = scale * torch.randn(param.shape, generator=generator, dtype=param.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_agrees_with_pytorch_optimizer(weight_decay):
    """That library's Lamb leaves the bias corrections out of the update, so they are given to it by other ways.

    Settings that make it ours: `weight_decouple=False` (decay inside the update, under the trust ratio), the default
    `grad_averaging` (1 − β1) and `pre_norm` (no clipping of its own), `adam_debias=True` (the learning rate is left as
    it is), eps so small that it does not matter where it is added, `clamp` (a class attribute) out of reach,
    `adam=True` for the group without decay. The correction c = √(1 − β2ᵗ) / (1 − β1ᵗ) multiplies the update: without
    decay the learning rate is multiplied by it, with decay the decay is divided by it, since the trust ratio takes the
    scale of the whole update out again.
    """
    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    optimizer = Lamb(ours, lr=1e-2, betas=BETAS, eps=1e-30, weight_decay=weight_decay)
    other = OtherLamb(
        theirs,
        lr=1e-2,
        betas=BETAS,
        eps=1e-30,
        weight_decouple=False,
        adam=weight_decay == 0,
        adam_debias=True,
        foreach=False,
    )
    other.clamp = 1e9
    for step in range(1, 8):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        correction = (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)
        other.param_groups[0]["lr"] = 1e-2 * (1 if weight_decay else correction)
        other.param_groups[0]["weight_decay"] = weight_decay / correction
        optimizer.step()
        other.step()
        for param, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-11, atol=1e-13)


def test_the_first_step_has_the_length_that_the_trust_ratio_says():
    """‖Δp‖ = lr·‖p‖ with decay, whatever the gradient's scale; lr per entry without."""
    for scale in (1e-6, 1.0, 1e6):
        decayed, plain = (torch.randn(50, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
        before = decayed.detach().clone()
        optimizer = Lamb(
            [{"params": [decayed], "weight_decay": 0.1}, {"params": [plain], "weight_decay": 0.0}], lr=0.01, eps=1e-12
        )
        set_gradients([decayed, plain], 1, scale)
        optimizer.step()
        assert (decayed - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-4)
        torch.testing.assert_close((plain - before).abs(), torch.full((50,), 0.01), rtol=1e-3, atol=0)


def one_step(param, grad, weight_decay, backend=None):
    param, moments = param.clone(), [torch.zeros_like(param), torch.zeros_like(param)]
    lamb_step([param], [grad], [moments[0]], [moments[1]], **STEP, weight_decay=weight_decay, backend=backend)
    return param


def test_a_zero_parameter_moves_with_ratio_one(backend):
    grad = torch.tensor([3.0, -2.0, 1e-3])
    moved = one_step(torch.zeros(3), grad, 0.1, backend)
    torch.testing.assert_close(moved, -0.5 * grad.sign(), rtol=1e-4, atol=0)


def test_a_zero_update_changes_nothing_and_is_no_nan(backend):
    assert torch.equal(one_step(torch.zeros(3), torch.zeros(3), 0.1, backend), torch.zeros(3))
    assert torch.equal(one_step(torch.ones(3), torch.zeros(3), 0.0, backend), torch.ones(3))


def test_a_zero_gradient_leaves_only_the_decay(backend):
    """u = wd·p, so the ratio is 1/wd and p loses lr of itself."""
    moved = one_step(torch.tensor([1.0, -2.0, 4.0]), torch.zeros(3), 0.1, backend)
    torch.testing.assert_close(moved, torch.tensor([0.5, -1.0, 2.0]))


def test_the_ratio_is_not_clamped(backend):
    large = torch.full((100,), 1e4)  # ‖p‖ = 1e5, ‖u‖ about 1e4
    moved = one_step(large, torch.ones(100), 1e-6, backend)
    torch.testing.assert_close(moved, torch.full((100,), 0.5e4), rtol=1e-4, atol=0)


def test_each_tensor_has_its_own_ratio(backend):
    params = [torch.full((4,), size) for size in (0.1, 10.0)]
    together = [param.clone() for param in params]
    zeros = [[torch.zeros(4), torch.zeros(4)] for _ in "ab"]
    lamb_step(together, [torch.ones(4)] * 2, *zeros, **STEP, weight_decay=0.1, backend=backend)
    for param, moved in zip(params, together, strict=True):
        torch.testing.assert_close(moved, param / 2)


def test_gradients_are_only_read():
    params = make_params()
    set_gradients(params, 1)
    before = [param.grad.clone() for param in params]
    Lamb(params, weight_decay=0.1).step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True))


def train(params, optimizer, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def make_optimizer(params):
    return Lamb(
        [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}], lr=0.02, betas=BETAS
    )


@pytest.mark.parametrize("through_file", [False, True])
def test_a_restored_optimizer_goes_on_to_the_bit(through_file):
    straight = make_params()
    train(straight, make_optimizer(straight), range(8))
    params = make_params()
    first = make_optimizer(params)
    train(params, first, range(4))
    state, weights = first.state_dict(), [param.detach().clone().requires_grad_() for param in params]
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second = make_optimizer(weights)
    second.load_state_dict(state)
    train(weights, second, range(4, 8))
    assert all(torch.equal(*pair) for pair in zip(straight, weights, strict=True))


def test_two_runs_give_the_same_bits():
    runs = [make_params(), make_params()]
    for params in runs:
        train(params, make_optimizer(params), range(5))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], make_params()[0])


def test_a_parameter_without_gradient_is_skipped_and_ages_later():
    """Its first update is a first update, bias correction and all, though the others are older."""
    params, alone = make_params(), make_params()[3]
    optimizer = Lamb(params, lr=0.02, weight_decay=0.1)
    before = params[3].detach().clone()
    for step in range(3):
        set_gradients(params, step)
        params[3].grad = None
        optimizer.step()
    assert torch.equal(params[3], before)
    assert params[3] not in optimizer.state
    for param in params:
        param.grad = torch.ones_like(param)
    alone.grad = torch.ones_like(alone)
    optimizer.step()
    Lamb([alone], lr=0.02, weight_decay=0.1).step()
    assert torch.equal(params[3], alone)


def test_step_returns_the_closures_loss():
    param = torch.ones(3, requires_grad=True)

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert Lamb([param]).step(closure).item() == 3
    assert Lamb([param]).step() is None
