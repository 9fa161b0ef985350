"""The routing of real text where no trace of a model's experts and top-k lies at hand: train a small one, record it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from moe_gpu.config import MoEConfig
from moe_gpu.profiler import RoutingTrace
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.language_model import record_trace
from moe_gpu.training.loop import train


def record_text_trace(config: MoEConfig, layers: int, steps: int, tokens: int, device: torch.device) -> RoutingTrace:
    """How a byte model with so many layers and the experts and top-k of `config` routes held-out text after `steps`.

    It is trained on the text that ships with Python, and the first `tokens` of what it never saw are recorded.
    """
    config = replace(
        TrainConfig.for_device(device),
        num_layers=layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        steps=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder))
    source = f"held-out text, byte model of {config.num_experts} experts after {config.steps} steps"
    return record_trace(result.model, result.text.held_out, tokens, source)
