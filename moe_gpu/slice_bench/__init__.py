"""`moe-gpu slices bench`: what slices do on this GPU, measured; leaves the costs that ADAPTIVE plans by.

Tables: `partition` (which SMs blocks really ran on, also in a replayed graph), `rate` (GEMM and copy against SMs),
`launch` (a launch and a graph replay in a green context), `cost` (experts on some SMs), `interference` (latency beside
a neighbour's copies or products), `isolation` (a decode step beside background work, by each means of keeping them
apart), `profiler` (what ExpertProfiler adds to a layer in a graph) and `adaptive` (every policy over a load that
shifts, planned by the costs of this run or of an earlier one). Times are the caller's: host clock around work
and a wait for its stream. A section that fails is a row that says why, and the next goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_gpu.config import PRESETS
from moe_gpu.console import progress_bar
from moe_gpu.profiler import RoutingTrace
from moe_gpu.results import Row, SliceRow
from moe_gpu.slice_bench.bench import Sizes, SliceBench
from moe_gpu.slice_bench.tables import SECTIONS
from moe_gpu.slices.costs import cache_path
from moe_gpu.triton_kernels.ops import choose_backend


def why_not() -> str | None:
    """Why this machine cannot measure slices, in one line; None where it can."""
    if not torch.cuda.is_available():
        return "slices are measured on a GPU, and this machine has none; see `moe-gpu doctor`"
    backend = choose_backend("cuda", torch.cuda.current_device())
    return None if backend.name == "triton" else f"slices are measured with the Triton kernels: {backend.reason}"


def run_slice_bench(
    preset: str = "qwen3-30b-a3b",
    *,
    seconds: float = 480.0,
    output: Path | None = None,
    tables: Sequence[str] | None = None,
    trial: bool = False,
    trace: Path | None = None,
    layer: int = 0,
    tokens: int = 256,
) -> list[Row]:
    """Measure the tables, print a summary, and keep the costs for ADAPTIVE; returns the rows.

    trace: a routing trace that `adaptive` replays as well: this layer, cut into calls of so many tokens.
    trial: only try the program, with tiny work and on any machine: its rows hold no numbers, and no costs are kept.
    Raises ValueError for a file that cannot be written or on a machine that cannot measure.
    """
    reason = None if trial else why_not()
    if reason:
        raise ValueError(reason)
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}; make it or choose another file")
    recorded = None if trace is None else RoutingTrace.load(trace)
    if recorded is not None:
        check_trace(recorded, preset, layer)
    device = torch.device("cpu") if trial else torch.device("cuda", torch.cuda.current_device())
    bench = SliceBench(preset, Sizes.tiny() if trial else Sizes(), device, seconds, output)
    if recorded is not None:
        bench.trace = (recorded, layer, tokens)
    chosen = [name for name in SECTIONS if not tables or name in tables]
    with progress_bar("slices") as progress:
        for done, name in enumerate(chosen):
            progress(done, len(chosen), name)
            bench.section(name, SECTIONS[name])
        progress(len(chosen), len(chosen), "")
    if bench.costs is not None and not trial:
        bench.costs.save(cache_path(bench.machine.device))
        print(f"costs: {cache_path(bench.machine.device)}")
    print_summary(bench.rows)
    if output is not None:
        print(f"results: {output}")
    return bench.rows


def check_trace(trace: RoutingTrace, preset: str, layer: int) -> None:
    """Raise ValueError unless the trace has this layer and the preset's experts."""
    if not 0 <= layer < trace.num_layers:
        raise ValueError(f"layer={layer} is outside the trace's {trace.num_layers} layers")
    if trace.num_experts != PRESETS[preset].num_experts:
        raise ValueError(
            f"the trace has {trace.num_experts} experts, {preset} has {PRESETS[preset].num_experts}; "
            "choose the --preset that it was recorded with"
        )


def print_summary(rows: Sequence[Row]) -> None:
    """A line for each row but the many costs, and each failure with its reason."""
    for row in rows:
        if not isinstance(row, SliceRow) or (row.table == "cost" and row.unit is None and row.status == "ok"):
            continue
        got = "" if row.got_sms is None else f" {row.got_sms} SMs"
        head = f"{row.table:12} {row.arm + got:22} {row.what:30}"
        if row.status != "ok":
            print(f"{head} {row.status}: {row.reason}")
            continue
        facts = [f"p50 {row.p50_ms:.4f} ms"] if row.p50_ms is not None else []
        facts += [f"p99 {row.p99_ms:.4f} ms"] if row.p99_ms is not None else []
        facts += [f"{row.value:.4g} {row.unit}"] if row.value is not None else []
        print(f"{head} {', '.join(facts)}")
