"""Record what training reaches on one GPU: `python benchmarks/run_training.py FILE.jsonl [--quick]`, under 10 minutes.

Four sections, each on its own; one that fails is recorded as failed and the next goes on. `speed`: tokens a second, MFU
and memory of the built-in GPU run and of a larger model. `memory`: the larger model with parts and with recomputation.
`resume`: a deterministic run, interrupted and resumed, against an uninterrupted one, bit by bit. `bpe`: a BPE run in
bits a byte beside bytes. Loss against the reference backend is benchmarks/loss_parity.py's. `--quick` takes sizes that
a CPU can do, to try the script: nothing of it speaks of a GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moe_gpu.benchmark.timing import attempt
from moe_gpu.files import writable_directory
from moe_gpu.machine import describe_machine
from moe_gpu.results import BenchmarkRow, Row, TrainingRow, select, write_rows
from moe_gpu.training import TrainConfig, load_checkpoint, train

LARGE = {"model_dim": 1024, "hidden_dim": 768, "num_layers": 4, "num_heads": 16, "num_experts": 32, "top_k": 8}
LARGE |= {"context": 1024, "batch_size": 32, "accumulation_steps": 4, "steps": 20, "learning_rate": 3e-4}
TINY = {"model_dim": 32, "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "top_k": 2}
TINY |= {"context": 32, "batch_size": 4, "accumulation_steps": 4, "steps": 20}
RARELY = {"log_every": 5, "eval_every": 1000, "eval_batches": 2, "checkpoint_every": 1000}


class Recorder:
    """Rows so far, written after every section."""

    def __init__(self, path: Path, device: str, quick: bool) -> None:
        self.path, self.device, self.quick = path, device, quick
        self.rows: list[Row] = [describe_machine(torch.device(device))]
        self.summary: list[str] = []

    @property
    def large(self) -> TrainConfig:
        sizes = TINY if self.quick else LARGE
        return TrainConfig(**{**sizes, **RARELY}, device=self.device, dtype="bf16")

    @property
    def built_in(self) -> TrainConfig:
        if self.quick:
            return replace(self.large, accumulation_steps=1)
        return TrainConfig.for_device(self.device)

    def run(self, name: str, config: TrainConfig, directory: str | Path | None = None) -> TrainingRow:
        """Train, keep the rows under `name` and add a line to the table; the last row."""
        with tempfile.TemporaryDirectory() as folder:
            result = train(config, directory or folder)
        rows = [replace(row, run=name) for row in select(result.rows, TrainingRow)]
        self.rows += rows
        last = rows[-1]
        mfu = "not measured" if last.mfu is None else f"{last.mfu:.1%}"
        memory = "not measured" if last.peak_memory_bytes is None else f"{last.peak_memory_bytes / 2**30:.2f} GiB"
        bits = f"{result.text.bits_per_byte(result.eval_loss):.3f}"
        self.summary.append(f"{name:34} {last.tokens_per_s:12,.0f} {mfu:>14} {memory:>14} {bits:>10}  {last.backend}")
        del result
        return last

    def outcome(self, name: str, status: str, reason: str | None) -> None:
        """A section's end as a row that is never taken for a time."""
        c = self.large
        shape = (c.tokens_per_step, c.model_dim, c.hidden_dim, c.model_dim, c.num_experts, c.top_k)
        self.rows.append(
            BenchmarkRow(
                "moe_gpu", status, f"training: {name}", *shape, c.dtype, "text", "training", scope="run", reason=reason
            )
        )
        self.summary.append(f"{name}: {status}{f', {reason}' if reason else ''}")
        write_rows(self.path, self.rows)


def speed(recorder: Recorder) -> None:
    recorder.run("built-in run", recorder.built_in)
    recorder.run("larger model", recorder.large)


def memory(recorder: Recorder) -> None:
    config = replace(recorder.large, steps=6)
    for parts in (2, 4):
        recorder.run(f"larger model, {parts} parts", replace(config, accumulation_steps=parts))
    recorder.run(
        "larger model, 2 parts, recomputed", replace(config, accumulation_steps=2, gradient_checkpointing=True)
    )


def resume(recorder: Recorder) -> None:
    config = replace(recorder.built_in, steps=20, checkpoint_every=10, log_every=5, deterministic=True)

    def interrupt(step: int, row: TrainingRow | None) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        recorder.run("deterministic, uninterrupted", config, whole)
        try:
            train(config, parts, on_step=interrupt)
        except KeyboardInterrupt:
            train(config, parts, resume=True)
        expected, found = load_checkpoint(whole).tensors, load_checkpoint(parts).tensors
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    if different:
        raise AssertionError(f"{len(different)} of {len(expected)} tensors differ after a resume, first {different[0]}")


def bpe(recorder: Recorder) -> None:
    config = replace(recorder.built_in, eval_every=1000, checkpoint_every=1000)
    recorder.run("bytes", config)
    size = 512 if recorder.quick else 4096
    recorder.run(f"bpe, {size} tokens", replace(config, tokenizer="bpe", vocab_size=size))


SECTIONS: dict[str, Callable[[Recorder], None]] = {"speed": speed, "memory": memory, "resume": resume, "bpe": bpe}


def main() -> int:
    parser = argparse.ArgumentParser(description="Record what training reaches on one GPU.", allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, also on a CPU: tries the script alone")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one (repeat)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.quick:
        parser.exit(2, f"{parser.prog}: error: needs an NVIDIA GPU; give --quick to try the script on a CPU\n")
    writable_directory(arguments.output.parent)
    recorder = Recorder(arguments.output, "cuda" if torch.cuda.is_available() else "cpu", arguments.quick)
    began, failed = time.monotonic(), []
    for name in arguments.section or SECTIONS:
        result = attempt(functools.partial(SECTIONS[name], recorder))
        recorder.outcome(name, "ok" if result.reason is None else "failed", result.reason)
        failed += [] if result.reason is None else [name]
        print(f"{time.monotonic() - began:6.1f} s  {recorder.summary[-1]}", flush=True)
    device = recorder.rows[0].device  # type: ignore[union-attr]
    print(f"\n{device}\n{'run':34} {'tokens/s':>12} {'MFU':>14} {'peak memory':>14} {'bits/byte':>10}  backend")
    print("\n".join(recorder.summary))
    print(f"{time.monotonic() - began:.0f} s; results: {arguments.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
