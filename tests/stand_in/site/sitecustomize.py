"""Imported by Python in every process of a command on the stand-in for a GPU; see tests/stand_in."""

import os

if "STAND_IN_COUNTS" in os.environ:
    from kernels import linear

    linear.multiplies_into_fp32 = lambda _device: True  # which it finds out by computing
elif "STAND_IN_LIBRARY" in os.environ:
    from tests.stand_in import machine, operations

    operations.install()
    machine.install()
