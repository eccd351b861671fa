"""Recipes: batches with the peak learning rates that suit them, and a warning to runs that are far from all of these.

Between batches a learning rate goes with the square root of the tokens per step (You et al. 2020, arXiv 1904.00962, for
LAMB), so what is compared is not the rate alone but the rate at that batch.
"""

import math
from dataclasses import dataclass

from gptbert.config import TrainConfig

TRIAL_STEPS = 1000  # shorter runs are trials, for which nothing is published: to get anywhere, they take larger steps
FACTOR = 4.0  # how far off the recipes a rate may be, up or down


@dataclass(frozen=True)
class Recipe:
    """What a run trained with.

    Attributes:
        name: of the run.
        optimizer: as of `--optimizer`.
        rows: of a step at the end of the run.
        length: tokens of each row.
        learning_rate: peak.
        source: where that is published.
    """

    name: str
    optimizer: str
    rows: int
    length: int
    learning_rate: float
    source: str

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    def rate_at(self, tokens: int) -> float:
        """Its learning rate for steps of so many tokens."""
        return self.learning_rate * math.sqrt(tokens / self.tokens)


GPT_BERT = "Charpentier & Samuel 2024, arXiv 2410.24159, defaults of their training script"
RECIPES = (
    Recipe("configs/runs/babylm_10m.sh", "lamb", 32768, 128, 1.41e-2, GPT_BERT),
    Recipe("configs/runs/babylm_100m.sh", "lamb", 32768, 128, 1e-2, GPT_BERT),
    Recipe("configs/runs/four_gpus.sh", "lamb", 128, 128, 1e-3, "the run of README.md"),
    # no GPT-BERT is published with AdamW; these are masked and causal models of its size
    Recipe("ELECTRA-Small", "adamw", 128, 128, 5e-4, "Clark et al. 2020, arXiv 2003.10555, table 6"),
    Recipe("BERT-base", "adamw", 256, 512, 1e-4, "Devlin et al. 2019, arXiv 1810.04805, appendix A.2"),
    Recipe("ELECTRA-Base", "adamw", 256, 512, 2e-4, "Clark et al. 2020, arXiv 2003.10555, table 6"),
    Recipe("GPT-3 Small", "adamw", 256, 2048, 6e-4, "Brown et al. 2020, arXiv 2005.14165, table 2.1"),
    Recipe("RoBERTa-base", "adamw", 8192, 512, 6e-4, "Liu et al. 2019, arXiv 1907.11692, table 9"),
)
# of the same run as babylm_10m.sh; with fewer tokens a step, whose gradients are noisier, it would do no better
DIVERGED = Recipe("diverged", "lamb", 32768, 128, 2e-2, "reports of upstream's users")


def learning_rate_range(optimizer: str, tokens: int) -> tuple[float, float]:
    """The peak learning rates that are within `FACTOR` of a recipe, for steps of so many tokens.

    Of the recipes of an optimizer, those count that have the next smaller and the next larger batch. Muon's steps are
    made as large as AdamW's, so that AdamW's rates suit it.

    Returns:
        The lowest, and the one below which they must stay.
    """
    rates = [recipe.rate_at(tokens) for recipe in _neighbors(optimizer, tokens)]
    low, high = min(rates) / FACTOR, max(rates) * FACTOR
    if optimizer == DIVERGED.optimizer:
        high = min(high, DIVERGED.rate_at(max(tokens, DIVERGED.tokens)))
    return low, high


def warning(config: TrainConfig) -> str | None:
    """A line to say at the start of a run whose batch and learning rate together are far from every recipe, or None.

    Runs of fewer than `TRIAL_STEPS` steps get none, nor low rates that go on from trained weights.
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
    """An optimizer's recipes of the next smaller batch and of the next larger one, or of the only one there is."""
    recipes = [recipe for recipe in RECIPES if recipe.optimizer == {"muon": "adamw"}.get(optimizer, optimizer)]
    sizes = sorted({recipe.tokens for recipe in recipes})
    nearest = {max((size for size in sizes if size <= tokens), default=None)}
    nearest |= {min((size for size in sizes if size >= tokens), default=None)}
    return [recipe for recipe in recipes if recipe.tokens in nearest]
