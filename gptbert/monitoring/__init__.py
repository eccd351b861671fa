"""How a run goes, and how it looks.

- `metrics`: sums on the device, and the training record that is made of them.
- `records`: files of records, whole again after a kill.
- `trackers`: where records go: files, Weights & Biases, TensorBoard.
- `progress`: what a run shows on the screen.
- `validation`: loss, perplexity and accuracy of both objectives.
- `samples`: masks of fixed texts, filled in at each validation.
- `skipped_steps`: steps whose gradients were not finite.
- `flops`: the arithmetic that a step needs, and how much a device can do.
- `recipes`: learning rates and batches that are known to work.
- `chart`: line charts of a report.
"""
