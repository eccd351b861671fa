"""LayerNorm without scale and bias, as almost everywhere in GPT-BERT."""

from torch import Tensor, nn

from kernels.normalize import normalize


def layer_norm(size: int, eps: float) -> nn.LayerNorm:
    """Non-affine LayerNorm over `size` elements; only the relative embedding has an affine one."""
    return nn.LayerNorm(size, eps=eps, elementwise_affine=False)


class InputNorm(nn.Module):
    """`layer_norm` before a matmul: under autocast its output is in the matmul's dtype (2 bytes)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """X [..., D] to the same shape, in autocast's dtype if enabled."""
        return normalize(x, self.eps)
