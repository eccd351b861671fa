"""Where a wheel has the packages; all else is in pyproject.toml.

`kernels` is a package of Hugging Face's too: in a wheel ours is inside of gptbert (gptbert/kernels_finder.py says why).
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["gptbert*", "tokenize_scripts*"]),
        *(f"gptbert._packages.{name}" for name in find_packages(include=["kernels*"])),
    ],
    package_dir={"gptbert._packages.kernels": "kernels"},
)
