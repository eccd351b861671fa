"""Scoring sentences with trained models.

- `trained_model`: a model and its tokenizer, from a checkpoint or an exported folder.
- `likelihood`: log-likelihoods of sentences under both objectives.
- `minimal_pairs`: minimal pairs: reading and accuracy.
"""
