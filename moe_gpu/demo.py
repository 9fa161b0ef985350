"""The whole path on one machine: train on real text, record its routing, benchmark layers with it, draw, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark import MoEBenchmark, run_benchmarks
from moe_gpu.benchmark.suite import choose_device
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.console import progress_bar
from moe_gpu.files import writable_directory
from moe_gpu.plots import require_matplotlib
from moe_gpu.plots.data import compare, gaps, tabulate
from moe_gpu.profiler import RoutingTrace
from moe_gpu.results import ExpertLoadRow, Row, write_rows
from moe_gpu.runs import REPORT_FILE, RESULTS_FILE, draw_files, train_with_progress, training_config
from moe_gpu.training import TrainConfig, record_trace

TRACE_FILE = "routing_trace.safetensors"
MODEL_FOLDER = "model"
TRACE_TOKENS = 32768
ROUTINGS = ("trace", "uniform", "zipf-1.2")
BOTH_PASSES = ("forward", "forward+backward")


def run_demo(
    output_dir: str | Path,
    *,
    device: str | None = None,
    data: Sequence[str | Path] = (),
    seed: int = 0,
    quick: bool = False,
    publish: bool = False,
) -> dict[str, Any]:
    """Train, record, benchmark, draw and report into `output_dir`; returns what was reached and where it lies.

    Under three minutes on two CPU cores (small shapes) and on an H200 (real ones); `quick` is a fraction of that.
    `publish` lets `moe-gpu top` watch the training.
    Raises ValueError for data, a device or a folder that will not do; MissingExtraError without matplotlib.
    """
    require_matplotlib()
    config = demo_config(device, data, seed, quick)
    chosen = choose_device(config.device)
    directory = writable_directory(output_dir)
    kind = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU (no GPU is used: small shapes)"
    print(f"moe-gpu demo on {kind}, everything goes to {directory}", flush=True)

    print(
        f"1/4 Training a language model: {config.num_layers} layers, {config.num_experts} experts, top {config.top_k}"
    )
    result = train_with_progress(config, directory / MODEL_FOLDER, publish=publish)
    print(f"    held-out loss {result.eval_loss:.3f} nats a byte after {config.steps} steps on {result.text.source}")

    print("2/4 Recording which experts the held-out text chooses")
    trace = record_trace(result.model, result.text.held_out, TRACE_TOKENS, f"held-out text of {result.text.source}")
    trace.save(directory / TRACE_FILE)
    num_tokens = trace.topk_ids_LTK.shape[1]
    loads = [
        ExpertLoadRow("held-out trace", layer, 0, num_tokens, counts)
        for layer, counts in enumerate(trace.counts_LE().tolist())
    ]

    print("3/4 Benchmarking layers with that routing, even and skewed routing, against every installed peer")
    benchmarks = demo_benchmarks(chosen, config.moe, trace, seed, quick)
    with progress_bar("benchmark") as progress:
        rows = [*run_benchmarks(benchmarks, progress), *result.rows, *loads]
    write_rows(directory / RESULTS_FILE, rows)

    print("4/4 Drawing", flush=True)
    figures = draw_files(rows, directory)
    print_summary(rows)
    print(f"Open {(directory / REPORT_FILE).resolve()}")
    print(f"Every figure stands in {directory / RESULTS_FILE}; the routing in {directory / TRACE_FILE}.")
    return {
        "device": kind,
        "held_out_loss_nats_per_byte": result.eval_loss,
        "files": [str(path) for path in (directory / RESULTS_FILE, directory / TRACE_FILE, *figures)],
    }


def print_summary(rows: Sequence[Row]) -> None:
    """One line for each layer, routing, pass and size: moe_gpu, the plain loop, and the fastest other provider."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Median ms of a call", title_justify="left")
    for name in ("layer", "routing", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "moe_gpu", "torch_loop"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fastest other", overflow="fold")
    results = tabulate(rows)
    for point in compare(results):
        facet, other = point.facet, point.rival
        table.add_row(
            facet.model if facet.model in PRESETS else f"{facet.model}, E={facet.num_experts}",
            facet.routing,
            {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}[facet.mode],
            str(point.num_tokens),
            f"{point.ours.p50_ms:.3f}",
            f"{point.baseline.p50_ms:.3f}" if point.baseline else "not measured",
            f"{other.p50_ms:.3f} {other.provider}" if other else "not measured",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for line in dict.fromkeys(f"not measured: {gap.provider}: {gap.why}" for gap in gaps(results)):
        console.print(line, markup=False)


def demo_config(device: str | None, data: Sequence[str | Path], seed: int, quick: bool) -> TrainConfig:
    """The training that suits the device; `quick` takes a tenth of the steps."""
    config = training_config(device, data=tuple(data), seed=seed)
    if quick:
        config = replace(config, steps=config.steps // 10, eval_every=config.steps // 10, eval_batches=2)
    return config


def demo_benchmarks(
    device: torch.device, trained: MoEConfig, trace: RoutingTrace, seed: int, quick: bool
) -> list[MoEBenchmark]:
    """The trained layer under its own routing, a sweep over experts, and real models' layers as far as they fit."""
    on_gpu = device.type == "cuda"
    common: dict[str, Any] = dict(device=device, seed=seed, num_iterations=20 if on_gpu else 10, row_budget_s=0.25)

    def layer(config: MoEConfig, model: str, batch_sizes: tuple[int, ...], **options: Any) -> MoEBenchmark:
        return MoEBenchmark(config=config, model=model, batch_sizes=batch_sizes, **common, **options)

    def with_trace(batch_sizes: tuple[int, ...], **options: Any) -> MoEBenchmark:
        return layer(trained, "trained", batch_sizes, routings=ROUTINGS, trace=trace, **options)

    if quick:
        return [with_trace((256,))]
    sweep = [trained.with_(num_experts=trained.num_experts * factor) for factor in (2, 4)]
    if not on_gpu:
        return [
            with_trace((64, 256, 1024), modes=BOTH_PASSES),
            *(layer(config, "trained", (256,)) for config in sweep),
            layer(PRESETS["small"], "small", (64, 256)),
        ]
    qwen3, olmoe = PRESETS["qwen3-30b-a3b"], PRESETS["olmoe-1b-7b"]
    skews = ("uniform", "zipf-1.2")
    return [
        with_trace((64, 1024, 8192), modes=BOTH_PASSES),
        *(layer(config, "trained", (1024,)) for config in sweep),
        layer(qwen3, "qwen3-30b-a3b", (1, 8, 64, 256), launches=("eager", "graph")),
        layer(qwen3, "qwen3-30b-a3b", (4096,), routings=skews, modes=BOTH_PASSES),
        layer(olmoe, "olmoe-1b-7b", (64, 1024, 16384), routings=skews),
    ]
