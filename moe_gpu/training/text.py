"""Real text as tokens: one's own files, or the English prose that ships with Python; deterministic batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_gpu.training.tokenizer import ByteTokenizer, Tokenizer

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Text:
    """Tokens on one device: `train`, and `held_out`, the last tenth. source: where from, in words.

    sha256: of the bytes. bytes_per_token: of the held-out text, on average.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    source: str
    sha256: str
    tokenizer: Tokenizer
    bytes_per_token: float

    def bits_per_byte(self, loss: float) -> float:
        """A held-out loss in nats a token as bits a byte, at the held-out text's mean bytes a token."""
        return loss / math.log(2) / self.bytes_per_token

    def batch(self, step: int, batch_size: int, context: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-token targets of one step, each int64 (batch_size, context).

        They depend on the seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
        """
        starts = np.random.default_rng([seed, step]).integers(0, self.train.numel() - context, batch_size)
        starts_B1 = torch.from_numpy(starts).unsqueeze(1)
        if self.train.device.type == "cuda":
            starts_B1 = starts_B1.pin_memory().to(self.train.device, non_blocking=True)
        window = self.train[starts_B1 + torch.arange(context + 1, device=self.train.device)].long()
        return window[:, :-1], window[:, 1:]

    def held_out_batches(
        self, batch_size: int, context: int, limit: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Up to `limit` batches of inputs and targets, evenly spread over the held-out text and always the same."""
        last = self.held_out.numel() - context - 1
        sequences = min(limit * batch_size, last // context + 1)
        starts = torch.linspace(0, last, sequences, dtype=torch.float64).long().to(self.held_out.device)
        for chunk in starts.split(batch_size):
            window = self.held_out[chunk.unsqueeze(1) + torch.arange(context + 1, device=chunk.device)].long()
            yield window[:, :-1], window[:, 1:]


def load_text(
    paths: Sequence[str | Path] = (),
    device: torch.device | str = "cpu",
    context: int = 1,
    make_tokenizer: Callable[[bytes], Tokenizer] = lambda training_text: ByteTokenizer(),
) -> Text:
    """The files one after another, or Python's own prose without any; the last tenth is held out.

    `make_tokenizer` gets the training part alone. Raises ValueError in one line for a file that cannot be read, is
    empty or is not UTF-8 where the tokenizer needs that, and for a text of which one of the parts is shorter than one
    sequence of `context` tokens and its next.
    """
    if paths:
        content, source = b"\n".join(_read(Path(path)) for path in paths), ", ".join(Path(path).name for path in paths)
    else:
        content, source = _python_prose(), "pydoc_data.topics (the language reference that ships with Python)"
    cut = len(content) - int(len(content) * HELD_OUT_SHARE)
    for _ in range(3):  # not between the bytes of one UTF-8 character
        if cut < len(content) and 0x80 <= content[cut] < 0xC0:
            cut -= 1
    try:
        tokenizer = make_tokenizer(content[:cut])
        parts = [tokenizer.encode(content[:cut]), tokenizer.encode(content[cut:])]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text ({error.reason}); give UTF-8, or tokenizer='bytes'") from error
    name, held_out = tokenizer.name, parts[1].numel()
    if min(held_out, parts[0].numel()) < context + 1:
        needed = int((context + 1) / HELD_OUT_SHARE)
        raise ValueError(
            f"{source}: {sum(part.numel() for part in parts)} {name}s are too short for context={context}; "
            f"give at least {needed} {name}s of text"
        )
    trained, kept = (part.to(device) for part in parts)
    digest = hashlib.sha256(content).hexdigest()
    return Text(trained, kept, source, digest, tokenizer, (len(content) - cut) / held_out)


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"data file {path} is a folder; name the text files in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read data file {path}: {error.strerror}; give a readable text file") from error
    if not content.strip():
        raise ValueError(f"data file {path} is empty; give a file with text in it")
    return content


def _python_prose() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python ships without pydoc_data, the default text; give your own with --data") from error
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    # Topics share paragraphs; one that comes twice would be held out and trained on.
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()
