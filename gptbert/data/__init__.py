"""From token ids on disk to the batches of a step.

On disk:

- `token_store`: the token file, memory-mapped documents in one file or in shards.
- `token_shards`: one of these files.
- `mapped_arrays`: many files, of which the last used are mapped.
- `upstream_tokens`: token files of upstream GPT-BERT.

Rows:

- `document_order`: the shuffle of an epoch.
- `packing`: documents end to end, as rows that a number finds again.
- `mixture`: rows of several corpora.
- `inputs`: the files of a run, checked against each other.

Batches:

- `objectives`: inputs and labels of masked and causal rows.
- `hybrid_plan`: which rank trains which rows of which objective at a step.
- `mask_history`: how often each token was masked.
- `micro_batch`: the pieces in which a rank's rows go through the model.
- `loader`: the rows of a step, loaded ahead, moved to the device and masked.
"""
