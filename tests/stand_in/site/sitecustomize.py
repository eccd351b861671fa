"""Imported by Python in every process of a command on the stand-in for a GPU; see tests/stand_in."""

import os

if "STAND_IN_LIBRARY" in os.environ and "STAND_IN_COUNTS" not in os.environ:
    from tests.stand_in import machine, operations

    operations.install()
    machine.install()
