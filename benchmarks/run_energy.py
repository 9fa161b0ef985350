"""Record what energy measurement is worth on a GPU: `python benchmarks/run_energy.py FILE.jsonl --section NAME`.

Sections, each within ten minutes on an H200; one that fails is recorded as failed and the next goes on:

counter       period and resolution of the energy counter's ticks, and what a reading costs
power         the counter against integrated power over 5 s of a dense product (goal: within 2 %)
idle          watts of the idle GPU with a CUDA context
overhead      a decode loop with the 10 Hz sampler against the same without (goal: below 0.5 %)
trace         a minute of samples at 10 Hz beside FILE, as CSV, for tests to play back
calibrate     the calibration that attribution uses, kept in the cache (goals: under 3 minutes, held-out error <= 12 %)
attribute     moe_gpu on Qwen3-30B-A3B, joules by expert (goal: closure <= 10 %); needs a calibration
intervention  the same rows to 1, 8, 64 and 128 experts: predicted against measured difference; needs a calibration
qwen, mixtral joules per 1000 tokens of torch_loop, transformers grouped_mm and moe_gpu (goals: 40 % less; less)
slices        joules per token against SMs
zeus          agreement with Zeus, where it is installed (goal: within 1 %)

In calls of at most ten minutes: the first five; then calibrate, attribute, intervention and slices, in one call, since
they share the calibration; then qwen; then mixtral. FILE keeps the rows of earlier calls. --smoke: tiny sizes on the
CPU, to try the script with a stand-in for NVML; its numbers are no measurements, and say so.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark.measure import Case, EnergyPlan
from moe_gpu.benchmark.problem import make_problem
from moe_gpu.benchmark.providers import PROVIDERS
from moe_gpu.benchmark.suite import MoEBenchmark
from moe_gpu.benchmark.timing import attempt, capture, measure_ceilings
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.energy import attribute_trials, open_monitor, print_energy, print_model, standard_workloads
from moe_gpu.energy_model import EnergyModel
from moe_gpu.energy_monitor import EnergyMonitor, EnergyTrials, PowerSampler, measure_interleaved, select_sm_slice
from moe_gpu.energy_monitor.trials import Ratio, compare_trials
from moe_gpu.layer_energy import work_of
from moe_gpu.machine import describe_machine
from moe_gpu.nvml import Device
from moe_gpu.reference import ExpertWeights
from moe_gpu.results import BenchmarkRow, Finding, Row, read_rows, write_rows
from moe_gpu.triton_kernels.ops import TritonExpertOps

QWEN, MIXTRAL = "qwen3-30b-a3b", "mixtral-8x7b"
OURS, LOOP, GROUPED = "moe_gpu", "torch_loop", "transformers_grouped_mm"


@dataclass
class Run:
    """Where the sections work, how long, and the rows they leave."""

    device: torch.device
    dtype: torch.dtype
    monitor: EnergyMonitor
    path: Path
    rows: list[Row]
    smoke: bool
    seconds: float = 5.0
    trials: int = 4
    tokens: tuple[int, ...] = (8, 64, 1024, 8192)
    models: dict[str, MoEConfig] | None = None

    def config(self, model: str) -> MoEConfig:
        return (self.models or PRESETS)[model]

    def find(self, name: str, value: float | None, unit: str, **more: Any) -> None:
        """Keep a finding, and say it."""
        row = Finding(f"smoke test, no measurement: {name}" if self.smoke else name, value, unit, **more)
        self.rows.append(row)
        shown = f"not measured: {row.reason}" if value is None else f"{value:.5g} {unit}"
        interval = "" if row.low is None or row.high is None else f" ({row.low:.5g} to {row.high:.5g})"
        print(f"  {name}: {shown}{interval}{f', {row.verdict}' if row.verdict else ''}", flush=True)

    def find_ratio(self, name: str, ratio: Ratio, goal: float | None, reason: str | None, samples: int) -> None:
        """Keep a ratio; its goal is met where the whole interval lies at or below it."""
        verdict: str | None = ratio.verdict
        if goal is not None and ratio.high is not None and ratio.low is not None:
            verdict = "met" if ratio.high <= goal else "missed" if ratio.low > goal else "inconclusive"
        how = "interleaved windows" if goal is None else f"interleaved windows; goal: at most {goal:g}"
        self.find(
            name, ratio.value, "ratio", low=ratio.low, high=ratio.high, samples=samples, verdict=verdict, how=how,
            reason=None if ratio.value is not None else reason or "a window could not be measured",
        )  # fmt: skip

    def calibration(self) -> EnergyModel:
        return EnergyModel.load(self.monitor.uuid, self.monitor.driver, str(self.dtype).removeprefix("torch."))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def met(good: bool) -> str:
    return "met" if good else "missed"


def load(run: Run) -> Callable[[], object]:
    """A dense product of random numbers."""
    n = 64 if run.smoke else 8192
    a, b = (torch.randn(n, n, device=run.device).to(run.dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def decode(run: Run, num_tokens: int = 8, model: str = QWEN) -> Callable[[], object]:
    """Our layer's forward pass, on a GPU replayed as a CUDA graph."""
    problem = make_problem(run.config(model), num_tokens, "uniform", run.dtype, run.device)
    plain = torch.no_grad()(PROVIDERS[OURS].build(problem).run)
    if run.device.type != "cuda":
        return plain
    captured = capture(plain, run.device)

    def replay(read_by_the_graph: object = problem) -> object:
        return captured.replay()

    return replay


