"""Scoring sentences with trained models.

- `trained_model`: a model and its tokenizer, from a checkpoint or an exported folder.
- `likelihood`: log-likelihoods of sentences under both objectives.
- `passages`: texts of which a part is scored, in the three ways of BabyLM's evaluation.
- `evaluation_folder`: BabyLM's evaluation folder: the tasks that are in it.
- `choices`: BabyLM's choices between texts, from BLiMP to WUG.
- `reading_times`: BabyLM's reading task: regressions of reading times.
- `acquisition`: BabyLM's age of acquisition.
- `sigmoid`: least-squares fits of a sigmoid.
- `correlation`: correlations of values and of ranks.
- `csv_table`: columns of a CSV file.
- `babylm_chart`: a picture of BabyLM's scores.
- `closing`: figures at the end of a command: unknown tokens, ties.
- `minimal_pairs`: minimal pairs: reading and accuracy.
- `pair_scores`: minimal pairs scored during a run (`--pairs_path`).
- `texts`: log-probabilities of texts, in Python.
"""
