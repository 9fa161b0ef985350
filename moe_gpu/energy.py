"""What `moe-gpu energy` does: measure a layer, calibrate this GPU, show recorded energy, and watch a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark.measure import Case, EnergyPlan
from moe_gpu.benchmark.problem import parse_dtype, sample_choices
from moe_gpu.benchmark.providers import BASELINE
from moe_gpu.benchmark.suite import MoEBenchmark, choose_device
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.console import progress_bar
from moe_gpu.energy_model import IDLE, EnergyModel, EnergyReport, Workload
from moe_gpu.energy_monitor import EnergyMonitor, EnergyTrials, EnergyUnavailableError, PowerSampler
from moe_gpu.files import writable_directory
from moe_gpu.layer_energy import work_of
from moe_gpu.metrics import EnergyCollector, MetricsServer
from moe_gpu.profiler import RoutingTrace
from moe_gpu.reference import ExpertWeights
from moe_gpu.results import AttributionSum, BenchmarkRow, EnergyMeasurement, Finding, Row, read_rows, select, write_rows
from moe_gpu.triton_kernels.ops import TritonExpertOps

ENERGY_FILE = "energy.jsonl"
OURS = "moe_gpu"
ROWS_PER_EXPERT = (1, 16, 256, 4096)
# Experts of the grouped products that a GPU is calibrated on: Qwen3-30B-A3B's, few enough for 4096 rows on each.
CALIBRATION_LAYER = PRESETS["qwen3-30b-a3b"].with_(num_experts=64)


def open_monitor(device: str | None = None) -> tuple[torch.device, EnergyMonitor]:
    """The GPU to work on, and its monitor; EnergyUnavailableError where the work would not be a GPU's."""
    chosen = choose_device(device)
    if chosen.type != "cuda":
        why = "PyTorch sees no NVIDIA GPU" if device is None else f"device={device!r} is no NVIDIA GPU"
        raise EnergyUnavailableError(f"energy is the GPU's, and {why}; see `moe-gpu doctor`")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    return chosen, EnergyMonitor(torch.device("cuda", index))


def standard_workloads(
    device: torch.device,
    dtype: torch.dtype,
    config: MoEConfig = CALIBRATION_LAYER,
    rows_per_expert: Sequence[int] = ROWS_PER_EXPERT,
    copy_bytes: int = 1 << 30,
    square: int = 2048,
) -> list[Workload]:
    """What a GPU is calibrated on: nothing, a copy through its memory, a product within its L2, and experts.

    The experts' products run over even numbers of rows, as `moe_gpu` serves them. Random data, never zeros, which take
    up to 40 % less.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

    size = dtype.itemsize
    source = normal(copy_bytes // size)
    target = torch.empty_like(source)
    a, b, out = normal(square, square), normal(square, square, std=square**-0.5), normal(square, square)
    c = config
    weights = ExpertWeights(
        normal(c.num_experts, c.up_rows, c.input_dim, std=c.input_dim**-0.5),
        normal(c.num_experts, c.expert_dim, c.hidden_dim, std=c.hidden_dim**-0.5),
    )
    ops = TritonExpertOps(device)
    workloads = [
        Workload(IDLE, None, anchor=True),
        Workload("copy", lambda: target.copy_(source), hbm_bytes=2.0 * source.numel() * size, anchor=True),
        Workload("product in L2", lambda: torch.mm(a, b, out=out), flops=2.0 * square**3, anchor=True),
    ]
    for rows in rows_per_expert:
        num_tokens = max(1, rows * c.num_experts // c.top_k)
        x = normal(num_tokens, c.input_dim)
        even = torch.arange(num_tokens * c.top_k, device=device) % c.num_experts
        routing = ops.sort_routes(even.view(num_tokens, c.top_k).int(), x.new_ones(num_tokens, c.top_k), c.num_experts)

        def call(x: torch.Tensor = x, routing: Any = routing) -> torch.Tensor:
            with torch.no_grad():
                return ops.experts(x, routing, weights, c.activation)

        work = work_of(device, c, num_tokens, dtype)
        counts = torch.bincount(even, minlength=c.num_experts)
        done = work.execute(counts)
        # Without a router the shared part is the combine's alone: rows in, tokens out.
        combine = num_tokens * (c.top_k + 1) * c.expert_dim * size
        workloads.append(
            Workload(f"experts, {rows} rows each", call, float(done.flops_E.sum()), float(done.bytes_E.sum()) + combine)
        )
    return workloads


def run_calibrate(
    *,
    device: str | None = None,
    dtype: str | None = None,
    seconds: float = 5.0,
    trials: int = 4,
    output: str | Path | None = None,
) -> EnergyModel:
    """Calibrate this GPU, keep it where attribution looks for it (or in `output`), and print what came of it."""
    chosen, monitor = open_monitor(device)
    torch_dtype = parse_dtype(dtype or "bf16")
    with monitor, progress_bar("calibrating") as progress:
        workloads = standard_workloads(chosen, torch_dtype)
        model = EnergyModel.calibrate(
            workloads,
            str(torch_dtype).removeprefix("torch."),
            monitor=monitor,
            min_duration_s=seconds,
            trials=trials,
            rest_s=min(0.3, seconds / 10),
            on_trial=progress,
        )
    path = model.save(output)
    print_model(model)
    print(f"calibration: {path}")
    return model


def print_model(model: EnergyModel) -> None:
    """The coefficients with their intervals, and the errors of workloads held out."""
    print(f"{model.gpu_uuid}, driver {model.driver}, {model.dtype}, calibration {model.calibration_id}")
    for name, unit, factor in (
        ("static_w", "W doing nothing", 1.0),
        ("j_per_flop", "pJ a FLOP", 1e12),
        ("j_per_byte", "pJ a byte", 1e12),
    ):
        low, high = (factor * bound for bound in model.intervals[name])
        print(f"  {factor * getattr(model, name):.4g} {unit} (95 % {low:.4g} to {high:.4g})")
    for name, error in model.held_out.items():
        print(f"  held out: {name}: off by {100 * error:.1f} %")


def attribute_trials(
    case: Case, trials: EnergyTrials, model: EnergyModel, device: torch.device, counts: torch.Tensor
) -> EnergyReport:
    """The attribution of all of a case's windows together."""
    total = trials.total()
    work = work_of(device, case.config, case.num_tokens, case.dtype, case.mode)
    return model.attribute(counts, total, work)


