"""What the commands do: benchmark, train and draw, each into a folder proved writable before the work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark import MoEBenchmark, run_full_benchmark, run_quick_benchmark
from moe_gpu.benchmark.problem import parse_dtype
from moe_gpu.benchmark.suite import choose_device
from moe_gpu.benchmark.table import print_rows
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.console import progress_bar
from moe_gpu.energy import energy_plan, print_energy
from moe_gpu.plots import FIGURES, draw_training, require_matplotlib
from moe_gpu.profiler import RoutingTrace
from moe_gpu.report import write_report
from moe_gpu.results import (
    BenchmarkRow,
    Row,
    TrainingRow,
    describe_machine,
    read_rows,
    select,
    writable_directory,
    write_rows,
)
from moe_gpu.training import TrainConfig, TrainResult, train

RESULTS_FILE = "results.jsonl"
TRAINING_FILE = "training.jsonl"
TRAINING_FIGURE = "training_results.png"
REPORT_FILE = "report.html"


def timed(rows: Sequence[Row]) -> bool:
    """Whether any provider was timed."""
    return any(row.status == "ok" for row in select(rows, BenchmarkRow))


def run_bench(
    output_dir: str | Path,
    *,
    preset: str | None = None,
    sizes: Mapping[str, int | None],
    quick: bool = False,
    full: bool = False,
    routings: Sequence[str] | None = None,
    trace: str | Path | None = None,
    energy: bool = False,
    **options: Any,
) -> list[Row]:
    """Benchmark a layer, print the table and write `results.jsonl`.

    preset: `small` by default; sizes (`input_dim`, ...) replace its own. quick, full: the ready-made suites. trace: a
    file, replayed by default where it is given. energy: measure it too; EnergyUnavailableError, before any work, where
    there is none to measure. options: MoEBenchmark's; None leaves its default.
    Raises ValueError before any work for what cannot run.
    """
    if quick and (full or preset):
        raise ValueError(f"--quick chooses its own preset; leave out {'--full' if full else f'--preset {preset}'}")
    chosen = {name: value for name, value in options.items() if value is not None}
    if routings or trace:
        chosen["routings"] = list(routings or ["trace"])
    if trace:
        chosen["trace"] = RoutingTrace.load(trace)
    elif "trace" in chosen.get("routings", ()):
        raise ValueError("--routing trace replays a file; name it with --trace FILE (`moe-gpu demo` records one)")
    attributions = None
    if energy:
        _, chosen["energy"], attributions = energy_plan(
            options.get("device"), seed=chosen.get("seed", 0), trace=chosen.get("trace")
        )
    given = _given(sizes)
    if full:
        presets = [preset] if preset else None
        directory = writable_directory(output_dir)
        with progress_bar("benchmark") as progress:
            rows = run_full_benchmark(presets=presets, on_progress=progress, **given, **chosen)
    elif quick:
        directory = writable_directory(output_dir)
        with progress_bar("benchmark") as progress:
            rows = run_quick_benchmark(on_progress=progress, **given, **chosen)
    else:
        name, config = _named_config(preset or "small", given)
        benchmark = MoEBenchmark(config=config, model=name, **chosen)
        directory = writable_directory(output_dir)
        with progress_bar("benchmark") as progress:
            benchmark.on_progress = progress
            rows = benchmark.run_comparison()
    if attributions is not None:
        rows += attributions.rows
    write_rows(directory / RESULTS_FILE, rows)
    print_rows(rows)
    if attributions is not None:
        print_energy(rows)
        for remark in attributions.remarks:
            print(remark)
    print(f"results: {directory / RESULTS_FILE}")
    return rows


def run_explain(
    *,
    preset: str | None = None,
    sizes: Mapping[str, int | None],
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    sm_budget: int | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Print which kernel and tile serves each product of a layer, and return it; nothing is run.

    device: `cpu`, `cuda`, or the name of a GPU that need not be present; by default the GPU if there is one.
    Raises ValueError for a GPU that is not known, or `cuda` where there is none.
    """
    from moe_gpu.explain import described_gpu, explain_layer, present_gpu, print_explanations
    from moe_gpu.triton_kernels.ops import choose_backend

    name, config = _named_config(preset or "small", _given(sizes))
    torch_dtype = parse_dtype(dtype or "bf16")
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        reason = choose_backend("cpu").reason
        print(f'every step: plain PyTorch ({reason}); describe a GPU with --device "NVIDIA H200"')
        return [{"step": "layer", "path": "reference", "why": reason}]
    gpu = present_gpu() if device in (None, "cuda") else described_gpu(device)
    steps = []
    for count in tokens or (4096,):
        explanations = explain_layer(gpu, config, count, torch_dtype, sm_budget)
        print_explanations(gpu, f"{name} {dtype or 'bf16'}, T={count}", explanations)
        steps += [{"device": gpu.name, "model": name, "num_tokens": count, **e.to_dict()} for e in explanations]
    return steps


