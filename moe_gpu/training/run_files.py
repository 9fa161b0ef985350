"""What a run leaves beside its checkpoints: configuration, rows, expert loads, tokenizer, samples, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_gpu.extras import require
from moe_gpu.files import write_atomically
from moe_gpu.machine import describe_machine
from moe_gpu.results import Row, TrainingRow, write_rows
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.config_file import CONFIG_FILE
from moe_gpu.training.expert_load import EXPERT_LOAD_FILE, ExpertLoads, LoadMetrics
from moe_gpu.training.tokenizer import Tokenizer

RESULTS_FILE = "training.jsonl"
SAMPLES_FILE = "samples.jsonl"
TOKENIZER_FILE = "tokenizer.json"
TENSORBOARD_FOLDER = "tensorboard"


class RunFiles:
    """Writes into one folder; each file whole or not at all, TensorBoard's events appended."""

    def __init__(self, directory: Path, config: TrainConfig, tokenizer: Tokenizer, first_step: int) -> None:
        self.directory = directory
        self._machine = describe_machine(torch.device(config.device))
        self._events: Any = None
        if config.tensorboard:
            require("tensorboard", "metrics", "tensorboard=true needs")
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / TENSORBOARD_FOLDER), purge_step=first_step)
        for name in (CONFIG_FILE, EXPERT_LOAD_FILE, RESULTS_FILE, SAMPLES_FILE, TOKENIZER_FILE):
            for half in directory.glob(f".{name}.*"):  # of a process that was killed while it wrote
                half.unlink(missing_ok=True)
        write_atomically(directory / CONFIG_FILE, (json.dumps(config.to_json(), indent=1) + "\n").encode())
        content = tokenizer.to_json()
        if content is not None:
            write_atomically(directory / TOKENIZER_FILE, content.encode("utf-8"))

    def row(self, row: TrainingRow, metrics: LoadMetrics) -> None:
        """One logged step as TensorBoard scalars; by layer only what does not grow with the experts."""
        if self._events is None:
            return
        names = {
            "loss/train": row.loss,
            "loss/held_out": row.eval_loss,
            "loss/held_out_bits_per_byte": row.eval_bits_per_byte,
            "loss/load_balancing": row.load_balancing_loss,
            "loss/router_z": row.router_z_loss,
            "step/learning_rate": row.learning_rate,
            "step/grad_norm": row.grad_norm,
            "speed/tokens_per_s": row.tokens_per_s,
            "speed/mfu": row.mfu,
        }
        for layer, dead in enumerate(metrics.dead):
            place = f"experts/layer_{layer:02d}"
            names[f"{place}/max_share"] = metrics.max_share[layer]
            names[f"{place}/entropy"] = None if metrics.entropy is None else metrics.entropy[layer]
            names[f"{place}/active_share"] = metrics.active[layer]
            names[f"{place}/dead"] = dead
        for name, value in names.items():
            if value is not None:  # what was not measured is left out
                self._events.add_scalar(name, value, row.step)
        self._events.flush()

    def sample(self, samples: list[dict[str, Any]]) -> None:
        """All samples so far; the newest goes to TensorBoard too."""
        write_atomically(self.directory / SAMPLES_FILE, "".join(f"{json.dumps(one)}\n" for one in samples).encode())
        if self._events is not None:
            newest = samples[-1]
            self._events.add_text("sample", f"{newest['prompt']}{newest['text']}", newest["step"])

    def results(self, rows: Sequence[Row], loads: ExpertLoads) -> None:
        """Rows for plots and reports, and the whole load of every expert."""
        loads.save(self.directory / EXPERT_LOAD_FILE)
        write_rows(self.directory / RESULTS_FILE, [self._machine, *rows])

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
