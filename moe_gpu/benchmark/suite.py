"""MoEBenchmark: one layer over sizes, routings, passes and launch modes, every provider against the plain loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark import timing
from moe_gpu.benchmark.check import Checker
from moe_gpu.benchmark.measure import Case, EnergyPlan, Pass, measure_pass
from moe_gpu.benchmark.problem import (
    MODES,
    MemoryLimitError,
    Problem,
    check_memory,
    check_trace,
    make_problem,
    parse_dtype,
    zipf_exponent,
)
from moe_gpu.benchmark.providers import PROVIDERS
from moe_gpu.benchmark.table import print_rows
from moe_gpu.benchmark.timing import attempt
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.machine import describe_machine
from moe_gpu.profiler import RoutingTrace
from moe_gpu.results import BenchmarkRow, Ceiling, Row, stamp, write_rows

LAUNCHES = ("eager", "graph")
Progress = Callable[[int, int, str], None]


def _all_known(what: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError(f"{what}={values!r} must be a sequence of names, such as [{values!r}]")
    if not values:
        raise ValueError(f"{what} is empty; give at least one of {', '.join(known)}")
    for value in values:
        if value not in known:
            raise ValueError(f"{what}: {value!r} is not one of {', '.join(known)}")
    return tuple(values)


def _positive(what: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what}={value!r} must be a whole number of at least 1")
    return value


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the GPU if there is one; ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device; choose cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not one of cpu, cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: PyTorch sees {torch.cuda.device_count()} GPUs; choose cpu")
    return chosen


class MoEBenchmark:
    """Time one MoE layer in every provider.

    The five sizes, or `config` in their place; `batch_sizes` are tokens a call. routings: uniform, zipf-S, one-expert,
    trace (layer 0 of `trace`). modes: forward, backward, forward+backward. launches: eager, graph (a CUDA graph of the
    forward pass; needs a GPU). providers: all by default. dtype: by default bf16 on a GPU, fp32 on a CPU.
    num_iterations: samples of each provider, fewer (at least five) where they would take more than `row_budget_s`.
    energy: how to measure it; by default it is not. A shared expert is left out. Nothing is allocated before
    `run_comparison`.
    Raises ValueError for a name, size or trace that does not fit, and for a problem larger than the free memory.
    """

    def __init__(
        self,
        input_dim: int = 512,
        expert_dim: int = 512,
        hidden_dim: int = 1024,
        num_experts: int = 8,
        top_k: int = 2,
        batch_sizes: Sequence[int] = (64, 256, 1024),
        num_iterations: int = 50,
        *,
        config: MoEConfig | None = None,
        model: str = "custom",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        routings: Sequence[str] = ("uniform",),
        modes: Sequence[str] = ("forward",),
        launches: Sequence[str] = ("eager",),
        providers: Sequence[str] | None = None,
        trace: RoutingTrace | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
        row_budget_s: float = 1.0,
        energy: EnergyPlan | None = None,
    ) -> None:
        config = config or MoEConfig(input_dim, expert_dim, hidden_dim, num_experts, top_k)
        self.config = config.with_(shared_hidden_dim=0)
        self.model = model
        self.device = choose_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = parse_dtype(dtype)
        self.batch_sizes = tuple(_positive("num_tokens", size) for size in batch_sizes)
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty; give at least one number of tokens")
        self.num_iterations = _positive("num_iterations", num_iterations)
        self.modes = _all_known("modes", modes, MODES)
        self.launches = _all_known("launches", launches, LAUNCHES)
        if self.launches == ("graph",) and "forward" not in self.modes:
            raise ValueError("launches=['graph'] captures the forward pass only; add 'forward' to modes")
        self.providers = _all_known("providers", tuple(PROVIDERS) if providers is None else providers, tuple(PROVIDERS))
        if isinstance(routings, str) or not routings:
            raise ValueError(f"routings={routings!r} must be a sequence of at least one name, such as ['uniform']")
        for routing in routings:
            zipf_exponent(routing)
            if routing == "trace":
                check_trace(self.config, trace)
        self.routings = tuple(routings)
        if not row_budget_s > 0:
            raise ValueError(f"row_budget_s={row_budget_s} must be positive")
        self.trace, self.seed, self.on_progress, self.row_budget_s = trace, seed, on_progress, row_budget_s
        self.energy = energy
        self.rows: list[Row] = []
        for size in self.batch_sizes:
            check_memory(self.config, size, self.dtype, self._gradients, self.device)

    @property
    def _gradients(self) -> bool:
        return self.modes != ("forward",)

    def _passes(self) -> Iterator[tuple[str, str]]:
        """(mode, launch) in the order in which they run: captures last, whatever state a failed one may leave."""
        for launch in sorted(set(self.launches)):
            for mode in self.modes:
                if launch == "eager" or mode == "forward":
                    yield mode, launch

    @property
    def num_steps(self) -> int:
        """Rows that `measure` makes."""
        return len(self.batch_sizes) * len(self.routings) * len(list(self._passes())) * len(self.providers)

    def run_comparison(self) -> list[Row]:
        """Machine, ceilings, and a row for every provider, size, routing, pass and launch mode."""
        self.rows = run_benchmarks([self], self.on_progress)
        return self.rows

    def print_results(self) -> None:
        """A table of the last run on stdout, with what was not timed and why."""
        print_rows(self._results())

    def save_results(self, path: str | Path) -> None:
        """Write the last run as JSON lines, whole or not at all."""
        write_rows(path, self._results())

    def _results(self) -> list[Row]:
        if not self.rows:
            raise ValueError("there are no results yet; call run_comparison() first")
        return self.rows

    def measure(self, ceilings: Sequence[Ceiling] = (), on_progress: Progress | None = None) -> list[BenchmarkRow]:
        """The benchmark rows alone; shares are of the given ceilings in this benchmark's dtype."""
        name = str(self.dtype).removeprefix("torch.")
        peak = {ceiling.name: ceiling.value for ceiling in ceilings if ceiling.dtype == name}
        rows: list[BenchmarkRow] = []

        def report(done: int, text: str) -> None:
            if on_progress is not None:
                on_progress(done, self.num_steps, text)

        for size in self.batch_sizes:
            for routing in self.routings:
                self._measure_problem(size, routing, peak, rows, report)
        report(self.num_steps, f"{self.model} done")
        machine = describe_machine(self.device)
        return [stamp(row, machine) for row in rows]

    def _measure_problem(
        self,
        num_tokens: int,
        routing: str,
        ceilings: dict[str, float],
        rows: list[BenchmarkRow],
        report: Callable[[int, str], None],
    ) -> None:
        """Append the rows of every pass over one problem, whose tensors live no longer than this call."""
        made = attempt(lambda: self._set_up(num_tokens, routing))
        for mode, launch in self._passes():
            case = Case(self.model, self.config, num_tokens, self.dtype, routing, mode, launch)
            if made.reason is not None:
                rows += [case.row(provider, "failed", reason=made.reason) for provider in self.providers]
                continue
            problem, checker = made.value
            one_pass = Pass(case, problem, checker, ceilings)
            tell = functools.partial(_tell, report, len(rows), case)
            rows += measure_pass(one_pass, self.providers, self.num_iterations, self.row_budget_s, tell, self.energy)

    def _set_up(self, num_tokens: int, routing: str) -> tuple[Problem, Checker]:
        problem = make_problem(self.config, num_tokens, routing, self.dtype, self.device, self.trace, self.seed)
        return problem, Checker(problem, self._gradients)


