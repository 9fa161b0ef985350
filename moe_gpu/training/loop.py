"""The training loop: steps that never wait for the device, rows at log points, checkpoints, Ctrl-C, resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from moe_gpu.results import ExpertLoadRow, TrainingRow, writable_directory
from moe_gpu.training.checkpoint import (
    INDEX,
    TRAIN_ROWS,
    Checkpoint,
    check_resumable,
    load_checkpoint,
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_checkpoint,
)
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.language_model import MoELanguageModel
from moe_gpu.training.text import Text, load_text

OnStep = Callable[[int, TrainingRow | None], None]
"""`on_step(step, row)` after every step; `row` is the newest logged one."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run. rows: TrainingRow and ExpertLoadRow in order, those from before a resume included.

    eval_loss: nats a byte on the held-out text. elapsed_s: training time of the whole run, without evaluations and
    checkpoints. checkpoint: path of its JSON.
    """

    config: TrainConfig
    rows: list[TRAIN_ROWS]
    model: MoELanguageModel
    text: Text
    checkpoint: Path
    eval_loss: float
    elapsed_s: float


def next_byte_loss(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, nats a byte; 0-dim, differentiable."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten())


@torch.no_grad()
def evaluate(model: MoELanguageModel, text: Text) -> float:
    """Mean loss on the held-out text, nats a byte, over up to `eval_batches` batches; always the same ones."""
    config = model.config
    losses, sizes = [], []
    with model.unprofiled():
        for inputs, targets in text.held_out_batches(config.batch_size, config.context, config.eval_batches):
            losses.append(next_byte_loss(model(inputs)[0], targets))
            sizes.append(targets.numel())
    weights = torch.tensor(sizes, dtype=torch.float64)
    return float((torch.stack(losses).double().cpu() * weights).sum() / weights.sum())


class Trainer:
    """Model, optimiser and what has been logged: the state of a run after `step` steps."""

    RUN = "training"

    def __init__(self, config: TrainConfig, text: Text) -> None:
        self.config, self.text = config, text
        self.model = MoELanguageModel(config)
        self.optimizer = _adamw(self.model, config)
        self.step = 0
        self.elapsed_s = 0.0  # of training alone: evaluation and checkpoints stand still
        self.rows: list[TRAIN_ROWS] = []
        self.eval_loss: float | None = None
        self._saved_step: int | None = None
        self._start_window()

    @property
    def row(self) -> TrainingRow | None:
        """The newest logged row of losses."""
        return next((row for row in reversed(self.rows) if isinstance(row, TrainingRow)), None)

    def advance(self) -> None:
        """One optimiser step; reads nothing from the device."""
        config, step = self.config, self.step + 1
        inputs, targets = self.text.batch(step, config.batch_size, config.context, config.seed)
        logits, stats = self.model(inputs)
        loss = next_byte_loss(logits, targets)
        balance = torch.stack([layer.load_balancing_loss for layer in stats]).mean()
        objective = loss
        if config.balancing == "aux":
            objective = objective + config.balance_coefficient * balance
        if config.z_loss_coefficient:
            z_loss = torch.stack([layer.router_z_loss for layer in stats]).mean()
            objective = objective + config.z_loss_coefficient * z_loss
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        self.optimizer.step()
        if config.balancing == "loss_free":
            for layer, layer_stats in zip(self.model.moe_layers, stats, strict=True):
                layer.update_selection_bias(layer_stats, config.balance_coefficient)
        self._losses.append(torch.stack([loss.detach(), balance.detach()]))
        self.step = step

    def log(self, with_eval: bool = False) -> None:
        """Wait for the device, then add the rows of the steps since the last log. ValueError for a loss of NaN."""
        config, profiler = self.config, self.model.profiler
        profiler.flush()
        loss, balance = torch.stack(self._losses).double().mean(0).tolist()
        window_s = time.perf_counter() - self._window_began
        self.elapsed_s += window_s
        if not math.isfinite(loss):
            raise ValueError(
                f"loss is {loss} at step {self.step}: learning_rate={config.learning_rate} is too high; lower it"
            )
        if with_eval:
            self.eval_loss = evaluate(self.model, self.text)
        counts_LE = profiler.counts_LE()
        assert counts_LE is not None, "flush() reads the counter"
        window_LE = (counts_LE - self._counted_LE).double()
        shares = window_LE / window_LE.sum(1, keepdim=True)
        entropy = torch.special.entr(shares).sum(1) / math.log(config.num_experts) if config.num_experts > 1 else None
        steps, tokens = len(self._losses), config.batch_size * config.context
        self.rows.append(
            TrainingRow(
                run=self.RUN,
                step=self.step,
                loss=loss,
                tokens_seen=self.step * tokens,
                elapsed_s=self.elapsed_s,
                tokens_per_s=steps * tokens / window_s,
                eval_loss=self.eval_loss if with_eval else None,
                learning_rate=config.learning_rate_at(self.step),
                load_balancing_loss=balance,
                max_expert_share=shares.max().item(),
                normalised_entropy=None if entropy is None else entropy.mean().item(),
                backend=self.model.backend,
            )
        )
        window = sum(isinstance(row, TrainingRow) for row in self.rows) - 1
        for layer, counts_E in enumerate(window_LE.long().tolist()):
            self.rows.append(ExpertLoadRow(self.RUN, layer, window, steps * tokens, counts_E))
        self._start_window(counts_LE)

    def _start_window(self, counted_LE: torch.Tensor | None = None) -> None:
        config = self.config
        if counted_LE is None:
            counted_LE = torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64)
        self._counted_LE = counted_LE
        self._losses: list[torch.Tensor] = []
        self._window_began = time.perf_counter()

    def save(self, directory: Path) -> None:
        """Log what is not logged yet and write a checkpoint, unless this step has one."""
        if self._saved_step == self.step:
            return
        if self._losses:
            self.log()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in optimizer_tensors(self.model, self.optimizer).items():
            tensors[f"optimizer.{name}"] = tensor
        checkpoint = Checkpoint(self.config, self.step, self.elapsed_s, self.text.sha256, self.rows, tensors)
        save_checkpoint(directory, checkpoint)
        self._saved_step = self.step
        self._window_began = time.perf_counter()

    def restore(self, directory: Path) -> None:
        """Become the run that a folder's checkpoint holds. CheckpointError names what does not fit."""
        checkpoint = load_checkpoint(directory)
        check_resumable(checkpoint, directory, self.config, self.text.sha256)
        load_state(self.model, checkpoint.model_state(), directory)
        load_optimizer(self.model, self.optimizer, checkpoint.optimizer_state(), directory)
        self.step = self._saved_step = checkpoint.step
        self.elapsed_s, self.rows = checkpoint.elapsed_s, list(checkpoint.rows)
        self._start_window()


