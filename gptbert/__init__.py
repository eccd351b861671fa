"""GPT-BERT, one transformer that is both a masked and a causal language model, and its trainer.

In Python: `from gptbert import TrainConfig, load_model, score, train`; docs/python.md.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptbert import kernels_finder

if TYPE_CHECKING:
    from gptbert.config import TrainConfig
    from gptbert.import_hf import load_model
    from gptbert.scoring.texts import score
    from gptbert.train import train

__version__ = "0.1.0"
__all__ = ["TrainConfig", "load_model", "score", "train"]
_MODULES = {"TrainConfig": "config", "load_model": "import_hf", "score": "score", "train": "train"}
kernels_finder.install()  # before anything imports `kernels`
# OpenMP's threads sleep while they wait for each other: by default they spin, on cores that the others need wherever
# something else runs. OpenMP reads this when torch loads it; docs/performance.md has what it costs and saves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if sys.platform == "darwin":  # what Apple's GPU lacks in older releases of PyTorch, the CPU computes, with a warning
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def __getattr__(name: str) -> Any:
    """Import a name of the API once it is used: `import gptbert` alone stays cheap.

    `score` and `train` are modules, which can be called: see `gptbert.command_line.make_callable`.
    """
    if name not in _MODULES:
        raise AttributeError(f"module 'gptbert' has no attribute {name!r}")
    module = import_module(f"gptbert.{_MODULES[name]}")
    return module if name == _MODULES[name] else getattr(module, name)
