"""What `moe-gpu profile` does: the load of every expert in a recorded trace, or in a short training run here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark.suite import choose_device
from moe_gpu.console import SHADES, progress_bar, shade
from moe_gpu.extras import MissingExtraError
from moe_gpu.files import writable_directory
from moe_gpu.machine import describe_machine
from moe_gpu.plots import FIGURES, require_matplotlib
from moe_gpu.profiler import PADDING_TILES, ExpertProfiler, ExpertSnapshot, RoutingTrace
from moe_gpu.results import ExpertLoadRow, Row, write_rows
from moe_gpu.runs import training_config
from moe_gpu.training import TrainConfig
from moe_gpu.training.loop import Trainer
from moe_gpu.training.text import load_text

LOADS_FILE = "expert_load.jsonl"
FIGURE = "expert_utilization_heatmap.png"
_CELLS = 96  # widest heatmap of a terminal


def run_profile(
    output_dir: str | Path,
    *,
    trace: str | Path | None = None,
    tokens: int = 256,
    steps: int = 20,
    windows: int = 32,
    layer: int | None = None,
    tile: int = 64,
    device: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Profile a trace, or `steps` training steps of the small language model; print, write and return the figures.

    tokens: of a call, into which a trace is cut. windows: columns of the heatmap over time. layer: the one drawn over
    time, by default the most uneven. Writes `expert_load.jsonl` and, with matplotlib, the heatmap as PNG.
    Raises ValueError for a trace, a layer or a folder that will not do, before anything is written.
    """
    if tile not in PADDING_TILES:
        raise ValueError(f"tile={tile} is not one of {', '.join(map(str, PADDING_TILES))}, the heights counted")
    if trace is not None:
        loaded = RoutingTrace.load(trace)
        directory = _checked(output_dir, layer, loaded.num_layers, f"trace of {loaded.source}")
        snapshots = [loaded.snapshot(tokens, number) for number in range(loaded.num_layers)]
        over_time = _trace_windows(loaded, tokens, windows)
        source, num_tokens = f"trace of {loaded.source}", loaded.topk_ids_LTK.shape[1] // max(1, len(over_time))
        where, top_k = torch.device("cpu"), loaded.top_k
    else:
        config = training_config(device, steps=steps, seed=seed)
        where = choose_device(config.device)
        directory = _checked(output_dir, layer, config.num_layers, f"{steps} training steps")
        profiler = _train(config, steps, windows)
        found = [profiler.snapshot(number) for number in range(profiler.num_layers)]
        snapshots = [snapshot for snapshot in found if snapshot is not None]
        over_time = _joined([window.counts_LE for window in profiler.history() if window.counts_LE.any()], windows)
        source, top_k = f"{steps} training steps", config.top_k
        num_tokens = sum(snapshots[0].counts_E) // top_k // max(1, len(over_time))
    shown = layer if layer is not None else max(snapshots, key=lambda item: item.max_over_mean or 0.0).layer
    print_profile(snapshots, over_time, shown, tile, source)
    rows: list[Row] = [describe_machine(where)]
    for window, counts_LE in enumerate(over_time):
        rows += [
            ExpertLoadRow(source, number, window, num_tokens, counts)
            for number, counts in enumerate(counts_LE.tolist())
        ]
    write_rows(directory / LOADS_FILE, rows)
    print(f"loads: {directory / LOADS_FILE}")
    try:
        require_matplotlib()
        print(f"figure: {FIGURES[FIGURE](rows, directory / FIGURE)}")
    except MissingExtraError as error:
        print(f"no figure: {error}")
    return [_figures(snapshot, source) for snapshot in snapshots]


def _checked(output_dir: str | Path, layer: int | None, num_layers: int, source: str) -> Path:
    """The folder to write to, made if need be, once the layer is known to be one of the source's."""
    if layer is not None and not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} is outside the {num_layers} layers of the {source}")
    return writable_directory(output_dir)