def _adamw(model: MoELanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """Weight decay on matrices alone: not on norms, nor on the embedding, whose rare rows would only shrink."""
    matrix = {name: p.dim() >= 2 and p is not model.embedding.weight for name, p in model.named_parameters()}
    decayed = [p for name, p in model.named_parameters() if matrix[name]]
    plain = [p for name, p in model.named_parameters() if not matrix[name]]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields `pressed()`: the first Ctrl-C is noted, to be served between two steps; a second stops at once.

    Outside the main thread, or where the program handles Ctrl-C itself, nothing is changed.
    """
    count = 0

    def note(signum: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def train(
    config: TrainConfig, output_dir: str | Path, *, resume: bool = False, on_step: OnStep | None = None
) -> TrainResult:
    """Train as `config` says, with checkpoints in `output_dir`; `resume` goes on from the one that is there.

    A resumed run on the CPU ends bitwise equal to an uninterrupted one. Ctrl-C, or KeyboardInterrupt out of `on_step`,
    writes a checkpoint between two steps and raises KeyboardInterrupt with its step and folder.
    Raises ValueError in one line for data, a device or a checkpoint that will not do, before anything is written.
    """
    directory = Path(output_dir)
    config.check_machine()
    text = load_text(config.data, config.device, config.context)
    trainer = Trainer(config, text)
    if resume:
        trainer.restore(directory)
    writable_directory(directory)  # known before the first step, not at the first checkpoint
    with deferred_interrupt() as pressed:
        while trainer.step < config.steps:
            trainer.advance()
            last = trainer.step == config.steps
            with_eval = last or trainer.step % config.eval_every == 0
            if with_eval or trainer.step % config.log_every == 0 or trainer.step == 1:
                trainer.log(with_eval)
            if last or trainer.step % config.checkpoint_every == 0:
                trainer.save(directory)
            if _asked_to_stop(trainer, on_step) or pressed():
                trainer.save(directory)
                raise KeyboardInterrupt(
                    f"interrupted at step {trainer.step} of {config.steps}; "
                    f"the checkpoint is in {directory}, resume from there"
                )
    eval_loss = trainer.eval_loss if trainer.eval_loss is not None else evaluate(trainer.model, text)
    return TrainResult(config, trainer.rows, trainer.model, text, directory / INDEX, eval_loss, trainer.elapsed_s)


def _asked_to_stop(trainer: Trainer, on_step: OnStep | None) -> bool:
    """Report the step; True if the report was answered with KeyboardInterrupt."""
    if on_step is not None:
        try:
            on_step(trainer.step, trainer.row)
        except KeyboardInterrupt:
            return True
    return False
