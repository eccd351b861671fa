"""GPT-BERT, one transformer that is both a masked and a causal language model, and its trainer."""

from gptbert import kernels_finder

__version__ = "0.1.0"
kernels_finder.install()  # before anything imports `kernels`
