"""Benchmarks: each module prints its results and the machine."""
