"""torch.compile of a model's blocks: what is compiled, how, and what a compiler must be told.

The compiler itself is imported where it is used: that takes seconds, and brings Triton along.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from gptbert.errors import InputError
from kernels import cpp, torch_private

# of what a forward keeps for the backward, the share that may stay; the rest is what is cheap to compute again.
# C++ kernels do so themselves, and are not cheap to run twice
_ACTIVATION_MEMORY, _ACTIVATION_MEMORY_WITH_CPP = 0.8, 1.0


def compile_blocks(blocks: nn.ModuleList, *, mixed_precision: bool = True) -> None:
    """Compile the attention and the feed-forward of each block, in place; parameters keep their names.

    All blocks share two graphs, since compiled code takes parameters as arguments. What stands between them, the layer
    weighting, is one library call; the head and the loss see another number of labels at each step. Compilation happens
    at the first forward and backward of each row length, and at the first forward in evaluation; never for another
    number of rows (see `any_number_of_rows`) or the other objective. Code for any row length was a tenth slower.
    On a CPU in mixed precision, C++ kernels serve what Inductor makes many passes of (`kernels.cpp`), unless a backend
    was chosen by name. Inductor keeps what it made on the disk, so that the next run starts in seconds (the
    environment's TORCHINDUCTOR_CACHE_DIR names the folder).
    """
    # the masks of dropout are drawn again in the backward: to write and read them takes ten times as long on a CPU
    torch_private.configure_autograd_compiler(ban_recompute_long_fusible_chains=False)
    by_cpp = mixed_precision and next(blocks.parameters()).device.type == "cpu" and cpp.load()
    kept = _ACTIVATION_MEMORY_WITH_CPP if by_cpp else _ACTIVATION_MEMORY
    torch_private.configure_autograd_compiler(activation_memory_budget=kept)
    # shapes and places of tensors are not looked at again at each call, of which there are a hundred in a step
    torch_private.configure_inductor(size_asserts=False, alignment_asserts=False, scalar_asserts=False)
    for block in blocks:
        block.is_compiled = True
        for sub_layer in (block.attention, block.feed_forward):
            sub_layer.compile(fullgraph=True, dynamic=False)


@contextmanager
def compiling() -> Iterator[None]:
    """A block in which models are compiled: what the compiler has to say becomes one line.

    Raises:
        InputError: the model cannot be compiled here.
    """
    try:
        yield
    except torch_private.compile_errors() as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--compile: the model cannot be compiled here ({reason}); on CPUs that takes a C++ compiler; "
            "--no_compile trains without"
        ) from error


def any_number_of_rows(tensor: Tensor) -> Tensor:
    """Tell torch.compile that the first dimension is another one at the next call, and may be 1; returns the tensor."""
    torch_private.mark_any_size(tensor, 0)
    return tensor
