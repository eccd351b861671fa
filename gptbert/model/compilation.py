"""torch.compile for a model's blocks: its scope, its settings, and dynamic dimensions.

The compiler is imported lazily: importing it takes seconds and loads Triton.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from gptbert.errors import InputError, first_line
from kernels import torch_private
from kernels.backend import choose_backend
from kernels.wanted import is_wanted

# activation_memory_budget: fraction of saved activations to keep; the partitioner recomputes the rest. With C++ or
# fused kernels it keeps all: the kernels do their own cheap recomputation, and must not be recomputed themselves
_ACTIVATION_MEMORY, _ACTIVATION_MEMORY_WITH_KERNELS = 0.8, 1.0

# let the backward recompute dropout masks: saving and loading them takes ten times as long on a CPU
_AUTOGRAD_SETTINGS = {"ban_recompute_long_fusible_chains": False}

# skip size and alignment asserts, which would run in each of about a hundred calls a step
_INDUCTOR_OPTIONS = {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}


def compile_blocks(blocks: nn.ModuleList, *, mixed_precision: bool = True) -> None:
    """Compile each block's attention and feed-forward in place; parameter names do not change.

    All blocks share two graphs, since compiled code takes parameters as arguments. The rest stays eager: layer
    weighting is one library call, and the head and the loss see a different number of labels at each step. Compilation
    happens at the first forward and backward of each row length, and at the first forward in eval mode, which has
    separate graphs; a different number of rows (see `any_number_of_rows`) or objective does not recompile. Code with
    dynamic row lengths was 10 % slower. Inductor caches its output on disk (in TORCHINDUCTOR_CACHE_DIR), so the next
    run starts in seconds.

    Args:
        blocks: the model's blocks, on their device.
        mixed_precision: whether they run under bf16 autocast.
    """
    backend = choose_backend(None, next(blocks.parameters()).device)
    uses_kernels = (backend == "cpp" and mixed_precision) or (backend == "triton" and is_wanted("gated_norm"))
    budget = _ACTIVATION_MEMORY_WITH_KERNELS if uses_kernels else _ACTIVATION_MEMORY
    torch_private.configure_autograd_compiler(activation_memory_budget=budget, **_AUTOGRAD_SETTINGS)
    options = torch_private.inductor_options(_INDUCTOR_OPTIONS)
    block: Any  # a `Block`, whose module imports this one
    for block in blocks:
        block.is_compiled = True
        for sub_layer in (block.attention, block.feed_forward):
            sub_layer.compile(fullgraph=True, dynamic=False, options=options)


def restored_settings() -> AbstractContextManager[None]:
    """Context manager: on exit, restores the process-wide PyTorch settings that `compile_blocks` changes."""
    return torch_private.restored_autograd_compiler("activation_memory_budget", *_AUTOGRAD_SETTINGS)


@contextmanager
def compiling() -> Iterator[None]:
    """Context manager for compilation: turns compiler errors into a one-line InputError.

    Raises:
        InputError: the model cannot be compiled on this machine.
    """
    try:
        yield
    except torch_private.compile_errors() as error:
        reason = first_line(error) or type(error).__name__
        raise InputError(
            f"--compile: the model cannot be compiled here ({reason}); on CPUs that takes a C++ compiler; "
            "--no_compile trains without"
        ) from error


def any_number_of_rows(tensor: Tensor) -> Tensor:
    """Mark dim 0 as dynamic (≥ 1) for torch.compile; returns the tensor."""
    torch_private.mark_any_size(tensor, 0)
    return tensor
