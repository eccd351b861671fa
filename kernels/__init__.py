"""The hot operations of a GPT-BERT trainer: one folder per operation, each with a readable PyTorch reference."""

from kernels import namesake
from kernels.lamb import lamb_step
from kernels.masked_cross_entropy import MaskedCrossEntropy, cross_entropy_from_logits, masked_cross_entropy
from kernels.span_mask import IGNORE_INDEX, span_mask

__all__ = [
    "IGNORE_INDEX",
    "MaskedCrossEntropy",
    "cross_entropy_from_logits",
    "lamb_step",
    "masked_cross_entropy",
    "span_mask",
]

__path__ += namesake.folders()
__getattr__ = namesake.attribute
