"""Continue a text with the causal objective: `python -m gptbert.generate RUN "prompt"`."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.model.key_value_cache import KeyValueCache
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.encoding import decode_behind, encode_prompt
from gptbert.text.tokenizer import ordinary_ids


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(ModelChoice):
    """Continue a text, token by token."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue; "" starts from scratch."""
    num_tokens: int = 40
    """Tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int = 40
    """Sample from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Of these, sample from the smallest set of likeliest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the sampling."""
    num_samples: int = 1
    """Continuations to print; each uses the next seed."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature}, expected 0 or a positive number")
        if self.top_k < 0:
            raise InputError(f"--top_k is {self.top_k}, expected a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p is {self.top_p}, expected a share above 0, at most 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}, expected a number from 0 to {2**32 - 1}")


@torch.inference_mode()
def continue_text(
    model: GPTBert,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int = 40,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Sample a continuation, without special tokens.

    Args:
        model: in eval mode.
        tokenizer: the one it was trained with.
        prompt: any text; special tokens in it are treated as plain text.
        num_tokens: tokens to generate.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        top_p: of these, sample from the smallest set of likeliest tokens whose probabilities sum to at least this.
        seed: of the sampling.

    Returns:
        The prompt, as it is, and its continuation.

    Raises:
        InputError: the prompt is not UTF-8.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(ordinary_ids(tokenizer))
    prompt_ids = encode_prompt(tokenizer, prompt)
    cache = KeyValueCache(len(prompt_ids) + num_tokens)
    new_ids, chosen = torch.tensor([prompt_ids], device=device), []  # [1, T], then [1, 1]
    for _ in range(num_tokens):
        hidden_states = model.encode_next(new_ids, cache)
        logits = model.logits(hidden_states[:, -1])[0].float().cpu()[allowed]
        choice = int(logits.argmax())
        if temperature > 0:
            choice = int(torch.multinomial(distribution(logits, temperature, top_k, top_p), 1, generator=generator))
        chosen.append(int(allowed[choice]))
        new_ids = torch.tensor([chosen[-1:]], device=device)
    return prompt + decode_behind(tokenizer, prompt_ids, chosen)


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The sampling distribution: temperature, then top-k, then top-p (Holtzman et al. 2020).

    Args:
        logits: [V].
        temperature: above 0.
        top_k: number of likeliest tokens to keep; 0: all.
        top_p: of these, keep the smallest set of likeliest ones whose probabilities sum to this; at least one token.

    Returns:
        [V] fp64, 0 for tokens not kept.
    """
    logits = logits.double()
    best = ((logits - logits.max()) / temperature).topk(min(top_k or len(logits), len(logits)))
    probabilities = best.values.softmax(dim=-1)
    if top_p < 1:
        of_likelier = probabilities.cumsum(dim=-1).roll(1)
        of_likelier[0] = 0
        probabilities = torch.where(of_likelier < top_p, probabilities, 0.0)
    return torch.zeros_like(logits).scatter(0, best.indices, probabilities / probabilities.sum())


def generate(settings: GenerateSettings) -> None:
    """Print the prompt and its continuation, once per sample.

    Raises:
        InputError: the checkpoint or the prompt cannot be used.
    """
    trained = TrainedModel.load(settings)
    for sample in range(settings.num_samples):
        text = continue_text(
            trained.model,
            trained.tokenizer,
            settings.prompt,
            settings.num_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.seed + sample,
        )
        if settings.num_samples > 1:
            print(f"--- seed {settings.seed + sample}")
        print(text, flush=True)
    trained.explain()


def main() -> None:
    """Entry point."""
    run_command(GenerateSettings, generate)


if __name__ == "__main__":
    main()
