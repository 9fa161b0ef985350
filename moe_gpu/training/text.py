"""Real text as bytes: one's own files, or the English prose that ships with Python; deterministic batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Text:
    """Byte tokens on one device, uint8: `train`, and `held_out`, the last tenth. source: where from, in words."""

    train: torch.Tensor
    held_out: torch.Tensor
    source: str
    sha256: str

    def batch(self, step: int, batch_size: int, context: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-byte targets of one step, each int64 (batch_size, context).

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


def load_text(paths: Sequence[str | Path] = (), device: torch.device | str = "cpu", context: int = 1) -> Text:
    """The files one after another, or Python's own prose without any; the last tenth is held out.

    Raises ValueError in one line for a file that cannot be read or is empty, and for a text whose held-out part is
    shorter than one sequence of `context` bytes and its next byte.
    """
    if paths:
        content, source = b"\n".join(_read(Path(path)) for path in paths), ", ".join(Path(path).name for path in paths)
    else:
        content, source = _python_prose(), "pydoc_data.topics (the language reference that ships with Python)"
    held_out = int(len(content) * HELD_OUT_SHARE)
    if held_out < context + 1:
        needed = int((context + 1) / HELD_OUT_SHARE)
        raise ValueError(
            f"{source}: {len(content)} bytes are too short for context={context}; give at least {needed} bytes of text"
        )
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    return Text(tokens[:-held_out], tokens[-held_out:], source, hashlib.sha256(content).hexdigest())


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
