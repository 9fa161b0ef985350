"""One pass of one problem: every provider built, checked, warmed up and timed in turn with the others."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_gpu import nvml
from moe_gpu.benchmark import timing
from moe_gpu.benchmark.check import Checker, Comparison, WrongOutputError
from moe_gpu.benchmark.problem import Problem
from moe_gpu.benchmark.providers import PROVIDERS, Built, Provider
from moe_gpu.benchmark.timing import Job, Timer, attempt
from moe_gpu.config import MoEConfig
from moe_gpu.energy_monitor import EnergyMonitor, EnergyTrials, measure_interleaved
from moe_gpu.results import BenchmarkRow

logger = logging.getLogger("moe_gpu")


@dataclass(frozen=True)
class Case:
    """What all rows of a comparison share."""

    model: str
    config: MoEConfig
    num_tokens: int
    dtype: torch.dtype
    routing: str
    mode: str
    launch: str

    def __str__(self) -> str:
        return f"{self.model} T={self.num_tokens} {self.routing} {self.mode} {self.launch}"

    def row(self, provider: str, status: str, **measured: Any) -> BenchmarkRow:
        """The row of one provider, with what was measured of it."""
        c = self.config
        return BenchmarkRow(
            provider=provider,
            status=status,
            model=self.model,
            num_tokens=self.num_tokens,
            input_dim=c.input_dim,
            hidden_dim=c.hidden_dim,
            expert_dim=c.expert_dim,
            num_experts=c.num_experts,
            top_k=c.top_k,
            dtype=str(self.dtype).removeprefix("torch."),
            routing=self.routing,
            mode=self.mode,
            launch=self.launch,
            **measured,
        )


@dataclass(frozen=True)
class Pass:
    """What is timed: a case, its tensors, and the truth about them. ceilings: FLOP/s and bytes/s by `Ceiling.name`."""

    case: Case
    problem: Problem
    checker: Checker
    ceilings: Mapping[str, float]


@dataclass(frozen=True)
class EnergyPlan:
    """How the providers' energy is measured: `trials` windows of `seconds` of back-to-back calls each, in turn.

    on_trials: told the case and what was measured of each provider.
    """

    monitor: EnergyMonitor
    seconds: float = 5.0
    trials: int = 4
    cooldown_s: float = 0.0
    on_trials: Callable[[Case, Mapping[str, EnergyTrials]], None] | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.trials < 1 or self.cooldown_s < 0:
            raise ValueError(
                f"energy: seconds={self.seconds} must be positive, trials={self.trials} at least 1 and "
                f"cooldown_s={self.cooldown_s} not negative"
            )


@dataclass
class _Entry:
    """One provider on its way to a row."""

    name: str
    built: Built | None = None
    job: Job | None = None
    status: str = "ok"
    reason: str | None = None
    output: Comparison | None = None
    peak_memory_bytes: int | None = None
    estimate_ms: float = 0.0
    times_ms: Sequence[float] = ()
    energy: EnergyTrials | None = None

    def stop(self, status: str, reason: str | None) -> None:
        self.status, self.reason, self.job = status, reason, None


def measure_pass(
    one_pass: Pass,
    providers: Sequence[str],
    num_iterations: int,
    row_budget_s: float,
    report: Callable[[int, str], None],
    energy: EnergyPlan | None = None,
    known: Mapping[str, Provider] | None = None,
) -> list[BenchmarkRow]:
    """A row for each provider by its name in `known` (PROVIDERS without it).

    `report(index, name)` is told which one is being prepared.
    """
    known = PROVIDERS if known is None else known
    device = one_pass.problem.device
    timer = Timer(device)
    entries = [_Entry(name) for name in providers]
    for index, entry in enumerate(entries):
        report(index, entry.name)
        _prepare(entry, known[entry.name], one_pass, timer, row_budget_s)
    ready = {entry.name: entry for entry in entries if entry.job is not None}
    jobs = {name: entry.job for name, entry in ready.items() if entry.job is not None}
    counts = {
        name: timing.sample_count(entry.estimate_ms, num_iterations, row_budget_s) for name, entry in ready.items()
    }
    samples, failures = timing.time_interleaved(jobs, timer, counts)
    clock = None
    if device.type == "cuda":
        clock = nvml.sm_clock_mhz(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    for name, reason in failures.items():
        ready[name].stop("failed", reason)
    for name, times_ms in samples.items():
        ready[name].times_ms = times_ms
    if energy is not None:
        for name, trials in _measure_energy(energy, one_pass, {name: jobs[name] for name in samples}).items():
            ready[name].energy = trials
    return [_row(entry, one_pass, clock) for entry in entries]


def _measure_energy(plan: EnergyPlan, one_pass: Pass, jobs: Mapping[str, Job]) -> dict[str, EnergyTrials]:
    """Energy of each provider's calls, back to back; a backward pass alone has none, since it needs a forward.

    A call that fails, after all of them have been timed, leaves the pass without energy and is named in a warning.
    """
    case = one_pass.case
    if case.mode == "backward" or not jobs:
        return {}
    calls = {f"{case} {name}": functools.partial(_call, job) for name, job in jobs.items()}
    outcome = attempt(
        lambda: measure_interleaved(
            calls,
            monitor=plan.monitor,
            tokens=dict.fromkeys(calls, case.num_tokens),
            min_duration_s=plan.seconds,
            trials=plan.trials,
            cooldown_s=plan.cooldown_s,
        )
    )
    if outcome.reason is not None:
        logger.warning("energy: %s is not measured: %s", case, outcome.reason)
        return {}
    trials = {name: outcome.value[f"{case} {name}"] for name in jobs}
    if plan.on_trials is not None:
        plan.on_trials(case, trials)
    return trials


def _call(job: Job) -> None:
    job.run(job.prepare())


def _prepare(entry: _Entry, provider: Provider, one_pass: Pass, timer: Timer, row_budget_s: float) -> None:
    """Build, check and warm up one provider; what goes wrong is written into the entry."""
    problem, device = one_pass.problem, one_pass.problem.device
    found = attempt(lambda: provider.unavailable(problem, one_pass.case.mode))
    if found.reason is not None:
        return entry.stop("failed", found.reason)
    if found.value is not None:
        return entry.stop("unavailable", found.value)
    if one_pass.case.launch == "graph" and device.type != "cuda":
        return entry.stop("unavailable", "CUDA graphs need an NVIDIA GPU")

    def prepare() -> None:
        entry.built = built = provider.build(problem)
        entry.output = _check(built, one_pass)
        if one_pass.case.launch == "graph":
            with torch.no_grad():
                captured = timing.capture(built.run, device)
            one_pass.checker.check_output(captured.replay())
            entry.job = Job(lambda _: captured.replay())
        else:
            entry.job = _eager_job(built, problem, one_pass.case.mode)
            entry.peak_memory_bytes = timing.peak_memory_bytes(entry.job, device)
        entry.estimate_ms = timing.warm_up(entry.job, timer, row_budget_s)

    outcome = attempt(prepare)
    if outcome.reason is not None:
        wrong = f"{WrongOutputError.__name__}: "
        status = "wrong" if outcome.reason.startswith(wrong) else "failed"
        entry.stop(status, outcome.reason.removeprefix(wrong))


def _check(built: Built, one_pass: Pass) -> Comparison:
    """Compare output and, where the pass has them, gradients with the truth; WrongOutputError where they are off."""
    checker, leaves = one_pass.checker, one_pass.problem.leaves
    if one_pass.case.mode == "forward":
        with torch.no_grad():
            return checker.check_output(built.run())
    out_TO = built.run()
    result = checker.check_output(out_TO)
    gradients = torch.autograd.grad(out_TO, list(leaves.values()), checker.grad_out())
    checker.check_gradients(dict(zip(leaves, gradients, strict=True)))
    return result


def _eager_job(built: Built, problem: Problem, mode: str) -> Job:
    leaves = list(problem.leaves.values())

    def forward(_: None) -> torch.Tensor:
        with torch.no_grad():
            return built.run()

    def backward(out_TO: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out_TO, leaves, problem.grad_out_TO)

    if mode == "forward":
        return Job(forward)
    if mode == "backward":
        return Job(backward, prepare=built.run)
    return Job(lambda _: backward(built.run()))


def _row(entry: _Entry, one_pass: Pass, sm_clock_mhz: float | None) -> BenchmarkRow:
    case, problem, ceilings = one_pass.case, one_pass.problem, one_pass.ceilings
    measured: dict[str, Any] = dict(reason=entry.reason, backend=entry.built.backend if entry.built else None)
    if entry.output is not None:
        measured.update(max_error=entry.output.max_error, allowed_error=entry.output.allowed_error)
    if not entry.times_ms:
        return case.row(entry.name, entry.status, **measured)
    measured.update(timing.describe_samples(entry.times_ms))
    seconds = measured["p50_ms"] / 1e3
    flops, num_bytes = problem.flops(case.mode), problem.min_bytes(case.mode)
    return case.row(
        entry.name,
        entry.status,
        **measured,
        tokens_per_s=problem.num_tokens / seconds,
        flops=flops,
        min_bytes=num_bytes,
        tflops=flops / seconds / 1e12,
        gbps=num_bytes / seconds / 1e9,
        flops_share=flops / seconds / ceilings["matmul"] if "matmul" in ceilings else None,
        bandwidth_share=num_bytes / seconds / ceilings["copy"] if "copy" in ceilings else None,
        peak_memory_bytes=entry.peak_memory_bytes,
        sm_clock_mhz=sm_clock_mhz,
        **({} if entry.energy is None else _energy_fields(entry.energy)),
    )


def _energy_fields(trials: EnergyTrials) -> dict[str, Any]:
    total = trials.total() if trials.valid else None
    return dict(
        energy_j_per_token=trials.joules_per_token,
        energy_stderr_j_per_token=trials.stderr_j_per_token,
        energy_quality=trials.quality,
        gpu_util_pct=trials.mean("gpu_util_pct"),
        mem_util_pct=trials.mean("mem_util_pct"),
        power_w=total.energy_j / total.duration_s if total is not None and total.energy_j else None,
    )