class Attributions:
    """Called with what was measured of each case: attributes our layer's, where this GPU is calibrated.

    rows: of all cases so far; remarks: why a case has none. trace: the one that `routing="trace"` replays.
    """

    def __init__(self, device: torch.device, monitor: EnergyMonitor, seed: int, trace: RoutingTrace | None) -> None:
        self.rows: list[Row] = []
        self.remarks: dict[str, None] = {}
        self._device, self._monitor, self._seed, self._trace = device, monitor, seed, trace

    def __call__(self, case: Case, found: Mapping[str, EnergyTrials]) -> None:
        if OURS not in found or not found[OURS].valid:
            return
        c = case.config
        try:
            dtype = str(case.dtype).removeprefix("torch.")
            model = EnergyModel.load(self._monitor.uuid, self._monitor.driver, dtype)
            chance = torch.Generator().manual_seed(self._seed)
            ids = sample_choices(c, case.num_tokens, case.routing, chance, self._trace)
            counts = torch.bincount(ids[ids >= 0], minlength=c.num_experts)
            counts = counts.clamp(max=c.capacity(case.num_tokens) or int(counts.max()))
            self.rows += attribute_trials(case, found[OURS], model, self._device, counts).rows
        except ValueError as error:
            self.remarks[f"not by expert: {error}"] = None


def energy_plan(
    device: str | None,
    seconds: float = 5.0,
    trials: int = 4,
    cooldown_s: float = 0.0,
    seed: int = 0,
    trace: RoutingTrace | None = None,
) -> tuple[torch.device, EnergyPlan, Attributions]:
    """How a benchmark measures energy on a GPU, and what takes it apart by expert meanwhile.

    Raises EnergyUnavailableError where there is none to measure.
    """
    chosen, monitor = open_monitor(device)
    attributions = Attributions(chosen, monitor, seed, trace)
    return chosen, EnergyPlan(monitor, seconds, trials, cooldown_s, attributions), attributions


def run_measure(
    output_dir: str | Path,
    *,
    preset: str | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    providers: Sequence[str] | None = None,
    routing: str | None = None,
    modes: Sequence[str] | None = None,
    seconds: float = 5.0,
    trials: int = 4,
    cooldown_s: float = 0.0,
    device: str | None = None,
    seed: int = 0,
) -> list[Row]:
    """Measure a layer's energy by provider, and by expert where this GPU is calibrated; write `energy.jsonl`.

    Raises EnergyUnavailableError before any work where there is no energy to measure.
    """
    chosen, plan, attributions = energy_plan(device, seconds, trials, cooldown_s, seed)
    directory = writable_directory(output_dir)
    name = preset or "qwen3-30b-a3b"
    with plan.monitor:
        benchmark = MoEBenchmark(
            config=PRESETS[name],
            model=name,
            batch_sizes=tuple(tokens or (8, 64, 1024)),
            dtype=dtype,
            device=chosen,
            routings=(routing or "uniform",),
            modes=tuple(modes or ("forward",)),
            providers=tuple(providers) if providers else (BASELINE, "transformers_grouped_mm", OURS),
            seed=seed,
            num_iterations=10,
            row_budget_s=0.3,
            energy=plan,
        )
        with progress_bar("energy") as progress:
            benchmark.on_progress = progress
            rows = benchmark.run_comparison()
    rows += attributions.rows
    write_rows(directory / ENERGY_FILE, rows)
    print_energy(rows)
    for remark in attributions.remarks:
        print(remark)
    print(f"results: {directory / ENERGY_FILE}")
    return rows


