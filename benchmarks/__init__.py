"""Benchmarks of operations (`pytest benchmarks`) and of whole steps, and the counts that need no GPU."""