def _tell(report: Callable[[int, str], None], done: int, case: Case, index: int, provider: str) -> None:
    report(done + index, f"{case} {provider}")


def run_benchmarks(benchmarks: Sequence[MoEBenchmark], on_progress: Progress | None = None) -> list[Row]:
    """Several benchmarks of one device as one run: one machine row, the ceilings of each dtype, then their rows.

    Where energy was measured its windows follow.
    """
    if not benchmarks:
        raise ValueError("there is no benchmark to run; give at least one")
    device = benchmarks[0].device
    ceilings: list[Ceiling] = []
    for dtype in dict.fromkeys(benchmark.dtype for benchmark in benchmarks):
        ceilings += timing.measure_ceilings(device, dtype)
    total = sum(benchmark.num_steps for benchmark in benchmarks)
    rows: list[Row] = []
    done = 0
    for benchmark in benchmarks:

        def progress(step: int, _: int, text: str, before: int = done) -> None:
            if on_progress is not None:
                on_progress(before + step, total, text)

        rows += benchmark.measure(ceilings, progress)
        done += benchmark.num_steps
    monitors = {id(b.energy.monitor): b.energy.monitor for b in benchmarks if b.energy is not None}
    windows = [window for monitor in monitors.values() for window in monitor.measurements]
    return [describe_machine(device), *ceilings, *rows, *windows]