def run_report(files: Sequence[str | Path]) -> list[Row]:
    """Print the energy that results files hold, with intervals; ValueError where they hold none."""
    rows = [row for path in files for row in read_rows(path)]
    kinds = (EnergyMeasurement, AttributionSum, Finding)
    carried = [row for row in select(rows, BenchmarkRow) if row.energy_quality is not None]
    if not carried and not any(isinstance(row, kinds) for row in rows):
        names = ", ".join(str(path) for path in files)
        raise ValueError(f"{names}: no row carries energy; measure some with `moe-gpu energy measure`")
    print_energy(rows)
    return rows


def print_energy(rows: Sequence[Row]) -> None:
    """Joules per 1000 tokens of every benchmark row, the attributions' sums and the findings; `-` is not measured."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    measured = [row for row in select(rows, BenchmarkRow) if row.energy_quality is not None]
    if measured:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Joules per 1000 tokens", title_justify="left")
        for name in ("layer", "pass", "tokens", "provider"):
            table.add_column(name, no_wrap=True)
        for name in ("J / 1000", "+- stderr", "W", "busy %"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("quality")
        for row in measured:
            table.add_row(
                row.model,
                row.mode,
                str(row.num_tokens),
                row.provider if row.launch == "eager" else f"{row.provider} ({row.launch})",
                _cell(row.energy_j_per_token, 1000),
                _cell(row.energy_stderr_j_per_token, 1000),
                _cell(row.power_w),
                _cell(row.gpu_util_pct),
                row.energy_quality or "-",
            )
        console.print(table)
    for total in select(rows, AttributionSum):
        closure = "not measured" if total.closure is None else f"{100 * total.closure:.1f} %"
        held_out = "not known" if total.held_out_error is None else f"{100 * total.held_out_error:.1f} %"
        where = total.window or total.run_id
        parts = f"experts {total.dynamic_j:.4g} J, router and combine {total.shared_j:.4g} J"
        whole = f"static {total.static_j:.4g} J of {_cell(total.measured_j)} J"
        said = f"{where}, by expert (modelled): {parts}, {whole}; closure {closure}, held out {held_out}"
        console.print(said, markup=False, soft_wrap=True)
    for finding in select(rows, Finding):
        interval = "" if finding.low is None else f" (95 % {finding.low:.4g} to {finding.high:.4g})"
        said = f"not measured: {finding.reason}" if finding.value is None else f"{finding.value:.4g} {finding.unit}"
        verdict = f", {finding.verdict}" if finding.verdict else ""
        console.print(f"{finding.name}: {said}{interval}{verdict}", markup=False, soft_wrap=True)
    unmeasured = [window for window in select(rows, EnergyMeasurement) if window.energy_j is None]
    for reason in dict.fromkeys(window.reason for window in unmeasured):
        count = sum(window.reason == reason for window in unmeasured)
        console.print(f"{count} windows without energy: {reason}", markup=False, soft_wrap=True)


def _cell(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.4g}"


def run_watch(
    *,
    device: str | None = None,
    hz: float = 10.0,
    seconds: float | None = None,
    output: str | Path | None = None,
    metrics_port: int | None = None,
) -> PowerSampler:
    """Show a GPU's power, temperature, clocks and utilisation until Ctrl-C or for `seconds`, then write them.

    device: a UUID, `cuda:N`, or None for the first GPU. output: `.csv`, `.json` or `.jsonl`. metrics_port: also serve
    Prometheus at 127.0.0.1. Raises EnergyUnavailableError where there is no NVML.
    """
    path = None if output is None else Path(output)
    if path is not None and path.suffix not in (".csv", ".json", ".jsonl"):
        raise ValueError(f"--output {path} ends in {path.suffix!r}; give a name that ends in .csv, .json or .jsonl")
    if path is not None:
        writable_directory(path.parent)
    sampler = PowerSampler(device, hz)
    server = None if metrics_port is None else MetricsServer([EnergyCollector(sampler)], metrics_port)
    try:
        with sampler:
            if server is not None:
                print(f"metrics: {server.url}")
            _show(sampler, seconds)
    finally:
        if server is not None:
            server.close()
        if path is not None:
            (sampler.to_csv if path.suffix == ".csv" else sampler.to_json)(path)
            print(f"samples: {path}")
    return sampler


def _show(sampler: PowerSampler, seconds: float | None) -> None:
    from rich.console import Console
    from rich.live import Live

    end = None if seconds is None else time.monotonic() + seconds
    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        while (end is None or time.monotonic() < end) and sampler.lost is None:
            sample = sampler.latest
            if sample is not None:
                live.update(
                    f"{sample.gpu_uuid}: {_cell(sample.power_instant_w)} W, {_cell(sample.temperature_c)} C, "
                    f"SM {_cell(sample.sm_clock_mhz)} MHz, busy {_cell(sample.gpu_util_pct)} %, "
                    f"memory {_cell(sample.mem_util_pct)} %{f'; {sample.error}' if sample.error else ''}"
                )
            time.sleep(min(0.25, 1.0 if end is None else max(0.0, end - time.monotonic())))
    if sampler.lost is not None:
        print(f"sampling ended: {sampler.lost}")
