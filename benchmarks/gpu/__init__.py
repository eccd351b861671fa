"""Everything that a GPU can tell, in eight minutes: `python -m benchmarks.gpu`, see `__main__.py`."""
