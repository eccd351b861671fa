"""torch.compile of a model's blocks: what is compiled, how, and what a compiler must be told.

The compiler itself is imported where it is used: that takes seconds, and brings Triton along.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from gptbert.errors import InputError
from kernels import torch_private
from kernels.backend import choose_backend

# activation_memory_budget: fraction of saved activations to keep; the partitioner recomputes the rest. C++ kernels
# recompute what is cheap themselves, and must not run twice
_ACTIVATION_MEMORY, _ACTIVATION_MEMORY_WITH_CPP = 0.8, 1.0

# dropout's masks are drawn again in the backward: to write and read them takes ten times as long on a CPU
_AUTOGRAD_SETTINGS = {"ban_recompute_long_fusible_chains": False}

# shapes and addresses of tensors are not checked again at each of a hundred calls in a step
_INDUCTOR_OPTIONS = {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}


def compile_blocks(blocks: nn.ModuleList, *, mixed_precision: bool = True) -> None:
    """Compile the attention and the feed-forward of each block, in place; parameters keep their names.

    All blocks share two graphs, since compiled code takes parameters as arguments. Layer weighting between them is one
    library call; the head and the loss see another number of labels at each step. Compilation happens at the first
    forward and backward of each row length, and at the first forward in eval mode, which has separate graphs; never for
    another number of rows (see `any_number_of_rows`) or the other objective. Code for any row length was a tenth
    slower. Inductor caches its output on the disk, so that the next run starts in seconds (the environment's
    TORCHINDUCTOR_CACHE_DIR names the folder).

    Args:
        blocks: of the model, on their device.
        mixed_precision: whether they run under autocast to bf16.
    """
    uses_cpp = mixed_precision and choose_backend(None, next(blocks.parameters()).device) == "cpp"
    budget = _ACTIVATION_MEMORY_WITH_CPP if uses_cpp else _ACTIVATION_MEMORY
    torch_private.configure_autograd_compiler(activation_memory_budget=budget, **_AUTOGRAD_SETTINGS)
    options = torch_private.inductor_options(_INDUCTOR_OPTIONS)
    for block in blocks:
        block.is_compiled = True
        for sub_layer in (block.attention, block.feed_forward):
            sub_layer.compile(fullgraph=True, dynamic=False, options=options)


def restored_settings() -> AbstractContextManager[None]:
    """A block after which process-wide settings of PyTorch that `compile_blocks` makes are as they were before it."""
    return torch_private.restored_autograd_compiler("activation_memory_budget", *_AUTOGRAD_SETTINGS)


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
    """Mark dimension 0 as dynamic, and as ≥ 1, for torch.compile; returns the tensor."""
    torch_private.mark_any_size(tensor, 0)
    return tensor
