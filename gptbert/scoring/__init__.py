"""Scoring sentences with trained models.

- `trained_model`: a model and its tokenizer, from a checkpoint or an exported folder.
- `likelihood`: log-likelihoods of sentences under both objectives.
- `closing`: figures at the end of a command: unknown tokens, ties.
- `minimal_pairs`: minimal pairs: reading and accuracy.
- `pair_scores`: minimal pairs scored during a run (`--pairs_path`).
"""