def _given(sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """The sizes that are not None; a given input width is the output's too unless that is given."""
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if "input_dim" in given:
        given.setdefault("expert_dim", given["input_dim"])
    return given


def _named_config(preset: str, sizes: Mapping[str, Any]) -> tuple[str, MoEConfig]:
    """A preset with some sizes changed, and its name: `custom` where that makes it another layer."""
    config = PRESETS[preset].with_(**sizes)
    return (preset if config == PRESETS[preset] else "custom"), config


def training_config(device: str | None, **changes: Any) -> TrainConfig:
    """The run that suits the device, with the changes that are not None."""
    config = TrainConfig.for_device(choose_device(device))
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def run_training(output_dir: str | Path, config: TrainConfig, *, resume: bool = False) -> list[Row]:
    """Train; leave the checkpoint, `training.jsonl` and, where matplotlib is installed, `training_results.png`."""
    directory = writable_directory(output_dir)
    result = train_with_progress(config, directory, resume=resume)
    rows: list[Row] = [describe_machine(choose_device(config.device)), *result.rows]
    write_rows(directory / TRAINING_FILE, rows)
    print(f"held-out loss: {result.eval_loss:.3f} nats a byte on {result.text.source}")
    print(f"results: {directory / TRAINING_FILE}\ncheckpoint: {result.checkpoint}")
    print(f"figure: {draw_training(rows, directory / TRAINING_FIGURE)}")
    return rows


def train_with_progress(config: TrainConfig, directory: Path, *, resume: bool = False) -> TrainResult:
    """`train` under a progress bar that shows the newest loss."""
    with progress_bar("training") as progress:

        def on_step(step: int, row: TrainingRow | None) -> None:
            progress(step, config.steps, "" if row is None else f"loss {row.loss:.3f}")

        return train(config, directory, resume=resume, on_step=on_step)


def draw_files(rows: Sequence[Row], directory: Path) -> list[Path]:
    """The six figures, `training_results.png` where there was a training, and `report.html`; returns their paths."""
    figures = dict(FIGURES)
    if select(rows, TrainingRow):
        figures[TRAINING_FIGURE] = draw_training
    written = []
    with progress_bar("figures") as progress:
        for done, (name, draw) in enumerate(figures.items()):
            progress(done, len(figures) + 1, name)
            written.append(draw(rows, directory / name))
        progress(len(figures), len(figures) + 1, REPORT_FILE)
        written.append(write_report(rows, directory / REPORT_FILE))
        progress(len(figures) + 1, len(figures) + 1, "")
    return written


def write_outputs(results: Sequence[str | Path], output_dir: str | Path) -> list[Path]:
    """Figures and report of recorded results, read whole before anything is written."""
    rows = [row for path in results for row in read_rows(path)]
    require_matplotlib()
    written = draw_files(rows, writable_directory(output_dir))
    print("\n".join(str(path) for path in written))
    return written
