"""Matrix products that a block has started and not waited for: their registers must not be touched meanwhile."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class RunningProducts:
    """Groups of asynchronous products, in order.

    Attributes:
        results: rows of registers that they add to.
        operands: rows of registers that they read.
    """

    results: set[int] = field(default_factory=set)
    operands: set[int] = field(default_factory=set)
    _groups: list[list[tuple[range, range, np.ndarray]]] = field(default_factory=lambda: [[]])

    def start(self, results: range, operands: range, shared: np.ndarray) -> None:
        """Start a product; `shared` are the bytes of shared memory that it reads, [m]."""
        self._groups[-1].append((results, operands, shared))
        self.results.update(results)
        self.operands.update(operands)

    def close(self) -> None:
        """The group is complete."""
        self._groups.append([])

    def wait(self, left: int) -> None:
        """Until at most this many complete groups are running."""
        self._groups = self._groups[-left - 1 :]
        products = [product for group in self._groups for product in group]
        self.results = {row for results, _, _ in products for row in results}
        self.operands = {row for _, operands, _ in products for row in operands}

    def reads(self, places: np.ndarray) -> bool:
        """Whether one of them reads these bytes of shared memory."""
        return any(np.isin(places, shared).any() for group in self._groups for _, _, shared in group)
