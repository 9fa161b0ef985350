"""Record what the layer must reach on an H200: `python benchmarks/run_h200.py benchmarks/results/h200.jsonl`.

bf16, uniform routing, forward and forward+backward: Qwen3-30B-A3B at 1 to 16384 tokens, Mixtral-8x7B at 8192 and
OLMoE-1B-7B at 32768; Qwen3 also as a CUDA graph up to 256 tokens. Rows are written after each part, so that an
interrupted run keeps what it has. `--quick` runs tiny layers instead, anywhere, to try the script.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moe_gpu.benchmark import MoEBenchmark
from moe_gpu.benchmark.table import baseline_times, case_of, untimed
from moe_gpu.benchmark.timing import attempt, measure_ceilings
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.machine import describe_machine
from moe_gpu.results import BenchmarkRow, Row, select, write_rows

LOOP, TRANSFORMERS, OURS = "torch_loop", "transformers_grouped_mm", "moe_gpu"
LOOP_GOAL, TRANSFORMERS_GOAL = 3.0, 1.0
LOOP_GOAL_MODELS = ("qwen3-30b-a3b", "olmoe-1b-7b")
PASSES = ("forward", "forward+backward")


def parts(quick: bool) -> list[MoEBenchmark]:
    """The benchmarks of the run; captures come last, whatever state a failed one may leave."""

    def part(model: str, sizes: tuple[int, ...], modes: tuple[str, ...] = PASSES, launches=("eager",)) -> MoEBenchmark:
        config = MoEConfig(64, 64, 32, 16, 4, router=PRESETS[model].router) if quick else PRESETS[model]
        return MoEBenchmark(
            config=config,
            model=model,
            batch_sizes=tuple(min(size, 64) for size in sizes[:2]) if quick else sizes,
            dtype="bf16",
            modes=modes,
            launches=launches,
            num_iterations=5 if quick else 50,
            row_budget_s=0.1 if quick else 0.7,
        )

    qwen = "qwen3-30b-a3b"
    return [
        part(qwen, (1, 8, 64, 512, 4096, 16384)),
        part("mixtral-8x7b", (8192,)),
        part("olmoe-1b-7b", (32768,)),
        part(qwen, (256,), ("forward",)),
        part(qwen, (1, 8, 64, 256), ("forward",), ("graph",)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Record the H200 results.", allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--quick", action="store_true", help="tiny layers, on any machine: a trial of the script")
    arguments = parser.parse_args()
    begin = time.monotonic()
    if arguments.output.is_dir() or not os.access(arguments.output.parent, os.W_OK):
        parser.exit(2, f"{parser.prog}: error: cannot write {arguments.output}; name a file in a writable folder\n")
    try:
        benchmarks = parts(arguments.quick)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    device = benchmarks[0].device
    rows: list[Row] = [describe_machine(device)]
    ceilings = attempt(lambda: measure_ceilings(device, benchmarks[0].dtype))
    if ceilings.reason is not None:
        print(f"ceilings not measured: {ceilings.reason}", flush=True)
    rows += ceilings.value or []
    for benchmark in benchmarks:

        def progress(done: int, total: int, text: str) -> None:
            print(f"{time.monotonic() - begin:6.1f} s  {done}/{total} {text}", flush=True)

        outcome = attempt(functools.partial(benchmark.measure, ceilings.value or [], progress))
        if outcome.reason is not None:
            print(f"{benchmark.model}: {outcome.reason}", flush=True)
        rows += outcome.value or []
        write_rows(arguments.output, rows)
    print_summary(select(rows, BenchmarkRow))
    for line in untimed(rows):
        print(line)
    print(f"{time.monotonic() - begin:.0f} s; results: {arguments.output}")
    return 0


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours


def print_summary(rows: Sequence[BenchmarkRow]) -> None:
    """Our time against the two goals' by case, what the launches cost, and whether the goals hold."""
    loop, peer, ours = (baseline_times(rows, name) for name in (LOOP, TRANSFORMERS, OURS))
    cases = {case_of(row): row for row in rows if row.launch == "eager"}
    print(f"\n{'eager, median ms':42} {OURS:>10} {LOOP:>12} {'ratio':>7} {TRANSFORMERS:>24} {'ratio':>7}")
    misses: list[str] = []
    unknown: list[str] = []
    for case, row in cases.items():
        name = f"{row.model} T={row.num_tokens} {row.mode}"
        to_loop = _ratio(loop.get(case), ours.get(case))
        to_peer = _ratio(peer.get(case), ours.get(case))
        times = [_ms(values.get(case)) for values in (ours, loop, peer)]
        ratios = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in (to_loop, to_peer)]
        print(f"{name:42} {times[0]:>10} {times[1]:>12} {ratios[0]:>7} {times[2]:>24} {ratios[1]:>7}")
        goals = [(TRANSFORMERS, to_peer, TRANSFORMERS_GOAL)]
        if row.model in LOOP_GOAL_MODELS:
            goals.append((LOOP, to_loop, LOOP_GOAL))
        for provider, ratio, goal in goals:
            if ratio is None:
                unknown.append(f"{name} against {provider}")
            elif ratio < goal:
                misses.append(f"{name}: {ratio:.2f}x {provider}, wanted {goal:g}x")
    print_launches(rows)
    print(f"\ngoals: at least {LOOP_GOAL:g}x {LOOP} on {', '.join(LOOP_GOAL_MODELS)}; not slower than {TRANSFORMERS}")
    for text in misses:
        print(f"  missed: {text}")
    for text in unknown:
        print(f"  not measured: {text}")
    if not misses:
        print("  every goal that was measured holds" if unknown else "  all hold")


def print_launches(rows: Sequence[BenchmarkRow]) -> None:
    """Eager against graph by case and provider: the difference is what launching costs."""
    graphs = [row for row in rows if row.launch == "graph" and row.p50_ms is not None]
    if not graphs:
        print("\nCUDA graphs: not measured")
        return
    print(f"\n{'launches, median ms':42} {'provider':24} {'eager':>9} {'graph':>9} {'overhead us':>12}")
    for row in graphs:
        eager = baseline_times(rows, row.provider).get(case_of(row))
        overhead = "-" if eager is None or row.p50_ms is None else f"{1000 * (eager - row.p50_ms):.1f}"
        name = f"{row.model} T={row.num_tokens} {row.mode}"
        print(f"{name:42} {row.provider:24} {_ms(eager):>9} {_ms(row.p50_ms):>9} {overhead:>12}")


if __name__ == "__main__":
    sys.exit(main())
