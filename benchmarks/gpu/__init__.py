"""All measurements on a GPU, in eight minutes: `python -m benchmarks.gpu`, see `__main__.py`."""
