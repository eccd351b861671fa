"""Continue a text with the causal objective."""

import torch
from tokenizers import Tokenizer

from gptbert.model import GPTBert
from gptbert.tokenizer import MASK_ID


@torch.no_grad()
def continue_text(
    model: GPTBert,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int = 40,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """Sample a continuation.

    Args:
        model: in eval mode.
        tokenizer: puts `<s>` in front of the prompt.
        prompt: any text.
        num_tokens: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many of the likeliest tokens.
        seed: of the sampling.

    Returns:
        The prompt and its continuation.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)  # [1, T]
    for _ in range(num_tokens):
        hidden_states = model.encode(ids, torch.zeros_like(ids), causal=True)
        logits = model.logits(hidden_states[:, -1])[0].float().cpu()  # [V]
        logits[: MASK_ID + 1] = -torch.inf  # text holds no special tokens
        logits[tokenizer.get_vocab_size() :] = -torch.inf
        best = logits.topk(min(top_k, len(logits)))
        choice = 0
        if temperature > 0:
            choice = int(torch.multinomial((best.values / temperature).softmax(-1), 1, generator=generator))
        ids = torch.cat([ids, best.indices[choice].view(1, 1).to(device)], dim=1)
    return tokenizer.decode(ids[0].tolist())
