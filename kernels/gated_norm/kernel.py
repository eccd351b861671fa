"""LayerNorm(linear · GELU(gate)) in Triton, forward and backward in one pass each; a program has whole rows.

Letters of shapes: R rows (B·T), D columns of linear and gate each.

A row stands in one piece of BLOCK columns or in two, of BLOCK and REST: 3·2^k and 5·2^k columns, usual sizes, fill
them. A program loads the whole row once; the backward computes it again from what came in, mean and 1/σ.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps
from kernels.gelu import gelu_share, gelu_slope
from kernels.whole_rows import ROWS, launch_rows

# by the power of two that holds a row; shorter ones as 512
FORWARD_WARPS = {512: 1, 1024: 2, 2048: 2, 4096: 4, 8192: 8}
BACKWARD_WARPS = {512: 1, 1024: 2, 2048: 4, 4096: 8, 8192: 16}
# what the check launches: R, D, whether GELU is the tanh approximation; whole words and not, one piece and two
CHECKED = ((5, 16, True), (18, 40, False), (3, 320, True), (2, 512, False))


@triton.jit
def _columns(BLOCK: tl.constexpr, REST: tl.constexpr):
    """The columns of each piece, [1, BLOCK] and [1, REST]."""
    columns = (tl.arange(0, BLOCK)[None, :],)
    if REST:
        columns += (BLOCK + tl.arange(0, REST)[None, :],)
    return columns


@triton.jit
def _load(row_ptrs, columns, is_row, size, PIECES: tl.constexpr):
    """The pieces of rows in their dtype, zeros outside."""
    pieces = ()
    for piece in tl.static_range(PIECES):
        is_inside = is_row & (columns[piece] < size)
        pieces += (tl.load(row_ptrs + columns[piece], mask=is_inside, other=0.0),)
    return pieces


@triton.jit
def _store(row_ptrs, columns, is_row, size, values):
    """Store one piece of rows."""
    tl.store(row_ptrs + columns, values, mask=is_row & (columns < size))


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    linear_ptr, gate_ptr, normalized_ptr, mean_ptr, inverse_std_ptr, linear_stride, gate_stride, rows, size,
    eps: tl.float32, IS_TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the normalized product, with mean and 1/σ."""
    # 1. Begin all loads.
    PIECES: tl.constexpr = 2 if REST else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    is_row = row < rows
    columns = _columns(BLOCK, REST)
    linear = _load(linear_ptr + row * linear_stride, columns, is_row, size, PIECES)
    gate = _load(gate_ptr + row * gate_stride, columns, is_row, size, PIECES)
    # 2. The product, 0 outside, and its mean.
    products = ()
    mean = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        own_gate = gate[piece].to(tl.float32)
        products += (linear[piece].to(tl.float32) * (own_gate * gelu_share(own_gate, IS_TANH)),)
        mean += tl.sum(products[piece], axis=1)
    mean = mean / size
    # 3. The variance about it.
    variance = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        centered = tl.where(columns[piece] < size, products[piece] - mean[:, None], 0.0)
        variance += tl.sum(centered * centered, axis=1)
    inverse_std = tl.rsqrt(variance / size + eps)
    # 4. Store.
    for piece in tl.static_range(PIECES):
        normalized = (products[piece] - mean[:, None]) * inverse_std[:, None]
        _store(normalized_ptr + row * size, columns[piece], is_row, size, normalized)
    tl.store(mean_ptr + row, mean[:, None], mask=is_row)
    tl.store(inverse_std_ptr + row, inverse_std[:, None], mask=is_row)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_ptr, linear_ptr, gate_ptr, mean_ptr, inverse_std_ptr, grad_linear_ptr, grad_gate_ptr, normalized_ptr,
    linear_stride, gate_stride, grad_linear_stride, grad_gate_stride, rows, size,
    IS_TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS rows of both gradients, and of the normalized product again."""
    # 1. Begin all loads.
    PIECES: tl.constexpr = 2 if REST else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    is_row = row < rows
    columns = _columns(BLOCK, REST)
    linear = _load(linear_ptr + row * linear_stride, columns, is_row, size, PIECES)
    gate = _load(gate_ptr + row * gate_stride, columns, is_row, size, PIECES)
    grad = _load(grad_ptr + row * size, columns, is_row, size, PIECES)
    mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)
    inverse_std = tl.load(inverse_std_ptr + row, mask=is_row, other=0.0)
    # 2. The normalized product; means of the gradient, and of its product with it: grad is 0 outside.
    normalized = ()
    grad_mean = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        own_gate = gate[piece].to(tl.float32)
        product = linear[piece].to(tl.float32) * (own_gate * gelu_share(own_gate, IS_TANH))
        normalized += ((product - mean) * inverse_std,)
        own_grad = grad[piece].to(tl.float32)
        grad_mean += tl.sum(own_grad, axis=1)
        along += tl.sum(own_grad * normalized[piece], axis=1)
        _store(normalized_ptr + row * size, columns[piece], is_row, size, normalized[piece])
    grad_mean, along = (grad_mean / size)[:, None], (along / size)[:, None]
    # 3. ∂product = 1/σ · (grad − mean(grad) − normalized · mean(grad · normalized)), then both factors.
    for piece in tl.static_range(PIECES):
        own_gate = gate[piece].to(tl.float32)
        share = gelu_share(own_gate, IS_TANH)
        of_product = inverse_std * (grad[piece].to(tl.float32) - grad_mean - normalized[piece] * along)
        of_gate = of_product * linear[piece].to(tl.float32) * gelu_slope(own_gate, share, IS_TANH)
        _store(grad_linear_ptr + row * grad_linear_stride, columns[piece], is_row, size, of_product * own_gate * share)
        _store(grad_gate_ptr + row * grad_gate_stride, columns[piece], is_row, size, of_gate)


def forward(linear: Tensor, gate: Tensor, *, is_tanh: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized product.

    Args:
        linear: [R, D]; its rows may stand apart.
        gate: [R, D], likewise.
        is_tanh: whether GELU is the tanh approximation.
        eps: of LayerNorm.

    Returns:
        [R, D] contiguous, in the dtype of the gate; mean and 1/σ [R] in fp32.
    """
    rows, size = gate.shape
    normalized = gate.new_empty(rows, size)
    mean, inverse_std = (gate.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        with torch.cuda.device_of(gate):
            forward_kernel[(triton.cdiv(rows, launch_rows()),)](
                linear, gate, normalized, mean, inverse_std, linear.stride(0), gate.stride(0), rows, size, eps,
                **_constants(size, launch_rows(), is_tanh=is_tanh),
                num_warps=launch_warps(_num_warps(FORWARD_WARPS, size)),
            )  # fmt: skip
    return normalized, mean, inverse_std


def backward(
    grad: Tensor,
    linear: Tensor,
    gate: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    grad_linear: Tensor,
    grad_gate: Tensor,
    normalized: Tensor,
    *,
    is_tanh: bool,
) -> None:
    """Write both gradients, and the normalized product again.

    Args:
        grad: [R, D], contiguous, of the normalized product.
        linear: as for `forward`.
        gate: as for `forward`.
        mean: [R], from `forward`.
        inverse_std: [R], from `forward`.
        grad_linear: [R, D], to be written; its rows may stand apart.
        grad_gate: [R, D], likewise.
        normalized: [R, D], contiguous, to be written.
        is_tanh: as for `forward`.
    """
    rows, size = gate.shape
    if rows:
        with torch.cuda.device_of(gate):
            backward_kernel[(triton.cdiv(rows, launch_rows()),)](
                grad, linear, gate, mean, inverse_std, grad_linear, grad_gate, normalized,
                linear.stride(0), gate.stride(0), grad_linear.stride(0), grad_gate.stride(0), rows, size,
                **_constants(size, launch_rows(), is_tanh=is_tanh),
                num_warps=launch_warps(_num_warps(BACKWARD_WARPS, size)),
            )  # fmt: skip


def _num_warps(table: dict[int, int], size: int) -> int:
    return table[max(512, triton.next_power_of_2(size))]


def _constants(size: int, rows: int, *, is_tanh: bool) -> dict[str, Any]:
    whole = triton.next_power_of_2(size)
    if whole == size or size < 256:
        block, rest = whole, 0
    else:
        block, rest = whole // 2, triton.next_power_of_2(size - whole // 2)
    return {"IS_TANH": is_tanh, "ROWS": rows, "BLOCK": block, "REST": rest}


def configurations() -> list[Configuration]:
    """Variants of published shapes: feed-forward (tanh) and attention; and of the check."""
    published = [(2560, True), (1280, True), (2048, True), (768, False), (384, False)]
    sizes = [(size, is_tanh, dtype) for size, is_tanh in published for dtype in ("bf16", "fp32")]
    sizes += [(size, is_tanh, dtype) for _, size, is_tanh in CHECKED for dtype in ("bf16", "fp32")]
    return [
        _configuration(kernel, table, size, dtype, is_tanh=is_tanh)
        for kernel, table in ((forward_kernel, FORWARD_WARPS), (backward_kernel, BACKWARD_WARPS))
        for size, is_tanh, dtype in sizes
    ]


def _configuration(kernel: Any, warps: dict[int, int], size: int, dtype: str, *, is_tanh: bool) -> Configuration:
    constants = _constants(size, ROWS, is_tanh=is_tanh)
    kinds = {"eps": "fp32", "mean_ptr": "*fp32", "inverse_std_ptr": "*fp32"}
    types = {
        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
    is_whole = size % 16 == 0
    return Configuration(
        f"gated_norm/{kernel.__name__.removesuffix('_kernel')} {'tanh' if is_tanh else 'erf'} {dtype} D={size}",
        kernel,
        types,
        constants,
        num_warps=_num_warps(warps, size),
        aligned=frozenset(
            name
            for name in types
            if name.endswith("_ptr") or (is_whole and (name.endswith("stride") or name == "size"))
        ),
        streams=is_whole,
        words=constants["BLOCK"] * (2 if dtype == "bf16" else 4) // 16,
    )
