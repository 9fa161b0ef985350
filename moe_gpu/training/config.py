"""TrainConfig: everything that decides a training run, validated on construction."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moe_gpu.config import MoEConfig

BALANCING = ("aux", "loss_free", "none")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZERS = ("bytes", "bpe")
BYTES = 256  # the vocabulary of the tokenizer `bytes`, and the least part of any other
MAX_VOCAB_SIZE = 65536

WHAT = {
    "data": "text files, read one after another, relative to the working folder; without any, English prose that "
    "ships with Python. The last tenth is held out",
    "tokenizer": "`bytes`, or `bpe`: byte-level BPE trained on the training part of the text (extra `train`)",
    "vocab_size": "tokens in the vocabulary: 256 for `bytes`, 257 to 65536 for `bpe`",
    "context": "tokens in a sequence",
    "model_dim": "width of the model, a multiple of 2 * num_heads",
    "hidden_dim": "intermediate width of each expert",
    "num_layers": "blocks of attention and a MoE layer",
    "num_heads": "attention heads",
    "num_experts": "experts in every layer",
    "top_k": "experts that each token visits",
    "steps": "optimiser steps",
    "batch_size": "sequences in an optimiser step",
    "accumulation_steps": "parts that the batch is computed in, one after another; divides batch_size",
    "gradient_checkpointing": "recompute each block in the backward pass instead of keeping its activations",
    "learning_rate": "AdamW's peak learning rate",
    "warmup_share": "share of the steps over which the learning rate rises; it then falls by a cosine",
    "final_lr_share": "the last learning rate as a share of the peak",
    "weight_decay": "AdamW's, on matrices alone: neither on norms nor on the embedding",
    "grad_clip": "largest norm of the gradient; it is scaled down to this",
    "balancing": "`aux` (Switch's loss), `loss_free` (a selection bias) or `none`",
    "balance_coefficient": "weight of the loss, or how far a step moves the bias",
    "z_loss_coefficient": "weight of the router's z-loss",
    "seed": "decides weights, data order and samples",
    "device": "`cpu`, `cuda` or `cuda:N`",
    "dtype": "`fp32`, or `bf16`: autocast, with parameters and optimiser in fp32",
    "use_triton": "false computes the experts in plain PyTorch on any device",
    "deterministic": "refuse operations whose result may differ from run to run",
    "log_every": "steps between logged rows; the first and the last step are logged too",
    "eval_every": "steps between evaluations on the held-out text; checkpoints and the last step are evaluated too",
    "eval_batches": "batches of an evaluation",
    "checkpoint_every": "steps between checkpoints; the last step has one too",
    "keep_checkpoints": "newest checkpoints to keep; the best by held-out loss is kept beside them",
    "sample_every": "steps between samples of generated text; 0 for none",
    "sample_prompt": "text that samples go on from",
    "sample_tokens": "tokens in a sample",
    "tensorboard": "also write TensorBoard events (extra `metrics`)",
}
"""What each field of TrainConfig decides, in the order in which people read it."""

_AT_LEAST_ONE = (
    "steps",
    "batch_size",
    "accumulation_steps",
    "context",
    "vocab_size",
    "model_dim",
    "hidden_dim",
    "num_layers",
    "num_heads",
    "num_experts",
    "top_k",
    "eval_batches",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_tokens",
)
_NOT_NEGATIVE = ("weight_decay", "balance_coefficient", "z_loss_coefficient")
_FLAGS = ("gradient_checkpointing", "use_triton", "deterministic", "tensorboard")
_CHOICES = {"balancing": BALANCING, "dtype": tuple(DTYPES), "tokenizer": TOKENIZERS}

# A resumed run may change how long it is, what it reports and how it computes; the text is compared by its digest.
RESUMABLE_CHANGES = frozenset(
    {"steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "sample_every"}
    | {"sample_prompt", "sample_tokens", "tensorboard", "deterministic", "gradient_checkpointing"}
    | {"accumulation_steps", "device", "dtype", "use_triton", "data"}
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run; `WHAT` says what each field decides. ValueError names a value that cannot be, and the limit."""

    data: tuple[str | Path, ...] = ()
    tokenizer: str = "bytes"
    vocab_size: int = BYTES
    context: int = 96
    model_dim: int = 128
    hidden_dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    steps: int = 300
    batch_size: int = 16
    accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 4e-3
    warmup_share: float = 0.05
    final_lr_share: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    balancing: str = "aux"
    balance_coefficient: float = 0.01
    z_loss_coefficient: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    use_triton: bool = True
    deterministic: bool = False
    log_every: int = 10
    eval_every: int = 50
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    sample_every: int = 0
    sample_prompt: str = "The "
    sample_tokens: int = 100
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1 and below 2**31")
        for name in (*_NOT_NEGATIVE, "learning_rate", "grad_clip"):
            value = getattr(self, name)
            limit = "0 or more" if name in _NOT_NEGATIVE else "above 0"
            if not _is_number(value) or value < 0 or (value == 0 and name not in _NOT_NEGATIVE):
                raise ValueError(f"{name}={value!r} must be a finite number {limit}")
        for name in ("warmup_share", "final_lr_share"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be between 0 and 1")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be an integer between 0 and 2**63 - 1")
        if not isinstance(self.sample_every, int) or isinstance(self.sample_every, bool) or self.sample_every < 0:
            raise ValueError(f"sample_every={self.sample_every!r} must be an integer of at least 0 (0: no samples)")
        if not isinstance(self.sample_prompt, str) or not self.sample_prompt:
            raise ValueError(f"sample_prompt={self.sample_prompt!r} must be text of at least one character")
        if not is_unicode(self.sample_prompt):
            raise ValueError(f"sample_prompt={self.sample_prompt!r} is not UTF-8; give text that is")
        self._check_sizes()
        if isinstance(self.data, str | Path) or not all(isinstance(path, str | Path) for path in self.data):
            raise ValueError(f"data={self.data!r} must be a tuple of paths")
        try:
            kind = torch.device(self.device).type if isinstance(self.device, str) else None
        except RuntimeError:
            kind = None
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} is not one of cpu, cuda, cuda:N")

    def _check_sizes(self) -> None:
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(f"model_dim={self.model_dim} is not a multiple of 2 * num_heads={2 * self.num_heads}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps={self.accumulation_steps} does not divide batch_size={self.batch_size}; "
                "batch_size counts the sequences of a whole optimiser step"
            )
        if self.tokenizer == "bytes" and self.vocab_size != BYTES:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be {BYTES} for tokenizer='bytes'; or set tokenizer=bpe"
            )
        if self.tokenizer == "bpe" and not BYTES < self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be between {BYTES + 1} and {MAX_VOCAB_SIZE} for tokenizer='bpe'; "
                "4096 suits a small text"
            )
        self.moe  # noqa: B018  (validates the layer's sizes)

    @property
    def moe(self) -> MoEConfig:
        """Every block's MoE layer."""
        return MoEConfig(
            self.model_dim,
            self.model_dim,
            self.hidden_dim,
            self.num_experts,
            self.top_k,
            selection_bias=self.balancing == "loss_free",
        )

    @property
    def part_size(self) -> int:
        """Sequences that are computed at a time."""
        return self.batch_size // self.accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @classmethod
    def for_device(cls, device: torch.device | str) -> TrainConfig:
        """A run of at most a minute: on two CPU cores, or larger on a GPU of the Hopper kind.

        The GPU's steps are few because the default text has 340,000 bytes: more would learn it by heart.
        """
        device = torch.device(device)
        if device.type != "cuda":
            return cls(device=str(device))
        return cls(
            steps=600,
            batch_size=8,
            context=512,
            model_dim=512,
            hidden_dim=256,
            num_layers=4,
            num_heads=8,
            num_experts=32,
            top_k=4,
            learning_rate=1e-3,
            device=str(device),
            dtype="bf16",
            log_every=20,
            eval_every=100,
            checkpoint_every=300,
        )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 1, 2, ..., steps."""
        warmup = round(self.warmup_share * self.steps)
        if step <= warmup:
            return self.learning_rate * step / warmup
        progress = (step - warmup) / max(self.steps - warmup, 1)
        floor = self.final_lr_share
        return self.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and AdamW's two moments in float32; activations come on top."""
        block = 4 * self.model_dim**2 + self.num_experts * (self.moe.parameters_per_expert + self.model_dim)
        return 16 * (self.num_layers * block + self.vocab_size * self.model_dim)

    @property
    def flops_per_token(self) -> int:
        """FLOPs that training one token needs, forward and backward: recomputation is not counted.

        Six for each parameter that the token meets in a matrix product (PaLM, arXiv 2204.02311, appendix B), and
        attention to the half of the context that a causal mask leaves on average.
        """
        experts = self.top_k * self.moe.parameters_per_expert + self.num_experts * self.model_dim
        block = 4 * self.model_dim**2 + experts + self.context * self.model_dim
        return 6 * (self.num_layers * block + self.vocab_size * self.model_dim)

    def check_machine(self) -> None:
        """ValueError where the device is missing, or its memory is smaller than `state_bytes`."""
        device = torch.device(self.device)
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if (device.index or 0) >= count:
                raise ValueError(f"device={self.device!r}: PyTorch sees {count} NVIDIA GPUs here; use device='cpu'")
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.state_bytes > memory:
            raise ValueError(
                f"training needs {self.state_bytes / 2**30:.1f} GiB for parameters and optimiser, "
                f"{self.device} has {memory / 2**30:.1f} GiB; lower num_experts={self.num_experts}, "
                f"hidden_dim={self.hidden_dim} or model_dim={self.model_dim}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `from_json` takes them."""
        return {**asdict(self), "data": [str(path) for path in self.data]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; ValueError for fields of another version."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"fields differ from this version's: {', '.join(sorted(set(values) ^ names))}")
        return cls(**{**values, "data": tuple(values["data"])})

    def difference(self, other: TrainConfig) -> str | None:
        """The first field that keeps a run of `other` from continuing as this one; None if it can."""
        for field in fields(self):
            if field.name not in RESUMABLE_CHANGES and getattr(self, field.name) != getattr(other, field.name):
                return field.name
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_unicode(text: str) -> bool:
    """Whether it is text: an argument that is not UTF-8 reaches Python with bytes for characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
