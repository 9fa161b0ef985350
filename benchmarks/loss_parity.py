"""Train the small language model with the Triton kernels and with the plain reference, over three seeds, and compare.

    python benchmarks/loss_parity.py benchmarks/results/loss_parity.jsonl [--steps 300] [--device cuda]

Both see the same text, batches and initial weights. The kernels pass if, at each logged step, the mean loss over the
seeds differs from the reference's by no more than a change of seed makes of the reference. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from moe_gpu.files import writable_directory
from moe_gpu.machine import describe_machine
from moe_gpu.results import TrainingRow, write_rows
from moe_gpu.training import TrainConfig, train

SEEDS = (0, 1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare loss curves of the two backends.", allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    writable_directory(arguments.output.parent)
    curves: dict[tuple[bool, int], list[TrainingRow]] = {}
    dtype = "bf16" if arguments.device.startswith("cuda") else "fp32"
    for use_triton in (False, True):
        for seed in SEEDS:
            config = TrainConfig(
                steps=arguments.steps, seed=seed, device=arguments.device, dtype=dtype, use_triton=use_triton
            )
            with tempfile.TemporaryDirectory() as folder:
                result = train(config, folder)
            name = f"{'triton' if use_triton else 'reference'}, seed {seed}"
            rows = [row for row in result.rows if isinstance(row, TrainingRow)]
            curves[use_triton, seed] = [replace(row, run=name) for row in rows]
            last = rows[-1]
            if use_triton and last.backend != "triton":
                parser.exit(2, f"{parser.prog}: error: {arguments.device} has no Triton backend: nothing to compare\n")
            print(f"{name}: loss {last.loss:.4f}, held out {result.eval_loss:.4f}, {last.backend}", flush=True)
    machine = describe_machine(result.model.embedding.weight.device)
    write_rows(arguments.output, [machine, *(row for rows in curves.values() for row in rows)])
    outside, beyond = [], []
    for index, row in enumerate(curves[False, SEEDS[0]]):
        reference, triton = ([curves[backend, seed][index].loss for seed in SEEDS] for backend in (False, True))
        difference = (sum(triton) - sum(reference)) / len(SEEDS)
        spread = max(reference) - min(reference)
        print(f"step {row.step:5}: difference of means {difference:+.4f}, the reference's spread {spread:.4f}")
        if abs(difference) > spread:
            outside.append(row.step)
        if not min(reference) <= sum(triton) / len(SEEDS) <= max(reference):
            beyond.append(row.step)
    print(f"means differ by more than the spread at {outside or 'no step'}")
    print(f"mean beyond the reference's lowest or highest at {beyond or 'no step'}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
