"""Benchmarks of operations (`pytest benchmarks`) and of whole steps, and the counts that need no GPU."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
