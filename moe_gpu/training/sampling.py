"""Text out of a trained model: the next token drawn again and again."""

from __future__ import annotations

import math

import torch

from moe_gpu.training.config import is_unicode
from moe_gpu.training.language_model import MoELanguageModel
from moe_gpu.training.tokenizer import Tokenizer

MAX_SAMPLE_TOKENS = 100_000
_COLDEST = 1e-30  # below, logits divided by it leave float32, and the likeliest token was certain long before


@torch.no_grad()
def generate(
    model: MoELanguageModel, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """What the model goes on with after `prompt`; the seed decides it. temperature 0 takes the likeliest token.

    Every token runs the whole context again, of which the oldest tokens fall out: meant for looking at a model, not
    for serving it. Nothing is counted by the profiler, and torch's own generator is left alone.
    Raises ValueError for a prompt that is empty or no text, num_tokens outside 1 to 100,000, a negative temperature and
    a seed outside 0 to 2**64 - 1.
    """
    if not prompt:
        raise ValueError("prompt='' is empty; give at least one character to go on from")
    if not is_unicode(prompt):
        raise ValueError(f"prompt={prompt!r} is not UTF-8; give text that is")
    if not 1 <= num_tokens <= MAX_SAMPLE_TOKENS:
        raise ValueError(f"num_tokens={num_tokens} must be between 1 and {MAX_SAMPLE_TOKENS}")
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature={temperature} must be a finite number of at least 0")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must be between 0 and 2**64 - 1")
    tokens = tokenizer.encode(prompt.encode("utf-8")).tolist()
    generator = torch.Generator().manual_seed(seed)
    device, new = model.config.device, []
    with model.unprofiled():
        for _ in range(num_tokens):
            context = torch.tensor([tokens[-model.config.context :]], device=device)
            logits_V = model(context)[0][0, -1].float().cpu()
            if temperature < _COLDEST:
                token = int(logits_V.argmax())
            else:
                probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
                token = int(torch.multinomial(probabilities_V, 1, generator=generator))
            tokens.append(token)
            new.append(token)
    return tokenizer.decode(new)
