"""`gptbert.optim.Lamb` on both backends: recorded steps, another library's LAMB, and restored state."""

import io
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import Lamb as OtherLamb
from safetensors.torch import load_file

from gptbert.optim import Lamb
from tests.numerics import close, relative_error, same

SHAPES = ((7, 5), (33,), (1,), (16, 24))
GOLDEN = load_file(Path(__file__).parent / "golden" / "lamb.safetensors")
BETAS = (0.9, 0.98)


@pytest.fixture
def chosen(backend, monkeypatch):
    """Sets the backend that optimizers use."""
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    return backend


def test_six_recorded_steps(chosen, device):
    params = [GOLDEN[f"param{i}.init"].to(device, copy=True).requires_grad_() for i in range(5)]
    groups = [
        {"params": [params[i] for i in (0, 3, 4)], "weight_decay": 0.1},
        {"params": [params[i] for i in (1, 2)], "weight_decay": 0.0},
    ]
    optimizer = Lamb(groups, lr=1e-2, betas=BETAS, eps=1e-8)
    for step in range(6):
        for index, param in enumerate(params):
            param.grad = GOLDEN[f"step{step}.grad{index}"].to(device)
        optimizer.step()
        for index, param in enumerate(params):
            expected = GOLDEN[f"step{step}.param{index}"]
            assert relative_error(param.detach().cpu(), expected) < 1e-6, (step, index)


def make_params(device, dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_() for shape in shapes]


def set_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = scale * torch.randn(param.shape, generator=generator, dtype=param.dtype).to(param.device)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_agrees_with_pytorch_optimizer(chosen, device, dtype, tolerance, weight_decay):
    """pytorch_optimizer's Lamb omits bias correction from the update, so the test supplies it through other settings.

    Settings that make it equal to ours: `weight_decouple=False` (decay inside the update, under the trust ratio), the
    default `grad_averaging` (1 − β1) and `pre_norm` (no clipping of its own), `adam_debias=True` (unchanged learning
    rate), eps so small that its place does not matter, `clamp` (a class attribute) out of reach, `adam=True` for the
    group without decay. The correction c = √(1 − β2ᵗ) / (1 − β1ᵗ) scales the update: without decay the learning rate is
    multiplied by c; with decay the decay is divided by c, since the trust ratio cancels the scale of the whole update.
    scale of the whole update out again.
    """
    ours, theirs = make_params(device, dtype), make_params(device, torch.float64)
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
    for param, expected in zip(ours, theirs, strict=True):
        expected.data.copy_(param)
    for step in range(1, 8):
        set_gradients(ours, step)
        for param, expected in zip(ours, theirs, strict=True):
            expected.grad = param.grad.double()
        correction = (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)
        other.param_groups[0]["lr"] = 1e-2 * (1 if weight_decay else correction)
        other.param_groups[0]["weight_decay"] = weight_decay / correction
        optimizer.step()
        other.step()
        for param, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(param.double(), expected, rtol=tolerance, atol=tolerance / 10)


def test_the_first_step_has_the_length_that_the_trust_ratio_says(chosen, device):
    """‖Δp‖ = lr·‖p‖ with decay, whatever the gradient's scale; lr per element without."""
    for scale in (1e-6, 1.0, 1e6):
        decayed, plain = make_params(device, shapes=[(50,), (50,)])
        before = decayed.detach().clone(), plain.detach().clone()
        optimizer = Lamb(
            [{"params": [decayed], "weight_decay": 0.1}, {"params": [plain], "weight_decay": 0.0}], lr=0.01, eps=1e-12
        )
        set_gradients([decayed, plain], 1, scale)
        optimizer.step()
        assert (decayed - before[0]).norm().item() == pytest.approx(0.01 * before[0].norm().item(), rel=1e-4)
        assert (plain - before[1]).abs().cpu().tolist() == pytest.approx([0.01] * 50, rel=1e-3)


def train(params, optimizer, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def make_optimizer(params):
    return Lamb(
        [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}], lr=0.02, betas=BETAS
    )


@pytest.mark.parametrize("through_file", [False, True])
def test_a_restored_optimizer_goes_on_to_the_bit(chosen, device, through_file):
    straight = make_params(device)
    train(straight, make_optimizer(straight), range(8))
    params = make_params(device)
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
    assert same(straight, weights)


@pytest.mark.parametrize(("first", "second"), [("torch", "triton"), ("triton", "torch")])
def test_a_run_goes_on_with_the_other_backend(device, monkeypatch, first, second):
    monkeypatch.setenv("KERNELS_BACKEND", "torch")
    straight = make_params(device)
    alone = make_optimizer(straight)
    train(straight, alone, range(8))
    params = make_params(device)
    monkeypatch.setenv("KERNELS_BACKEND", first)
    optimizer = make_optimizer(params)
    train(params, optimizer, range(4))
    monkeypatch.setenv("KERNELS_BACKEND", second)
    other = make_optimizer(params)
    other.load_state_dict(optimizer.state_dict())
    train(params, other, range(4, 8))
    assert close([param.detach() for param in params], [param.detach() for param in straight])
    ours, theirs = other.state_dict(), alone.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        described = [{name: (value.shape, value.dtype, value.device) for name, value in one.items()} for one in
                     (state, theirs["state"][index])]  # fmt: skip
        assert described[0] == described[1]
        assert close(state.values(), theirs["state"][index].values())


def test_two_runs_give_the_same_bits(chosen, device):
    runs = [make_params(device), make_params(device)]
    for params in runs:
        train(params, make_optimizer(params), range(5))
    assert same(*runs)
    assert not torch.equal(runs[0][0], make_params(device)[0])


def test_a_parameter_without_gradient_is_skipped_and_ages_later(chosen, device):
    """Its first update is bias-corrected as step 1, even though other parameters are at later steps."""
    params, alone = make_params(device), make_params(device)[3]
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
