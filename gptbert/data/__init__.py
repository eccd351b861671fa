"""From token ids on disk to a step's batches.

On disk:

- `token_store`: the token file: memory-mapped documents in one file or in shards.
- `token_shards`: a single shard file.
- `mapped_arrays`: arrays of many files, only the last used ones mapped.
- `upstream_tokens`: token files of upstream GPT-BERT.

Rows:

- `document_order`: an epoch's shuffle.
- `packing`: documents packed end to end into rows, each addressable by number.
- `mixture`: rows of several corpora.
- `progress`: the places reached in the corpora, and counts of what was trained, across resumes.
- `inputs`: a run's files, checked against each other.

Batches:

- `objectives`: inputs and labels of masked and causal rows.
- `hybrid_plan`: which rank trains which rows of which objective at each step.
- `mask_history`: how often each token was masked.
- `micro_batch`: splits a rank's rows into micro-batches.
- `loader`: a step's rows, moved to the device and masked.
- `prefetcher`: a few steps' rows, ahead on a thread.
"""
