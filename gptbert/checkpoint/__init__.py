"""Saved models and runs.

- `checkpoint`: a run's state, saved atomically and loaded.
- `kept`: which checkpoints a run keeps, the best one among them (`--keep_best`).
- `resume`: the checkpoint that a run resumes from (`--resume`).
- `branch`: an ending of its own from a checkpoint (`--branch_from`).
- `saved_model`: a checkpoint's model, for commands after training.
- `folder`: file names, and the files that describe the model.
- `weights`: weights under the published names.
- `foreign`: weights in files that others wrote.
- `training_state`: `training_state.pt`, validated before a trainer loads it.
- `shards`: sharded tensors on disk.
- `manifest`: size and digest of each file of a folder.
- `word_checkpoints`: weights saved by words seen (`--checkpoint_words`).
- `initial_weights`: the weights that a run starts from (`--initial_weights`).
"""
