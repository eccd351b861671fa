"""Saved models and runs.

- `checkpoint`: a run's state, saved and loaded; saves are complete or absent.
- `resume`: the checkpoint that a run goes on from (`--resume`).
- `saved_model`: the model of a checkpoint, for commands after training.
- `folder`: the names of the files, and those that describe the model.
- `weights`: weights under the published names.
- `training_state`: `training_state.pt`, checked before a trainer takes it.
- `shards`: sharded tensors on disk.
- `manifest`: size and digest of each file of a folder.
- `word_checkpoints`: weights saved by words seen (`--checkpoint_words`).
- `initial_weights`: the weights that a run starts from (`--initial_weights`).
"""
