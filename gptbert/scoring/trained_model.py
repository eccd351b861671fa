"""A trained model and its tokenizer, as every command after training is given them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tokenizers import Tokenizer

from gptbert.checkpoint.folder import TOKENIZER, newest_in
from gptbert.checkpoint.saved_model import load_model
from gptbert.distributed.world import choose_device
from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.text.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model a command takes."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, for its newest checkpoint, or a checkpoint's own."""
    weights: Literal["ema", "model"] = "ema"
    """ema: the moving average of the weights. model: the weights themselves."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU where there is one."""


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint holds for use.

    Attributes:
        path: the checkpoint's folder.
        model: in eval mode, on its device.
        tokenizer: that it was trained with.
    """

    path: Path
    model: GPTBert
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @classmethod
    def load(cls, choice: ModelChoice) -> "TrainedModel":
        """Load what the command line names.

        Raises:
            InputError: there is no checkpoint, or it is damaged, or the device is not there.
        """
        device = choose_device(choice.device)
        path = newest_in(choice.run)
        tokenizer = load_tokenizer(path / TOKENIZER)
        model = load_model(path, choice.weights).to(device)
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise InputError(
                f"{path}: its tokenizer has {tokenizer.get_vocab_size()} tokens, more than the model's "
                f"{model.config.vocab_size}"
            )
        return cls(path, model, tokenizer)
