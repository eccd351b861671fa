"""What processes from `tests.runs.forked_ranks` find imported when they start."""

import gc

import numpy.ma  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo  # noqa: F401
import yaml  # noqa: F401

import gptbert.train  # noqa: F401
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.io import imports  # noqa: F401
from tests import runs  # noqa: F401

parse(TrainConfig, [f"--{name}=none" for name in ("train_path", "valid_path", "config_file", "tokenizer_path")])
gc.collect()  # no process looks for garbage in a million imported objects
gc.freeze()
