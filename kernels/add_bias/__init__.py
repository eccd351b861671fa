"""The bias of a linear layer; its gradient is a sum over rows. The public operation."""

from torch import Tensor

from kernels.add_bias import op, reference
from kernels.backend import uses_cpp


def add_bias(product: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Add a bias outside the matrix product, so that compiled code fuses it; a BLAS first broadcasts it to a matrix.

    Args:
        product: [..., D].
        bias: [D].
        backend: see `kernels.backend.choose_backend`; "cpp" has a kernel for the gradient in bf16.

    Returns:
        [..., D], in the dtype of the product.
    """
    implementation = op if uses_cpp(product, backend) else reference
    return implementation.add_bias(product, bias)
