"""Measurements: each module prints what it measured and on what machine."""
