"""A second derivative of a kernel, and one in forward mode, is an error: in a sum with others it would be missing."""

import pytest
import torch

from kernels import cross_entropy_from_logits, masked_cross_entropy
from kernels.add_bias import add_bias
from kernels.attention_context import attention_context, fused_attention
from kernels.attention_context.fused import distance_tables
from kernels.dropout import dropouts
from kernels.gated_norm import gated_norm
from kernels.normalize import activate, embed, normalize


def under_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return normalize(x, 1e-5)


def attention(x):
    """One row of two heads and three positions."""
    position = x.unsqueeze(1)  # [H, B, T, d]
    distance = torch.arange(3)[:, None] - torch.arange(3) + 2
    vectors = torch.ones(2, 5, 16, dtype=x.dtype)
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    return attention_context(
        position, position, vectors, vectors, position, distance, mask, None, 0.0, backend="cpp" if bf16(x) else "torch"
    )


def bf16(x):
    return x.dtype == torch.bfloat16


FUNCTIONS = {
    "normalize": under_autocast,
    "logits": lambda x: cross_entropy_from_logits(x.view(6, 16), torch.arange(6), backend="torch").total,
    "hidden": lambda x: masked_cross_entropy(x.view(6, 16), torch.eye(16), torch.arange(6), backend="torch").total,
    "attention": attention,
    "attention in C++": attention,
    "gated_norm": lambda x: gated_norm(
        x, None, torch.eye(8, dtype=x.dtype), approximate="tanh", eps=1e-5, backend="cpp"
    ),
    "add_bias": lambda x: add_bias(x, torch.zeros(16).requires_grad_(), backend="cpp"),
}
IN_CPP = {"attention in C++", "gated_norm", "add_bias"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_refused_where_another_part_of_the_loss_has_one(name):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    x = (x.bfloat16() if name in IN_CPP else x).requires_grad_()
    loss = FUNCTIONS[name](x).float().sum() + x.float().square().sum()
    with pytest.raises(RuntimeError, match=r"kernels\..* has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def in_triton(x):
    """One row of sixteen positions, without documents' ends."""
    tables = distance_tables(torch.zeros(31, dtype=torch.int64), 16, x.dtype, "load")
    rows = torch.zeros(1, 16, dtype=torch.int32), torch.tensor([False])
    return fused_attention(x[None], x[None], x, x, x[None], tables, *rows, None, 0.0, scale=1.0, num_heads=1)


# those that are no torch.autograd.Function, of which PyTorch itself refuses a tangent
REGISTERED = {
    "logits": lambda x: cross_entropy_from_logits(x, torch.arange(16), backend="torch").total,
    "hidden": lambda x: masked_cross_entropy(x, torch.eye(32), torch.arange(16), backend="torch").total,
    "weight": lambda x: masked_cross_entropy(torch.ones(4, 32), x, torch.arange(4), backend="torch").total,
    "attention in Triton": in_triton,
    "embedding": lambda x: embed(torch.arange(16), x, None, 0.0, 1e-5),
    "activation": lambda x: activate(x, None, 0.0, 1e-5),
    "dropouts": lambda x: dropouts(x, torch.ones(2, 2, dtype=torch.int32), 0.5, x.dtype),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_is_refused_in_forward_mode(name):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    assert REGISTERED[name](x).isfinite().all()
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        torch.func.jvp(REGISTERED[name], (x,), (x,))
