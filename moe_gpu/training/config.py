"""TrainConfig: everything that decides a training run, validated on construction."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moe_gpu.config import MoEConfig

BALANCING = ("aux", "loss_free", "none")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB_SIZE = 256  # tokens are bytes

_AT_LEAST_ONE = (
    "steps",
    "batch_size",
    "context",
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
)
_NOT_NEGATIVE = ("weight_decay", "balance_coefficient", "z_loss_coefficient")

# A resumed run may change how long it is, what it reports and where it computes; the text is compared by its digest.
RESUMABLE_CHANGES = frozenset(
    {"steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "device", "dtype", "use_triton", "data"}
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run; ValueError names a value that cannot be, its limit and the remedy.

    context: bytes of a sequence. hidden_dim: each expert's intermediate width.
    learning_rate rises over the first `warmup_share` of the steps, then falls by a cosine to its `final_lr_share`.
    balancing: `aux` (Switch's loss times balance_coefficient), `loss_free` (a selection bias moved by
        balance_coefficient a step) or `none`. z_loss_coefficient weighs the router's z-loss.
    dtype: of the matrix products; parameters stay float32, bf16 is autocast.
    use_triton: False computes the experts in plain PyTorch on any device.
    log_every, eval_every, checkpoint_every: steps between rows, evaluations (`eval_batches` each) and checkpoints; the
        first step is logged too, and the last one does all three.
    data: text files; empty for the English prose that ships with Python.
    """

    steps: int = 300
    batch_size: int = 16
    context: int = 96
    model_dim: int = 128
    hidden_dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
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
    log_every: int = 10
    eval_every: int = 50
    eval_batches: int = 8
    checkpoint_every: int = 100
    data: tuple[str | Path, ...] = ()

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        for name in (*_NOT_NEGATIVE, "learning_rate", "grad_clip"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in _NOT_NEGATIVE):
                limit = "0 or more" if name in _NOT_NEGATIVE else "above 0"
                raise ValueError(f"{name}={value!r} must be a finite number {limit}")
        for name in ("warmup_share", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be between 0 and 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be an integer between 0 and 2**63 - 1")
        if self.balancing not in BALANCING:
            raise ValueError(f"balancing={self.balancing!r} is not one of {', '.join(BALANCING)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(f"model_dim={self.model_dim} is not a multiple of 2 * num_heads={2 * self.num_heads}")
        if isinstance(self.data, str | Path) or not all(isinstance(path, str | Path) for path in self.data):
            raise ValueError(f"data={self.data!r} must be a tuple of paths")
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = None
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} is not one of cpu, cuda, cuda:N")
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
        return 16 * (self.num_layers * block + VOCAB_SIZE * self.model_dim)

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
