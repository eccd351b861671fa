"""The transformer (Charpentier & Samuel 2024, arXiv 2410.24159).

- `gptbert`: `GPTBert`: the whole model, and its head.
- `embedding`: token embeddings and position vectors.
- `batch`, `objective`: the rows that it takes, and the objective of each.
- `block`, `attention`, `feed_forward`: a block and its two sub-layers.
- `key_value_cache`: keys and values of earlier positions, for a text continued token by token.
- `layer_weighting`: the depth-weighted average of all representations so far.
- `norm`, `dropout`: LayerNorm and dropout as modules.
- `eval_mode`: a model without dropout, for a while.
- `compilation`: torch.compile of the blocks.
"""

from gptbert.model.gptbert import GPTBert

__all__ = ["GPTBert"]
