"""The run and the folder that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_gpu.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = TrainConfig(
    steps=20,
    batch_size=4,
    context=32,
    model_dim=32,
    hidden_dim=32,
    num_heads=2,
    num_experts=4,
    learning_rate=1e-2,
    log_every=5,
    eval_every=10,
    eval_batches=2,
    checkpoint_every=10,
)
SMALL_FIELDS = (
    "batch_size=4",
    "context=32",
    "model_dim=32",
    "hidden_dim=32",
    "num_layers=1",
    "num_heads=2",
    "num_experts=4",
    "eval_batches=1",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Small products are faster on one thread, and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupt_at(step):
    def on_step(done, row):
        if done == step:
            raise KeyboardInterrupt

    return on_step


def write_book(path: Path) -> Path:
    """A text that BPE finds pairs in, with characters of two to four bytes."""
    path.write_text("".join(f"Line {n}: the naïve café — 数 🎲 — has {n * n} seats.\r\n" for n in range(400)), "utf-8")
    return path
