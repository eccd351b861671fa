"""Where a wheel has the packages; all else is in pyproject.toml.

`kernels` is a package of Hugging Face's too: in a wheel ours is inside of gptbert (gptbert/kernels_finder.py says why).
An editable install, which copies nothing, has it under its own name as well.
"""

import sys

from setuptools import find_packages, setup

OURS = ["gptbert*", "tokenize_scripts*"]

if "editable_wheel" in sys.argv:  # what pip asks for with -e
    setup(packages=find_packages(include=[*OURS, "kernels*"]))
else:
    inside = [f"gptbert._packages.{name}" for name in find_packages(include=["kernels*"])]
    setup(
        packages=[*find_packages(include=OURS), *inside],
        package_dir={"gptbert._packages.kernels": "kernels"},
    )
