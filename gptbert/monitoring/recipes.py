"""Recipes: batch sizes with suitable peak learning rates, and a warning for runs that are far from all of them.

Learning rates scale with the square root of the tokens per step (You et al. 2020, arXiv 1904.00962, for LAMB), so rates
are compared after scaling to the same batch size.
"""

import math
from dataclasses import dataclass

from gptbert.config import TrainConfig

TRIAL_STEPS = 1000  # shorter runs are trials: no recipes are published for them, and they need larger steps
FACTOR = 4.0  # a rate may be off the recipes by this factor, up or down


@dataclass(frozen=True)
class Recipe:
    """The settings that a published run trained with.

    Attributes:
        name: the run's name.
        optimizer: a value of `--optimizer`.
        rows: rows per step at the end of the run.
        length: tokens per row.
        learning_rate: peak learning rate.
        source: where it is published.
    """

    name: str
    optimizer: str
    rows: int
    length: int
    learning_rate: float
    source: str

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length

    def rate_at(self, tokens: int) -> float:
        """Its learning rate, scaled to this many tokens per step."""
        return self.learning_rate * math.sqrt(tokens / self.tokens)


GPT_BERT = "Charpentier & Samuel 2024, arXiv 2410.24159, defaults of their training script"
RECIPES = (
    Recipe("configs/runs/babylm_10m.sh", "lamb", 32768, 128, 1.41e-2, GPT_BERT),
    Recipe("configs/runs/babylm_100m.sh", "lamb", 32768, 128, 1e-2, GPT_BERT),
    Recipe("configs/runs/four_gpus.sh", "lamb", 128, 128, 1e-3, "the run of README.md"),
    # no GPT-BERT was published with AdamW; these are masked and causal models of its size
    Recipe("ELECTRA-Small", "adamw", 128, 128, 5e-4, "Clark et al. 2020, arXiv 2003.10555, table 6"),
    Recipe("BERT-base", "adamw", 256, 512, 1e-4, "Devlin et al. 2019, arXiv 1810.04805, appendix A.2"),
    Recipe("ELECTRA-Base", "adamw", 256, 512, 2e-4, "Clark et al. 2020, arXiv 2003.10555, table 6"),
    Recipe("GPT-3 Small", "adamw", 256, 2048, 6e-4, "Brown et al. 2020, arXiv 2005.14165, table 2.1"),
    Recipe("RoBERTa-base", "adamw", 8192, 512, 6e-4, "Liu et al. 2019, arXiv 1907.11692, table 9"),
)
# the run of babylm_10m.sh; with fewer tokens per step, and so noisier gradients, it would diverge too
DIVERGED = Recipe("diverged", "lamb", 32768, 128, 2e-2, "reports of upstream's users")


def learning_rate_range(optimizer: str, tokens: int) -> tuple[float, float]:
    """The range of peak learning rates within `FACTOR` of a recipe, for this many tokens per step.

    Only the optimizer's recipes with the next smaller and the next larger batch count. Muon uses AdamW's recipes, since
    its updates are scaled to AdamW's size.

    Returns:
        The lower bound (inclusive) and the upper bound (exclusive).
    """
    rates = [recipe.rate_at(tokens) for recipe in _neighbors(optimizer, tokens)]
    low, high = min(rates) / FACTOR, max(rates) * FACTOR
    if optimizer == DIVERGED.optimizer:
        high = min(high, DIVERGED.rate_at(max(tokens, DIVERGED.tokens)))
    return low, high


def warning(config: TrainConfig) -> str | None:
    """A warning if a run's batch size and learning rate together are far from every recipe, else None.

    Runs of fewer than `TRIAL_STEPS` steps get none, nor do low rates that start from trained weights.
    """
    tokens, rate = config.global_batch_size * config.seq_length, config.learning_rate
    low, high = learning_rate_range(config.optimizer, tokens)
    is_low = rate < low and config.initial_weights is None
    if config.max_steps < TRIAL_STEPS or not (is_low or rate >= high):
        return None
    nearest = min(
        _neighbors(config.optimizer, tokens),
        key=lambda recipe: (abs(math.log(tokens / recipe.tokens)), abs(recipe.learning_rate - rate)),
    )
    return (
        f"warning: --learning_rate {rate:g} is far from what is known to work for --optimizer "
        f"{config.optimizer} at --global_batch_size {config.global_batch_size} x --seq_length {config.seq_length}: "
        f"from {low:.2g} to below {high:.2g} would be in range there; the nearest recipe, {nearest.name}, "
        f"has {nearest.learning_rate:g} at {nearest.rows} x {nearest.length} (docs/choosing.md)"
    )


def _neighbors(optimizer: str, tokens: int) -> list[Recipe]:
    """An optimizer's recipes with the next smaller and the next larger batch, or with only one of the two."""
    recipes = [recipe for recipe in RECIPES if recipe.optimizer == {"muon": "adamw"}.get(optimizer, optimizer)]
    sizes = sorted({recipe.tokens for recipe in recipes})
    nearest = {max((size for size in sizes if size <= tokens), default=None)}
    nearest |= {min((size for size in sizes if size >= tokens), default=None)}
    return [recipe for recipe in recipes if recipe.tokens in nearest]
