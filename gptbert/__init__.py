"""GPT-BERT, one transformer that is both a masked and a causal language model, and its trainer."""
