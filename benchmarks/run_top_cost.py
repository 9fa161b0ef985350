"""What publishing costs a job: `python benchmarks/run_top_cost.py benchmarks/results/h200_top_cost.jsonl`.

MoE layers of a preset run forward steps, by turns with and without `publish`; rows say how much slower the published
turns are (with a 95 % interval over pairs of turns) and the share of one core that the publishing thread took. The
goal is under 1 %. `--trial` runs a small layer briefly, on any device: its figure holds for nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from moe_gpu import PRESETS, AdvancedMoELayer, ExpertProfiler, publish
from moe_gpu.machine import describe_machine
from moe_gpu.results import Finding, Row, write_rows

GOAL_PCT = 1.0
T95 = {7: 2.365, 11: 2.201, 15: 2.131, 19: 2.093}  # Student's t by degrees of freedom


def steps_per_s(model: torch.nn.ModuleList, x: torch.Tensor, seconds: float) -> float:
    """Steps of a turn of about so many seconds; the device is waited for at both ends alone."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for layer in model:
            layer(x)
        steps += 1
        if x.is_cuda and steps % 64 == 0:  # so that the launches do not run ahead of the clock
            wait()
    wait()
    return steps / (time.perf_counter() - begin)


@torch.no_grad()
def measure(preset: str, layers: int, tokens: int, pairs: int, seconds: float, interval_s: float) -> list[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = PRESETS[preset]
    profiler = ExpertProfiler(config.num_experts, layers)
    with device:  # initialising on the host would take longer than the measurement
        layers_of = [
            AdvancedMoELayer.from_config(config, profiler=profiler, layer_index=index).to(dtype)
            for index in range(layers)
        ]
    model = torch.nn.ModuleList(layers_of)
    model.eval()  # as served: calls are replayed as graphs
    x = torch.randn(tokens, config.input_dim, device=device, dtype=dtype)
    steps_per_s(model, x, seconds)  # compile, tune and warm up
    slower, cores = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(pairs):
            rates = {}
            for published in (False, True) if pair % 2 else (True, False):
                if published:
                    publisher = publish(model, Path(folder) / "live.json", interval_s)
                rates[published] = steps_per_s(model, x, seconds)
                if published:
                    publisher.close()
                    cost = publisher.status.cost
                    if cost is not None:
                        cores.append(100 * cost.cpu_s / cost.seconds)
            slower.append(100 * (1 - rates[True] / rates[False]))
    mean, spread = statistics.mean(slower), T95[pairs - 1] * statistics.stdev(slower) / pairs**0.5
    how = f"{layers} layers of {preset}, {tokens} tokens, {pairs} pairs of {seconds:g} s, every {interval_s:g} s"
    verdict = "met" if mean + spread < GOAL_PCT else "missed" if mean - spread > GOAL_PCT else "inconclusive"
    return [
        describe_machine(device),
        Finding("publishing slows a job", mean, "%", mean - spread, mean + spread, pairs, verdict, how),
        Finding("publishing thread", statistics.mean(cores), "% of one core", samples=len(cores), how=how),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, choices=[degrees + 1 for degrees in T95], default=12)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two writes")
    parser.add_argument("--trial", action="store_true", help="a small layer, briefly: only tries the script")
    options = parser.parse_args()
    if options.trial:
        options.preset, options.layers, options.pairs, options.seconds, options.interval = "small", 2, 8, 0.5, 0.2
    rows = measure(options.preset, options.layers, options.tokens, options.pairs, options.seconds, options.interval)
    write_rows(options.output, rows)
    for row in rows:
        if isinstance(row, Finding):
            interval = "" if row.low is None else f" (95 % {row.low:.2f} to {row.high:.2f})"
            print(f"{row.name}: {row.value:.3f} {row.unit}{interval} {row.verdict or ''}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