def counter(run: Run) -> None:
    meter = Device(run.monitor.uuid)
    seen: list[tuple[int, int]] = []
    reads = 0
    begin, last = time.monotonic_ns(), meter.energy_mj()
    before = begin
    call = load(run)
    while time.monotonic_ns() - begin < run.seconds * 4e9:
        if reads % 256 == 0:
            call()
        value, now = meter.energy_mj(), time.monotonic_ns()
        reads += 1
        if value != last:
            seen.append(((before + now) // 2, value - last))
        last, before = value, now
    run.wait()
    took_s = (time.monotonic_ns() - begin) / 1e9
    meter.close()
    periods = [(later[0] - earlier[0]) / 1e9 for earlier, later in itertools.pairwise(seen)]
    ordered = sorted(periods)
    spread = dict(low=ordered[len(ordered) // 40], high=ordered[-1 - len(ordered) // 40], samples=len(periods))
    run.find(
        "tick period of the energy counter", statistics.median(periods), "s", **spread, how="median, 95 % of ticks"
    )
    steps = [step for _, step in seen]
    run.find("smallest step of the energy counter", min(steps) / 1000, "J", samples=len(steps))
    run.find("cost of a reading of the counter", took_s / reads, "s", samples=reads, how="read without a pause")


def power(run: Run) -> None:
    call, ratios = load(run), []
    seconds = run.seconds if run.smoke else max(5.0, run.seconds)
    sampler = PowerSampler(run.monitor.uuid, hz=50)
    for _ in range(run.trials):
        sampler.start()
        first = len(sampler.timeline())
        found = measure_interleaved({"product": call}, monitor=run.monitor, min_duration_s=seconds, trials=1)
        window = found["product"].windows[0]
        sampler.stop()
        watts = [s.power_instant_w for s in sampler.timeline()[first:] if s.power_instant_w is not None]
        # Samples begin before the loop is up to speed and end after it: leave out what lies beside the window.
        inside = watts[len(watts) // 10 : -max(1, len(watts) // 20)]
        if window.energy_j is not None and inside:
            ratios.append(window.energy_j / window.duration_s / statistics.fmean(inside))
    ratio = Ratio.of(ratios, "higher", "lower")
    run.find(
        "counter over integrated instant power", ratio.value, "ratio", low=ratio.low, high=ratio.high,
        samples=len(ratios), verdict=None if ratio.value is None else met(abs(ratio.value - 1) <= 0.02),
        how=f"windows of {seconds:g} s of a dense product; goal: within 2 %",
        reason=None if ratios else "no window had both",
    )  # fmt: skip


def idle(run: Run) -> None:
    torch.zeros(1, device=run.device)
    run.monitor.clock.sleep(run.seconds)
    window = run.monitor.measure_idle(2 * run.seconds)
    if window.energy_j is None:
        run.find("idle power with a CUDA context", None, "W", reason=window.reason)
        return
    watts, error = window.energy_j / window.duration_s, (window.stderr_j or 0.0) / window.duration_s
    run.find(
        "idle power with a CUDA context", watts, "W", low=watts - 1.96 * error, high=watts + 1.96 * error,
        samples=window.n_ticks,
    )  # fmt: skip


def overhead(run: Run) -> None:
    """Calls a second in blocks of A B B A, where the sampler runs, or a window is open, in B alone."""
    call = decode(run)
    sampler = PowerSampler(run.monitor.uuid, hz=10)

    def rate(beside: Callable[[], AbstractContextManager[object]]) -> float:
        with beside():
            return plain_rate()

    def plain_rate() -> float:
        run.wait()
        begin, calls = time.perf_counter(), 0
        while time.perf_counter() - begin < run.seconds / 2:
            for _ in range(16):
                call()
            calls += 16
        run.wait()
        return calls / (time.perf_counter() - begin)

    plain_rate()
    for what, beside in (
        ("with the 10 Hz sampler", lambda: sampler),
        ("inside a window", lambda: run.monitor.window("overhead")),
    ):
        ratios = []
        for _ in range(2 * run.trials):
            a, b, c, d = plain_rate(), rate(beside), rate(beside), plain_rate()
            ratios.append((b + c) / (a + d))
        ratio = Ratio.of(ratios, "better", "worse")
        sure = ratio.low is not None and ratio.high is not None and not ratio.low < 0.995 <= ratio.high
        run.find(
            f"rate of a decode loop {what} over without", ratio.value, "ratio", low=ratio.low, high=ratio.high,
            samples=len(ratios), how="ABBA blocks; goal: at least 0.995",
            verdict=met((ratio.low or 0.0) >= 0.995) if sure else "inconclusive",
        )  # fmt: skip


def trace(run: Run) -> None:
    calls = [decode(run), load(run)]
    with PowerSampler(run.monitor.uuid, hz=10) as sampler, run.monitor.window("trace") as window:
        for index in range(6):
            end = time.monotonic() + 2 * run.seconds
            while time.monotonic() < end and index % 3:  # every third stretch is idle
                calls[index % 2]()
            run.wait()
            time.sleep(max(0.0, end - time.monotonic()))
    path = run.path.with_suffix(".trace.csv")
    sampler.to_csv(path)
    assert window.measurement is not None
    run.rows.append(window.measurement)
    run.find("samples of the recorded trace", float(len(sampler.timeline())), "samples", how=path.name)


def calibrate(run: Run) -> None:
    begin = time.monotonic()
    sizes: dict[str, Any] = {}
    if run.smoke:
        sizes = dict(config=run.config(QWEN), rows_per_expert=(1, 16), copy_bytes=1 << 16, square=64)
    model = EnergyModel.calibrate(
        standard_workloads(run.device, run.dtype, **sizes),
        str(run.dtype).removeprefix("torch."),
        monitor=run.monitor,
        min_duration_s=run.seconds,
        trials=run.trials,
        rest_s=min(0.3, run.seconds / 10),
    )
    took_s = time.monotonic() - begin
    model.save()
    model.save(run.path.with_suffix(".calibration.json"))
    print_model(model)
    run.find("duration of the calibration", took_s, "s", verdict=met(took_s < 180), how="goal: under 180 s")
    for name, unit in (("static_w", "W"), ("j_per_flop", "J/FLOP"), ("j_per_byte", "J/B")):
        low, high = model.intervals[name]
        run.find(f"calibration: {name}", getattr(model, name), unit, low=low, high=high, how="bootstrap over windows")
    for name, error in model.held_out.items():
        run.find(f"held-out error: {name}", error, "ratio", verdict=met(error <= 0.12), how="goal: at most 0.12")


def attribute(run: Run) -> None:
    model = run.calibration()
    for num_tokens in run.tokens:
        config = run.config(QWEN)
        problem = make_problem(config, num_tokens, "uniform", run.dtype, run.device)
        call = decode(run, num_tokens) if num_tokens <= 64 else torch.no_grad()(PROVIDERS[OURS].build(problem).run)
        case = Case(QWEN, config, num_tokens, run.dtype, "uniform", "forward", "graph" if num_tokens <= 64 else "eager")
        trials = measure(run, {str(case): call})[str(case)]
        report = attribute_trials(case, trials, model, run.device, problem.rows_E())
        run.rows += report.rows
        closure = report.total.closure
        run.find(
            f"closure of the attribution, T={num_tokens}", closure, "ratio", samples=len(trials.valid),
            verdict=None if closure is None else met(closure <= 0.1), how="goal: at most 0.1", reason=trials.reason,
        )  # fmt: skip
        release(run)


def intervention(run: Run) -> None:
    """512 rows, each of one token, spread evenly over so many experts; differences from the widest spread."""
    model, config = run.calibration(), run.config(QWEN).with_(top_k=1)
    rows = 512 if not run.smoke else 16
    generator = torch.Generator(run.device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=run.dtype, device=run.device).normal_(std=std, generator=generator)

    weights = ExpertWeights(
        normal(config.num_experts, config.up_rows, config.input_dim, std=config.input_dim**-0.5),
        normal(config.num_experts, config.expert_dim, config.hidden_dim, std=config.hidden_dim**-0.5),
    )
    x, ops, calls, counts = normal(rows, config.input_dim), TritonExpertOps(run.device), {}, {}
    # Without a router, what no expert owns is the combine alone.
    combined = 2.0 * config.expert_dim * run.dtype.itemsize
    work = replace(
        work_of(run.device, config, rows, run.dtype),
        shared_flops_per_token=0.0,
        shared_bytes_per_token=combined,
        shared_bytes_per_call=0.0,
    )
    for experts in [n for n in (1, 8, 64, 128) if n <= config.num_experts]:
        ids = (torch.arange(rows, device=run.device) % experts).int().view(rows, 1)
        routing = ops.sort_routes(ids, torch.ones(rows, 1, device=run.device), config.num_experts)
        calls[f"{experts} experts"] = functools.partial(
            torch.no_grad()(ops.experts), x, routing, weights, config.activation
        )
        counts[f"{experts} experts"] = torch.bincount(ids.flatten().long(), minlength=config.num_experts)
    trials = measure(run, calls)

    def predicted(name: str) -> float:
        total = trials[name].total()
        return model.predict(work, counts[name], total.duration_s, total.calls or 1)[0] / (total.calls or 1)

    widest = list(calls)[-1]
    for name in list(calls)[:-1]:
        measured = (trials[widest].joules_per_call or 0.0) - (trials[name].joules_per_call or 0.0)
        difference = predicted(widest) - predicted(name)
        run.find(
            f"predicted over measured difference, {widest} less {name}",
            difference / measured if measured else None, "ratio", samples=len(trials[name].valid),
            how=f"measured {measured:.4g} J a call", reason=None if measured else "there is no difference to predict",
        )  # fmt: skip


def providers(run: Run, model: str) -> None:
    found: dict[tuple[int, str], dict[str, EnergyTrials]] = {}

    def keep(case: Case, trials: Mapping[str, EnergyTrials]) -> None:
        found[case.num_tokens, case.launch] = dict(trials)

    plan = EnergyPlan(run.monitor, run.seconds, run.trials, on_trials=keep)
    ceilings = measure_ceilings(run.device, run.dtype)
    run.rows += ceilings
    for num_tokens in run.tokens:
        benchmark = MoEBenchmark(
            config=run.config(model), model=model, batch_sizes=(num_tokens,), dtype=run.dtype, device=run.device,
            providers=(LOOP, GROUPED, OURS), num_iterations=10, row_budget_s=0.3, energy=plan,
            launches=("eager", "graph") if num_tokens <= 64 and run.device.type == "cuda" else ("eager",),
        )  # fmt: skip
        rows = benchmark.measure(ceilings)
        run.rows += rows
        for row in rows:
            show_row(row)
        ours = found.get((num_tokens, "eager"), {}).get(OURS)
        for other, goal in ((LOOP, 0.6), (GROUPED, 1.0)):
            baseline = found.get((num_tokens, "eager"), {}).get(other)
            name = f"energy of {OURS} over {other}, {model} T={num_tokens}"
            if ours is None or baseline is None:
                why = "; ".join(
                    row.reason or row.status for row in rows if row.provider in (OURS, other) and row.reason
                )
                run.find(name, None, "ratio", reason=why or "not measured")
                continue
            compared = compare_trials(baseline, ours)
            run.find_ratio(name, compared.energy, goal, compared.reason, len(ours.valid))
        release(run)


def show_row(row: BenchmarkRow) -> None:
    joules = "not measured" if row.energy_j_per_token is None else f"{1000 * row.energy_j_per_token:.4g} J per 1000"
    print(f"  {row.model} T={row.num_tokens} {row.provider}: {joules} {row.reason or ''}".rstrip(), flush=True)


def slices(run: Run) -> None:
    sms = torch.cuda.get_device_properties(run.device).multi_processor_count if run.device.type == "cuda" else 132
    candidates = sorted({sms, *(round(sms * share / 6) for share in (5, 4, 3, 2))})
    for num_tokens in run.tokens[1::2]:
        problem = make_problem(run.config(QWEN), num_tokens, "uniform", run.dtype, run.device)
        ops = {size: TritonExpertOps(run.device, sm_budget=None if size == sms else size) for size in candidates}
        some = ops[sms]
        routing = some.route(problem.logits().detach(), problem.config.top_k, problem.config.router)

        def call(size: int, problem: Any = problem, ops: Any = ops, routing: Any = routing) -> object:
            with torch.no_grad():
                return ops[size].experts(problem.x_TH, routing, problem.weights, problem.config.activation)

        choice = select_sm_slice(
            call, candidates, 1.1, monitor=run.monitor, tokens=num_tokens, rounds=2, block_s=run.seconds / 2
        )
        for size, trials in choice.trials.items():
            joules, bounds = trials.joules_per_token, trials.interval_j_per_token
            seconds = trials.seconds_per_call or 0.0
            run.find(
                f"joules per 1000 tokens on {size} SMs, T={num_tokens}",
                None if joules is None else 1000 * joules, "J",
                low=None if bounds is None else 1000 * bounds[0], high=None if bounds is None else 1000 * bounds[1],
                samples=len(trials.valid), how=f"{1e3 * seconds:.4g} ms a call", reason=trials.reason,
            )  # fmt: skip
        run.find(f"chosen SMs, T={num_tokens}", float(choice.sm_count), "SMs", how=choice.reason)
        release(run)


def zeus(run: Run) -> None:
    if util.find_spec("zeus") is None:
        run.find("energy by Zeus over ours", None, "ratio", reason="zeus is not installed (extra moe-gpu[energy])")
        return
    other = import_module("zeus.monitor").ZeusMonitor(gpu_indices=[run.device.index or 0])
    call, ratios = load(run), []
    for index in range(run.trials):
        other.begin_window(str(index))
        found = measure_interleaved({"product": call}, monitor=run.monitor, min_duration_s=2 * run.seconds, trials=1)
        theirs = other.end_window(str(index))
        ours = found["product"].windows[0]
        if ours.energy_j is not None and theirs.total_energy > 0:
            # Their window is a little longer than ours: compare watts.
            ratios.append(theirs.total_energy / theirs.time / (ours.energy_j / ours.duration_s))
    ratio = Ratio.of(ratios, "higher", "lower")
    good = ratio.value is not None and abs(ratio.value - 1) <= 0.01
    run.find(
        "power by Zeus over ours", ratio.value, "ratio", low=ratio.low, high=ratio.high, samples=len(ratios),
        verdict=met(good), how="goal: within 1 %", reason=None if ratios else "no window had both",
    )  # fmt: skip


def measure(run: Run, calls: Mapping[str, Callable[[], object]]) -> dict[str, EnergyTrials]:
    return measure_interleaved(calls, monitor=run.monitor, min_duration_s=run.seconds, trials=run.trials)


def release(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[Run], None]] = {
    "counter": counter,
    "power": power,
    "idle": idle,
    "overhead": overhead,
    "trace": trace,
    "calibrate": calibrate,
    "attribute": attribute,
    "intervention": intervention,
    "qwen": functools.partial(providers, model=QWEN),
    "mixtral": functools.partial(providers, model=MIXTRAL),
    "slices": slices,
    "zeus": zeus,
}


def open_run(path: Path, smoke: bool) -> Run:
    if not smoke:
        device, monitor = open_monitor()
        return Run(device, torch.bfloat16, monitor, path, [], False)
    tiny = PRESETS["small"].with_(input_dim=16, expert_dim=16, hidden_dim=32, num_experts=8)
    device, monitor = torch.device("cpu"), EnergyMonitor(poll_s=0.001)
    models = {QWEN: tiny, MIXTRAL: tiny}
    return Run(device, torch.float32, monitor, path, [], True, 0.12, 2, (8, 64), models)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="run this section; all without it")
    parser.add_argument("--seconds", type=float, help="least length of a window; 5 without it (power: 5 at least)")
    parser.add_argument("--trials", type=int, help="windows of each call; 4 without it")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: tries the script, measures nothing")
    given = parser.parse_args(arguments)
    earlier = read_rows(given.output) if given.output.exists() else []
    try:
        run = open_run(given.output, given.smoke)
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    run.seconds, run.trials = given.seconds or run.seconds, given.trials or run.trials
    begin, failed = time.monotonic(), []
    machine = describe_machine(run.device)
    with run.monitor:
        for name in given.section or SECTIONS:
            print(f"{time.monotonic() - begin:6.1f} s  {name}", flush=True)
            before = len(run.monitor.measurements)
            outcome = attempt(functools.partial(SECTIONS[name], run))
            if outcome.reason is not None:
                failed.append(name)
                run.find(f"section {name}", None, "", reason=f"failed: {outcome.reason}")
            run.rows += list(run.monitor.measurements)[before:]
            write_rows(given.output, [*earlier, machine, *run.rows])
    print()
    print_energy(run.rows)
    said = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{time.monotonic() - begin:.0f} s; results: {given.output}{said}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
