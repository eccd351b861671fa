"""The training steps that are measured, by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCase:
    """A step of one process; hybrid is a quarter MLM.

    Attributes:
        model: a file of configs/, without its ending.
        objective: "MLM" or "hybrid".
        rows: B.
        seq_length: T.
    """

    model: str
    objective: str
    rows: int
    seq_length: int

    @property
    def name(self) -> str:
        """Such as "base_32k hybrid 32 × 128"."""
        return f"{self.model} {self.objective} {self.rows} × {self.seq_length}"


README_COMMAND = StepCase("base_32k", "hybrid", 32, 128)  # one GPU's share of it
CASES = {
    case.name: case
    for case in (
        README_COMMAND,
        StepCase("base_32k", "hybrid", 256, 128),
        StepCase("small", "MLM", 256, 128),
        StepCase("base", "MLM", 64, 512),
        StepCase("small", "hybrid", 32, 128),
    )
}
