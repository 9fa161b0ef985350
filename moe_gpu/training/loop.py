"""The training loop: steps that never wait for the device, rows at log points, checkpoints, Ctrl-C, resume."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moe_gpu.files import sole_writer, writable_directory
from moe_gpu.live.publisher import Publisher
from moe_gpu.live.publisher import publish as publish_model
from moe_gpu.live.status import Progress
from moe_gpu.reference import update_selection_bias
from moe_gpu.results import ExpertLoadRow, TrainingRow
from moe_gpu.training.checkpoint import (
    Checkpoint,
    Saved,
    check_resumable,
    index_path,
    load_checkpoint,
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_checkpoint,
    to_keep,
)
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.expert_load import ExpertLoads, LoadMetrics
from moe_gpu.training.language_model import MoELanguageModel
from moe_gpu.training.run_files import RunFiles
from moe_gpu.training.sampling import generate
from moe_gpu.training.text import Text, load_text
from moe_gpu.training.tokenizer import Tokenizer, build_tokenizer
from moe_gpu.training.utilisation import model_flops_utilisation, peak_memory_bytes

OnStep = Callable[[int, TrainingRow | None], None]
"""`on_step(step, row)` after every step; `row` is the newest logged one."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run. rows: TrainingRows, then ExpertLoadRows, those from before a resume included.

    eval_loss: nats a token on the held-out text. elapsed_s: training time of the whole run, without evaluations,
    samples and checkpoints. checkpoint: path of the last one's JSON. samples: what samples.jsonl holds.
    """

    config: TrainConfig
    rows: list[TrainingRow | ExpertLoadRow]
    model: MoELanguageModel
    text: Text
    checkpoint: Path
    eval_loss: float
    elapsed_s: float
    samples: list[dict[str, Any]]


def next_token_loss(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, nats a token; 0-dim, differentiable."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten())


@torch.no_grad()
def evaluate(model: MoELanguageModel, text: Text) -> float:
    """Mean loss on the held-out text, nats a token, over up to `eval_batches` batches; always the same ones."""
    config = model.config
    limit = config.eval_batches * config.accumulation_steps
    losses, sizes = [], []
    with model.unprofiled():
        for inputs, targets in text.held_out_batches(config.part_size, config.context, limit):
            losses.append(next_token_loss(model(inputs)[0], targets))
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
        self.elapsed_s = 0.0  # of training alone: evaluation, samples and checkpoints stand still
        self.rows: list[TrainingRow] = []
        self.loads = ExpertLoads([], [], [])
        self.metrics: LoadMetrics | None = None  # of the newest logged window
        self.samples: list[dict[str, Any]] = []
        self.eval_loss: float | None = None
        self.saved: list[Saved] = []
        self._evaluated_step: int | None = None
        self._start_window()

    @property
    def row(self) -> TrainingRow | None:
        """The newest logged row of losses."""
        return self.rows[-1] if self.rows else None

    def compute_gradients(self) -> torch.Tensor:
        """Add the next step's gradients to the parameters, one part of its batch after another, and move the bias.

        Returns the loss, the load-balancing loss and the z-loss, means over the parts. The gradient is that of the
        whole batch at once, but for `aux` balancing, whose loss is each part's own.
        """
        config = self.config
        inputs, targets = self.text.batch(self.step + 1, config.batch_size, config.context, config.seed)
        parts, demands = [], []
        for part_inputs, part_targets in zip(
            inputs.split(config.part_size), targets.split(config.part_size), strict=True
        ):
            logits, stats = self.model(part_inputs)
            loss = next_token_loss(logits, part_targets)
            balance = torch.stack([layer.load_balancing_loss for layer in stats]).mean()
            z_loss = torch.stack([layer.router_z_loss for layer in stats]).mean()
            objective = loss
            if config.balancing == "aux":
                objective = objective + config.balance_coefficient * balance
            if config.z_loss_coefficient:
                objective = objective + config.z_loss_coefficient * z_loss
            (objective / config.accumulation_steps).backward()
            parts.append(torch.stack([loss.detach(), balance.detach(), z_loss.detach()]))
            demands.append(torch.stack([layer.routing.demand_E for layer in stats]))
        if config.balancing == "loss_free":
            demand_LE = torch.stack(demands).sum(0)
            for layer, demand_E in zip(self.model.moe_layers, demand_LE, strict=True):
                assert layer.selection_bias_E is not None, "config.moe asks for it"
                update_selection_bias(layer.selection_bias_E, demand_E, config.balance_coefficient)
        return torch.stack(parts).mean(0)

    def advance(self) -> None:
        """One optimiser step; reads nothing from the device."""
        config, step = self.config, self.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.compute_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        self.optimizer.step()
        self._logged.append(torch.cat([losses, norm.detach().view(1)]))
        self.step = step

    def log(self, with_eval: bool = False) -> None:
        """Wait for the device, then add the row of the steps since the last one. ValueError for a loss of NaN."""
        config, profiler = self.config, self.model.profiler
        profiler.flush()
        loss, balance, z_loss, norm = torch.stack(self._logged).double().mean(0).tolist()
        window_s = time.perf_counter() - self._window_began
        self.elapsed_s += window_s
        self._check_finite(loss, "loss")
        self._check_finite(norm, "the gradient's norm")
        if with_eval:
            self.eval_loss, self._evaluated_step = evaluate(self.model, self.text), self.step
            self._check_finite(self.eval_loss, "held-out loss")
        counts_LE = profiler.counts_LE()
        assert counts_LE is not None, "flush() reads the counter"
        window_LE = counts_LE - self._counted_LE
        tokens = len(self._logged) * config.tokens_per_step
        self.loads.add(self.step, tokens, window_LE)
        self.metrics = metrics = LoadMetrics.of(window_LE)
        entropy, eval_loss = metrics.entropy, self.eval_loss if with_eval else None
        self.rows.append(
            TrainingRow(
                run=self.RUN,
                step=self.step,
                loss=loss,
                tokens_seen=self.step * config.tokens_per_step,
                elapsed_s=self.elapsed_s,
                tokens_per_s=tokens / window_s,
                eval_loss=eval_loss,
                learning_rate=config.learning_rate_at(self.step),
                load_balancing_loss=balance,
                max_expert_share=max(metrics.max_share),
                normalised_entropy=None if entropy is None else sum(entropy) / len(entropy),
                backend=self.model.backend,
                eval_bits_per_byte=None if eval_loss is None else self.text.bits_per_byte(eval_loss),
                router_z_loss=z_loss,
                grad_norm=norm,
                active_expert_share=min(metrics.active),
                dead_experts=metrics.dead,
                mfu=model_flops_utilisation(config, tokens / window_s),
                peak_memory_bytes=peak_memory_bytes(config),
            )
        )
        self._start_window(counts_LE)

    def _check_finite(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            rate = self.config.learning_rate
            raise ValueError(f"{name} is {value} at step {self.step}: learning_rate={rate} is too high; lower it")

    def _start_window(self, counted_LE: torch.Tensor | None = None) -> None:
        config = self.config
        if counted_LE is None:
            counted_LE = torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64)
        self._counted_LE = counted_LE
        self._logged: list[torch.Tensor] = []
        self._window_began = time.perf_counter()

    def sample(self) -> None:
        """Generate text from the prompt; call it right after `log`, whose clock it then sets again."""
        config = self.config
        seed = (config.seed + self.step) % 2**63
        text = generate(self.model, self.text.tokenizer, config.sample_prompt, config.sample_tokens, seed=seed)
        self.samples.append({"step": self.step, "prompt": config.sample_prompt, "text": text})
        self._window_began = time.perf_counter()

    def result_rows(self) -> list[TrainingRow | ExpertLoadRow]:
        return [*self.rows, *self.loads.rows(self.RUN)]

    def save(self, directory: Path) -> bool:
        """Log what is not logged yet and write a checkpoint; False, and nothing, if this step has one."""
        if self.saved and self.saved[-1].step == self.step:
            return False
        if self._logged:
            self.log()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in optimizer_tensors(self.model, self.optimizer).items():
            tensors[f"optimizer.{name}"] = tensor
        eval_loss = self.eval_loss if self._evaluated_step == self.step else None
        kept = to_keep([*self.saved, Saved(self.step, eval_loss)], self.config.keep_checkpoints)
        checkpoint = Checkpoint(
            self.config,
            self.step,
            self.elapsed_s,
            self.text.sha256,
            self.rows,
            tensors,
            self.loads,
            self.text.tokenizer.to_json(),
            kept,
            self.samples,
        )
        self.checkpoint = save_checkpoint(directory, checkpoint)
        self.saved = kept
        self._window_began = time.perf_counter()
        return True

    def restore(self, checkpoint: Checkpoint, directory: Path) -> None:
        """Become the run that a folder's checkpoint holds. CheckpointError names what does not fit."""
        check_resumable(checkpoint, directory, self.config, self.text.sha256)
        load_state(self.model, checkpoint.model_state(), directory)
        load_optimizer(self.model, self.optimizer, checkpoint.optimizer_state(), directory)
        self.step = checkpoint.step
        self.saved = [one for one in checkpoint.kept if index_path(directory, one.step).exists()]
        self.checkpoint = index_path(directory, self.step)
        self.elapsed_s, self.rows = checkpoint.elapsed_s, list(checkpoint.rows)
        self.loads, self.samples = checkpoint.loads, list(checkpoint.samples)
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


