"""Tokenizers: bytes as they are, or byte-level BPE trained on the run's own text and kept inside its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from moe_gpu.extras import require
from moe_gpu.training.config import BYTES, TrainConfig

_CHUNK = 1 << 16  # characters that are encoded at a time


class Tokenizer(Protocol):
    """Text to tokens and back, without loss."""

    vocab_size: int
    name: str

    def encode(self, content: bytes) -> torch.Tensor: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def to_json(self) -> str | None: ...


class ByteTokenizer:
    """Every byte is a token."""

    vocab_size, name = BYTES, "byte"

    def encode(self, content: bytes) -> torch.Tensor:
        """uint8 tokens (T,) on the CPU."""
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def to_json(self) -> str | None:
        return None


class BPETokenizer:
    """Byte-level byte-pair encoding: any UTF-8 text comes back as it went in. Needs the extra `train`."""

    name = "token"

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()

    @classmethod
    def train(cls, content: bytes, vocab_size: int) -> BPETokenizer:
        """Learn merges from UTF-8 text; the vocabulary is smaller than `vocab_size` where the text has too few."""
        tokenizers = _tokenizers()
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(_chunks(content.decode("utf-8")), trainer)
        return cls(inner)

    @classmethod
    def from_json(cls, text: str) -> BPETokenizer:
        """The inverse of `to_json`; ValueError for text that is no tokenizer."""
        tokenizers = _tokenizers()
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"not a tokenizer ({error})") from error

    def encode(self, content: bytes) -> torch.Tensor:
        """int32 tokens (T,) on the CPU. Raises UnicodeDecodeError for content that is not UTF-8."""
        encoded = self._inner.encode_batch(list(_chunks(content.decode("utf-8"))))
        ids = [torch.tensor(part.ids, dtype=torch.int32) for part in encoded]
        return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(list(tokens), skip_special_tokens=False)

    def to_json(self) -> str | None:
        return self._inner.to_str()


def build_tokenizer(config: TrainConfig, training_text: bytes) -> Tokenizer:
    """The tokenizer that a run asks for. ValueError where the text has too few pairs for its vocabulary."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    tokenizer = BPETokenizer.train(training_text, config.vocab_size)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size}: {len(training_text)} bytes of training text give only "
            f"{tokenizer.vocab_size} tokens; lower vocab_size or give more text"
        )
    return tokenizer


def _tokenizers() -> Any:
    return require("tokenizers", "train", "tokenizer='bpe' needs")


def _chunks(text: str) -> Iterator[str]:
    """Pieces of bounded size that end with a line where there is one; the same text is always cut the same way."""
    start = 0
    while start < len(text):
        end = min(start + _CHUNK, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
