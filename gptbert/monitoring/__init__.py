"""Measuring, recording and showing a run's progress.

- `metrics`: sums on the device, and the training record computed from them.
- `training_record`: the record of training steps.
- `records`: files of records that survive a kill.
- `trackers`: where records go: files, Weights & Biases, TensorBoard.
- `hooks`: functions of the caller's that a run calls.
- `figures`: of a run's data, on the first screen and at the end.
- `display`: a run's screen output.
- `validation`: loss, perplexity and accuracy of both objectives.
- `samples`: masks in fixed texts, filled in at each validation.
- `skipped_steps`: steps whose gradients were not finite.
- `flops`: FLOPs of a step, and a device's FLOP rate.
- `recipes`: combinations of learning rate and batch size known to work.
- `chart`: line charts for a report.
"""
