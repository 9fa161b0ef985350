"""Record what slices do on an H200: `python benchmarks/run_slices.py benchmarks/results/h200_slices.jsonl`.

Device tables (rates and launches against SMs, which SMs blocks really ran on), isolation of a decode step beside
background work with p50, p99 and the background's rate, interference, the profiler's cost in a graph, the costs that
ADAPTIVE plans by, and every policy over a load that shifts. Under ten minutes; a section that fails is recorded and the
next goes on. `--trial` runs tiny work on the CPU instead, to try the script: its rows hold no numbers. `--table` runs
some sections only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_gpu.results import SliceRow
from moe_gpu.slice_bench import SECTIONS, run_slice_bench, why_not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--table", action="append", choices=sorted(SECTIONS), help="run this one; all without it")
    parser.add_argument("--seconds", type=float, default=480.0, help="when to begin no further section")
    parser.add_argument("--trial", action="store_true", help="tiny work on the CPU: only tries the script")
    arguments = parser.parse_args()
    reason = None if arguments.trial else why_not()
    if reason:
        parser.exit(1, f"{parser.prog}: {reason}\n")
    rows = run_slice_bench(
        seconds=arguments.seconds, output=arguments.output, tables=arguments.table, trial=arguments.trial
    )
    statuses = [row.status for row in rows if isinstance(row, SliceRow)]
    return 1 if "failed" in statuses or not statuses else 0


if __name__ == "__main__":
    sys.exit(main())