def _figures(snapshot: ExpertSnapshot, source: str) -> dict[str, Any]:
    return {"source": source, **asdict(snapshot)}


def _train(config: TrainConfig, steps: int, windows: int) -> ExpertProfiler:
    """The profiler of a short run whose model is then thrown away, read about `windows` times between steps."""
    config.check_machine()
    trainer = Trainer(config, load_text(config.data, config.device, config.context))
    profiler = trainer.model.profiler
    profiler.copy_interval_s = profiler.window_s = float("inf")
    with progress_bar("training") as progress:
        for step in range(steps):
            trainer.advance()
            progress(step + 1, steps, "")
            if step == 0 or (step * windows) // steps != ((step + 1) * windows) // steps:
                profiler.flush()
    return profiler


def _trace_windows(trace: RoutingTrace, tokens: int, windows: int) -> list[torch.Tensor]:
    return _joined(list(trace.calls_LCE(tokens).unbind(1)), windows)


def _joined(counts: Sequence[torch.Tensor], windows: int) -> list[torch.Tensor]:
    """Consecutive counts added up into at most `windows` windows of about the same length."""
    count = min(windows, len(counts))
    ends = [len(counts) * (number + 1) // count for number in range(count)]
    return [
        torch.stack(list(counts[begin:end])).sum(0)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        if end > begin
    ]


def print_profile(
    snapshots: Sequence[ExpertSnapshot], over_time: Sequence[torch.Tensor], layer: int, tile: int, source: str
) -> None:
    """A line of figures for each layer, the load of all experts, and one layer's experts over time."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"Expert load: {source}", title_justify="left")
    for name in ("layer", "active", "max/mean", "entropy", "peak rows", f"padding, {tile}", "routes/s", "invalid"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name in ("hot", "cold"):
        grid.add_column(name, overflow="ellipsis", no_wrap=True)
    for one in snapshots:
        rate = None if one.tokens_per_s_E is None else sum(one.tokens_per_s_E)
        padding = one.padding_ratio(tile)
        grid.add_row(
            str(one.layer),
            _number(one.active_experts),
            _number(one.max_over_mean, ".2f"),
            _number(one.normalised_entropy, ".3f"),
            _number(one.peak_rows),
            _number(padding, ".1%"),
            _number(rate, ",.0f"),
            str(one.invalid_routes),
            ", ".join(map(str, one.hot)) or "none",
            ", ".join(map(str, one.cold)) or "none",
        )
    console.print(grid)
    console.print("layers by experts, whole window:")
    for one in snapshots:
        _print_line(console, f"{one.layer:>6} ", one.share_E)
    console.print(f"layer {layer}, experts by time:")
    for expert in range(len(over_time[0][layer]) if over_time else 0):
        columns = [_share(counts_LE[layer], expert) for counts_LE in over_time]
        _print_line(console, f"{expert:>6} ", columns, even=1 / len(over_time[0][layer]))
    limits = ", ".join(f"{mark} to {limit:g}x" for limit, mark, _ in SHADES[1:-1])
    console.print(f"share over an even one: · none, {limits}, █ above", markup=False)


def _share(counts_E: torch.Tensor, expert: int) -> float | None:
    total = int(counts_E.sum())
    return int(counts_E[expert]) / total if total else None


def _print_line(console: Any, head: str, shares: Sequence[float | None] | None, even: float | None = None) -> None:
    from rich.text import Text

    line = Text(head)
    if shares is None:
        line.append("not measured", style="dim")
        shares = []
    even = even or 1 / max(1, len(shares))
    step = -(-len(shares) // _CELLS)
    for begin in range(0, len(shares), max(1, step)):
        known = [share for share in shares[begin : begin + step] if share is not None]
        if not known:
            line.append(" ")
            continue
        load = max(known) / even  # a cell of several experts shows the busiest
        line.append(*shade(load))
    console.print(line)


def _number(value: float | None, form: str = "d") -> str:
    return "-" if value is None else format(value, form)
