"""The measured training steps, by name, and the ways of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCase:
    """A training step of one process; hybrid is a quarter MLM.

    Attributes:
        model: a file in configs/, without its extension.
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
        """The case's name, such as "base_32k hybrid 32 × 128"."""
        return f"{self.model} {self.objective} {self.rows} × {self.seq_length}"


README_COMMAND = StepCase("base_32k", "hybrid", 32, 128)  # its work per GPU
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
# Whether to compile where that saves anything, the kernels' backend (None: by device), CUDA graphs, and the fraction of
# a round's steps.
WAYS = {
    "ours": {"compile": True, "backend": None, "cuda_graph": "on", "share": 1.0},
    "launched": {"compile": True, "backend": None, "cuda_graph": "off", "share": 0.5},
    "plain": {"compile": False, "backend": "torch", "cuda_graph": "off", "share": 0.5},
}
