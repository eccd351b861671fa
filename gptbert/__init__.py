"""GPT-BERT, one transformer that is both a masked and a causal language model, and its trainer."""

from gptbert import kernels_finder

kernels_finder.install()  # before anything imports `kernels`