def _settings(preset: str, defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments from a preset, defaults and what the caller gave; sizes given change the preset's."""
    sizes = {
        name: overrides.pop(name)
        for name in ("input_dim", "expert_dim", "hidden_dim", "num_experts", "top_k")
        if name in overrides
    }
    config = PRESETS[preset]
    changed = config.with_(**sizes)
    return {"config": changed, "model": preset if changed == config else "custom", **defaults, **overrides}


def run_quick_benchmark(device: torch.device | str | None = None, **overrides: Any) -> list[Row]:
    """A minute's run: the small layer on a CPU, Qwen3-30B-A3B's on a GPU. `overrides` are MoEBenchmark's arguments."""
    on_gpu = choose_device(device).type == "cuda"
    preset, sizes = ("qwen3-30b-a3b", (64, 4096)) if on_gpu else ("small", (64, 256))
    defaults = {"device": device, "batch_sizes": sizes, "num_iterations": 20 if on_gpu else 10, "row_budget_s": 0.5}
    return MoEBenchmark(**_settings(preset, defaults, overrides)).run_comparison()


def run_full_benchmark(
    device: torch.device | str | None = None, *, presets: Sequence[str] | None = None, **overrides: Any
) -> list[Row]:
    """Every preset (on a CPU the small and medium ones) over sizes, routings and passes, on a GPU also as CUDA graphs.

    A preset that does not fit the device has one `unavailable` row a provider, with the reason.
    """
    on_gpu = choose_device(device).type == "cuda"
    names = tuple(PRESETS) if on_gpu else ("small", "medium")
    names = names if presets is None else _all_known("presets", presets, tuple(PRESETS))
    defaults: dict[str, Any] = {
        "device": device,
        "batch_sizes": (1, 64, 512, 4096, 16384) if on_gpu else (16, 128),
        "routings": ("uniform", "zipf-1.2"),
        "modes": ("forward", "forward+backward"),
        "num_iterations": 50 if on_gpu else 10,
        "row_budget_s": 0.5,
    }
    on_progress = overrides.pop("on_progress", None)
    small = {"batch_sizes": (1, 64, 256), "modes": ("forward",), "launches": ("graph",)}
    benchmarks: list[MoEBenchmark] = []
    missing: list[Row] = []
    for name in names:
        settings = _settings(name, defaults, dict(overrides))
        try:
            benchmarks.append(MoEBenchmark(**settings))
            if on_gpu and not {"batch_sizes", "modes", "launches"} & set(overrides):
                benchmarks.append(MoEBenchmark(**{**settings, **small}))
        except MemoryLimitError as error:
            missing += _unavailable_rows(settings, str(error))
    return run_benchmarks(benchmarks, on_progress) + missing


def _unavailable_rows(benchmark_settings: dict[str, Any], reason: str) -> list[Row]:
    """One row a provider for a preset that does not fit the device."""
    given = benchmark_settings
    default = "bf16" if choose_device(given["device"]).type == "cuda" else "fp32"
    case = Case(
        given["model"],
        given["config"].with_(shared_hidden_dim=0),
        max(given["batch_sizes"]),
        parse_dtype(given.get("dtype") or default),
        given["routings"][0],
        given["modes"][0],
        "eager",
    )
    return [case.row(provider, "unavailable", reason=reason) for provider in given.get("providers") or PROVIDERS]
