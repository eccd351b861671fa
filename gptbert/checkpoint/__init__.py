"""Saved models and runs.

- `checkpoint`: saves that are complete or absent, how many are kept, resuming.
- `folder`: the names of a saved model's files, and those that describe it.
- `weights`: weights under the published names.
- `training_state`: `training_state.pt`, checked before a trainer takes it.
- `shards`: sharded tensors on disk.
- `manifest`: size and digest of each file of a folder.
- `word_checkpoints`: weights saved by words seen (`--checkpoint_words`).
- `initial_weights`: the weights that a run starts from (`--initial_weights`).
"""
