"""The run and the folder that the tests of training share."""

from __future__ import annotations

from pathlib import Path

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
