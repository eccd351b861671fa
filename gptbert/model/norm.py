"""LayerNorm as nearly everywhere in GPT-BERT: without scale and bias."""

from torch import Tensor, nn

from kernels.normalize import normalize


def layer_norm(size: int, eps: float) -> nn.LayerNorm:
    """LayerNorm over `size` entries, not affine; the relative embedding has an affine one of its own."""
    return nn.LayerNorm(size, eps=eps, elementwise_affine=False)


class InputNorm(nn.Module):
    """`layer_norm` before a matrix product: under autocast its result has the product's two bytes."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """X [..., D] to the same shape, in autocast's dtype where that is on."""
        return normalize(x, self.eps)
