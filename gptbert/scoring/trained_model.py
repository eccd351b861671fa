"""A trained model and its tokenizer, the input of every command after training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tokenizers import Tokenizer

from gptbert.checkpoint.folder import newest_in, tokenizer_of
from gptbert.checkpoint.saved_model import load_model, note_on_average
from gptbert.distributed.world import choose_device
from gptbert.errors import InputError
from gptbert.io.screen import log
from gptbert.model import GPTBert
from gptbert.text.tokenizer import load_tokenizer
from kernels.backend import choose_backend


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The model for a command."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, for its newest checkpoint, or a checkpoint's folder."""
    weights: Literal["ema", "model"] = "ema"
    """ema: the moving average of the weights. model: the weights themselves."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: a GPU if there is one."""


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model and tokenizer, loaded.

    Attributes:
        path: the checkpoint's folder.
        model: in eval mode, on its device.
        tokenizer: the one it was trained with.
        note: to be shown below its results, unless empty; see `note_on_average`.
    """

    path: Path
    model: GPTBert
    tokenizer: Tokenizer
    note: str = ""

    def explain(self) -> None:
        """Log the note, if there is one."""
        if self.note:
            log(self.note)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @classmethod
    def load(cls, choice: ModelChoice) -> "TrainedModel":
        """Load the model that the command line names.

        Raises:
            InputError: the checkpoint is missing or damaged, or the device does not exist.
        """
        device = choose_device(choice.device)
        try:
            choose_backend(None, device)
        except ValueError as error:  # KERNELS_BACKEND in the environment
            raise InputError(str(error)) from None
        path = newest_in(choice.run)
        tokenizer = load_tokenizer(tokenizer_of(path))
        model = load_model(path, choice.weights).to(device)
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise InputError(
                f"{path}: its tokenizer has {tokenizer.get_vocab_size()} tokens, more than the model's "
                f"{model.config.vocab_size}"
            )
        return cls(path, model, tokenizer, note_on_average(path) if choice.weights == "ema" else "")