@contextmanager
def deterministic_algorithms(config: TrainConfig) -> Iterator[None]:
    """With `config.deterministic`, PyTorch refuses operations that are not repeatable; its setting is put back after.

    cuBLAS needs CUBLAS_WORKSPACE_CONFIG for that before its first product; it is set where it is missing.
    """
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def train(
    config: TrainConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    publish: bool = False,
) -> TrainResult:
    """Train as `config` says into `output_dir`; `resume` goes on from the newest whole checkpoint that is there.

    A resumed run on the CPU ends bitwise equal to an uninterrupted one. Ctrl-C, or KeyboardInterrupt out of `on_step`,
    writes a checkpoint between two steps and raises KeyboardInterrupt with its step and folder. `publish` lets
    `moe-gpu top` watch it.
    Raises ValueError in one line for data, a device or a checkpoint that will not do, or while another run writes to
    the folder, before anything is written.
    """
    directory = Path(output_dir)
    config.check_machine()
    checkpoint = load_checkpoint(directory) if resume else None

    def make_tokenizer(training_text: bytes) -> Tokenizer:
        return checkpoint.build_tokenizer() if checkpoint else build_tokenizer(config, training_text)

    text = load_text(config.data, config.device, config.context, make_tokenizer)
    writable_directory(directory)  # known before the model is made, and not there when the data will not do
    with sole_writer(directory):
        trainer = Trainer(config, text)
        if checkpoint:
            trainer.restore(checkpoint, directory)
            del checkpoint  # its tensors are in the trainer now
        return _run(trainer, directory, on_step, publish)


