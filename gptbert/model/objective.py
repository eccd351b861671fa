"""The two objectives of GPT-BERT."""

from enum import Enum


class Objective(Enum):
    """Both predict the next token; they differ in the attention mask and in which tokens are labels."""

    MLM = "mlm"
    CLM = "clm"

    @property
    def causal(self) -> bool:
        """Whether attention is causal."""
        return self is Objective.CLM