def _run(trainer: Trainer, directory: Path, on_step: OnStep | None, publish: bool) -> TrainResult:
    config, text = trainer.config, trainer.text
    if text.train.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(text.train.device)
    files = RunFiles(directory, config, text.tokenizer, trainer.step + 1)
    watched = publish_trainer(trainer) if publish else nullcontext()
    with deferred_interrupt() as pressed, deterministic_algorithms(config), closing(files), watched:
        while trainer.step < config.steps:
            trainer.advance()
            _report(trainer, files)
            if _asked_to_stop(trainer, on_step) or pressed():
                _save(trainer, files)
                raise KeyboardInterrupt(
                    f"interrupted at step {trainer.step} of {config.steps}; "
                    f"the checkpoint is in {directory}, resume from there"
                )
        eval_loss = trainer.eval_loss if trainer.eval_loss is not None else evaluate(trainer.model, text)
    rows, path = trainer.result_rows(), trainer.checkpoint
    files.results(rows, trainer.loads)  # again: a kill may have come between the last checkpoint and its rows
    return TrainResult(config, rows, trainer.model, text, path, eval_loss, trainer.elapsed_s, trainer.samples)


def publish_trainer(trainer: Trainer) -> Publisher:
    """Let `moe-gpu top` watch a training: loads, step, newest logged loss and speed."""

    def progress() -> Progress:
        row = trainer.row
        loss, speed = (None, None) if row is None else (row.loss, row.tokens_per_s)
        return Progress(trainer.step, trainer.config.steps, loss, speed)

    return publish_model(trainer.model, name="moe-gpu train", progress=progress)


def _report(trainer: Trainer, files: RunFiles) -> None:
    """What is due after a step: a row with or without evaluation, a sample, a checkpoint."""
    config, step = trainer.config, trainer.step
    last = step == config.steps
    to_save = last or step % config.checkpoint_every == 0
    with_eval = to_save or step % config.eval_every == 0
    with_sample = config.sample_every > 0 and step % config.sample_every == 0
    if with_eval or with_sample or step % config.log_every == 0 or step == 1:
        trainer.log(with_eval)
        assert trainer.metrics is not None, "log() has just found them"
        files.row(trainer.rows[-1], trainer.metrics)
    if with_sample:
        trainer.sample()
        files.sample(trainer.samples)
    if to_save:
        _save(trainer, files)


def _save(trainer: Trainer, files: RunFiles) -> None:
    if trainer.save(files.directory):
        files.results(trainer.result_rows(), trainer.loads)


def _asked_to_stop(trainer: Trainer, on_step: OnStep | None) -> bool:
    """Report the step; True if the report was answered with KeyboardInterrupt."""
    if on_step is not None:
        try:
            on_step(trainer.step, trainer.row)
        except KeyboardInterrupt:
            return True
    return False
