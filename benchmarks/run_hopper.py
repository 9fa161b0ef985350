"""Record the experts alone on a Hopper GPU beside their rivals: `python benchmarks/run_hopper.py FILE.jsonl`.

bf16, ids and weights given: sorting the routes, experts, combine. Each table is interleaved in this process with a cold
L2: `training` (forward and forward+backward, peak memory; beside them `bmm`, the two or six matrix products over equal
groups as cuBLAS batched products, without gather, activation or combine), `decode` and `skew` (CUDA graphs that rotate
copies of the weights, beside vLLM's experts and OpenAI's triton_kernels), `others` (as `decode`, experts as wide as
those of models that no rule or table of tiles was measured on), `large_skew` (eager, ours alone, with uniform
routing in turn), `fp8` (weights in FP8 beside the same in bf16, in such graphs: by the rules, and by each way
there is), `budget` (the same on fewer SMs, each for a second by itself, with the clock meanwhile), `precision` (are
repeats equal bit for bit) and `routing` (what choosing and sorting take, and their share of the whole). `--table` runs
some only.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from hopper_fp8 import WAYS, Way, copy_of, dequantised, quantise
from hopper_peers import PEERS, Peer, batched_products, run_sonicmoe
from hopper_problem import Problem, make_weights, run_ours

from moe_gpu import nvml
from moe_gpu.benchmark.measure import Case
from moe_gpu.benchmark.timing import (
    Job,
    Timer,
    attempt,
    capture,
    describe_samples,
    measure_ceilings,
    peak_memory_bytes,
    sample_count,
    time_interleaved,
    warm_up,
)
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.machine import describe_machine
from moe_gpu.reference import ExpertWeights, QuantisedExperts, sort_routes_reference
from moe_gpu.results import Finding, Row, percentile, write_rows
from moe_gpu.triton_kernels.ops import TritonExpertOps

TABLES = ("training", "decode", "others", "skew", "large_skew", "fp8", "budget", "precision", "routing")
QWEN, MIXTRAL, OLMOE, DEEPSEEK = "qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b", "deepseek-v3"
TRAINING = [
    (QWEN, PRESETS[QWEN], 16384),
    (QWEN, PRESETS[QWEN], 4096),
    (MIXTRAL, PRESETS[MIXTRAL], 8192),
    (OLMOE, PRESETS[OLMOE], 32768),
    ("h4096-i1024-e128-k8", MoEConfig(4096, 4096, 1024, 128, 8), 32768),
    ("h4096-i512-e256-k16", MoEConfig(4096, 4096, 512, 256, 16), 32768),
    ("h1536-i256-e128-k8", MoEConfig(1536, 1536, 256, 128, 8), 24576),
]
DECODE = [
    (QWEN, PRESETS[QWEN], (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)),
    (MIXTRAL, PRESETS[MIXTRAL], (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)),
    (DEEPSEEK, PRESETS[DEEPSEEK], (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)),
]
PEER_SIZES = (1, 8, 64, 256, 512, 1024, 4096)  # each size may cost a peer a compilation
OTHERS = [
    ("h4096-i1536-e128-k8", MoEConfig(4096, 4096, 1536, 128, 8), PEER_SIZES),  # Qwen3-235B-A22B
    ("h2880-i2880-e32-k4", MoEConfig(2880, 2880, 2880, 32, 4), PEER_SIZES),  # gpt-oss-20b, without its biases
    ("h2048-i512-e512-k10", MoEConfig(2048, 2048, 512, 512, 10), PEER_SIZES),  # Qwen3-Next-80B-A3B
    ("h2048-i1408-e64-k6", MoEConfig(2048, 2048, 1408, 64, 6), PEER_SIZES),  # DeepSeek-V2-Lite
    ("h5120-i8192-e16-k1", MoEConfig(5120, 5120, 8192, 16, 1), PEER_SIZES),  # Llama-4-Scout
    ("h4096-i6400-e16-k2", MoEConfig(4096, 4096, 6400, 16, 2), PEER_SIZES),  # Phi-3.5-MoE
]
ROUTINGS = ("uniform", "zipf-1.2")
SKEWS = ("zipf-0.6", "zipf-1.2", "one-expert")
SKEW = [
    (QWEN, PRESETS[QWEN], [(tokens, routing) for tokens in (256, 512, 1024, 4096) for routing in SKEWS]),
    (DEEPSEEK, PRESETS[DEEPSEEK], [*((tokens, "zipf-1.2") for tokens in (512, 1024, 4096)), (4096, "uniform")]),
]
SKEW_EAGER_SIZES, SKEW_SAMPLES = (8192, 16384), 60
FP8_SIZES = (1, 8, 64, 256, 1024, 4096)
REPEATS = 100
PRECISION = ((1, "forward"), (64, "forward"), (1024, "forward"), (16384, "forward"), (1024, "forward+backward"))
ROUTING_SIZES = (1, 8, 64, 256, 1024, 4096, 16384)
ROUTING_CALLS = 20  # in one graph: a single call is no longer than what starts a graph
ROUTING_GOAL = 0.05  # share of the whole, from 4096 tokens on
BUDGETS = (132, 100, 66, 32)
SUSTAINED_S, SUSTAINED_CALLS = 1.0, 8
BUDGET_GOAL = 0.1  # that the rate may be off proportional by
COPY_BYTES = 400 << 20  # weights that together leave nothing of each other in the L2
GRAPH_BUDGET_S = 0.12
FEW_TOKENS, MOST_ROUNDS = 64, 8  # fewer go round the copies more often: starting a graph takes microseconds

Builds = dict[str, Callable[[], tuple[Job, dict[str, Any]]]]


class Recorder:
    """Times jobs of one problem in turn and keeps their rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = torch.device("cuda")
        self.timer = Timer(self.device)
        self.rows: list[Row] = [describe_machine(self.device), *measure_ceilings(self.device, torch.bfloat16)]
        self.begin = time.monotonic()

    def record(
        self,
        model: str,
        p: Problem,
        mode: str,
        launch: str,
        builds: Builds,
        calls: int = 1,
        budget_s: float = 0.5,
        absent: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Build each provider (which checks it), time all in turn; `calls`: problems that one job computes.

        absent: providers that are not here, and why.
        """
        jobs: dict[str, Job] = {}
        known: dict[str, dict[str, Any]] = {}
        counts: dict[str, int] = {}
        for name, build in builds.items():
            outcome = attempt(build)
            if outcome.reason is None:
                job, known[name] = outcome.value
                outcome = attempt(functools.partial(warm_up, job, self.timer, budget_s))
                if outcome.reason is None:
                    jobs[name], counts[name] = job, sample_count(outcome.value, 60, budget_s)
            if outcome.reason is not None:
                known[name] = {"status": "failed", "reason": outcome.reason}
        samples, failures = time_interleaved(jobs, self.timer, counts)
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        power, clock = nvml.power_w(uuid), nvml.sm_clock_mhz(uuid)  # of all the jobs just timed in turn
        case = Case(model, p.config, p.num_tokens, torch.bfloat16, p.routing, mode, launch)
        known |= {name: {"status": "unavailable", "reason": reason} for name, reason in absent.items()}
        for name in (*builds, *absent):
            facts = {"status": "ok", **known[name]}
            if name in failures:
                facts = {"status": "failed", "reason": failures[name]}
            if name in samples:
                facts.update(
                    describe_samples([time_ms / calls for time_ms in samples[name]]), sm_clock_mhz=clock, power_w=power
                )
                seconds = facts["p50_ms"] / 1e3
                facts.update(flops=p.flops(mode), tflops=p.flops(mode) / seconds / 1e12)
                if mode == "forward":
                    facts.setdefault("min_bytes", p.min_bytes())
                    facts.update(gbps=facts["min_bytes"] / seconds / 1e9)
            row = case.row(name, scope="experts", **facts)
            self.rows.append(row)
            shown = row.reason if row.p50_ms is None else f"{row.p50_ms:9.4f} ms {row.tflops or 0:6.0f} TFLOP/s"
            at = f"{time.monotonic() - self.begin:6.1f} s  {case}"
            print(f"{at:72} {name:20} {shown}", flush=True)
        write_rows(self.path, self.rows)

    def note(self, finding: Finding) -> None:
        self.rows.append(finding)
        said = finding.reason or f"{finding.value:.4g} {finding.unit} ({finding.samples} samples)"
        print(f"{time.monotonic() - self.begin:6.1f} s  {finding.name}: {said}", flush=True)
        write_rows(self.path, self.rows)


def pass_job(p: Problem, run: Callable[[], torch.Tensor], mode: str) -> tuple[Job, dict[str, Any]]:
    """The timed call of a pass, its output checked first."""
    with torch.no_grad():
        errors = p.check(run())

    def forward(_: None) -> torch.Tensor:
        with torch.no_grad():
            return run()

    job = Job(forward) if mode == "forward" else Job(lambda _: torch.autograd.grad(run(), p.leaves, p.grad))
    warm_up(job, Timer(p.x.device), 0.0)
    memory = peak_memory_bytes(job, p.x.device)
    return job, dict(errors, peak_memory_bytes=memory)


def training(recorder: Recorder, ops: TritonExpertOps) -> None:
    for model, config, num_tokens in TRAINING:
        for routing in ROUTINGS if model == QWEN else ROUTINGS[:1]:
            p = Problem(config, num_tokens, routing)
            for mode in ("forward", "forward+backward"):
                builds: Builds = {"moe_gpu": lambda p=p, mode=mode: pass_job(p, lambda: run_ours(p, ops), mode)}
                if util.find_spec("sonicmoe") is not None:
                    builds["sonicmoe"] = lambda p=p, mode=mode: pass_job(p, lambda: run_sonicmoe(p), mode)
                if routing == "uniform":
                    builds["bmm"] = lambda p=p, mode=mode: (batched_products(p, mode), {})
                recorder.record(model, p, mode, "eager", builds)
            del p, builds
            torch.cuda.empty_cache()


def graph_job(p: Problem, calls: Sequence[Callable[[], torch.Tensor]], rounds: int = 1) -> tuple[Job, dict[str, Any]]:
    """One replay of rounds of calls, which compute the problem with a copy of the weights each; outputs are checked."""
    with torch.no_grad():
        errors = [p.check(call()) for call in calls]
        captured = capture(lambda: [call() for _ in range(rounds) for call in calls][-1], p.x.device)
    return Job(lambda _: captured.replay()), max(errors, key=lambda one: one["max_error"])


class GraphBench:
    """One model's weights in copies that rotate, and each peer's in its own layout; problems share them."""

    def __init__(self, recorder: Recorder, ops: TritonExpertOps, model: str, config: MoEConfig) -> None:
        self.recorder, self.ops, self.model, self.config = recorder, ops, model, config
        weight_bytes = 2 * config.num_experts * config.parameters_per_expert
        copies = 3 if weight_bytes < 4 << 30 else 2
        assert copies * weight_bytes > COPY_BYTES
        first = make_weights(config)
        self.stacked = [first] + [
            ExpertWeights(first.up_EGH.clone(), first.down_EOI.clone()) for _ in range(copies - 1)
        ]
        reasons = {peer.name: peer.unavailable() for peer in PEERS}
        self.absent = {name: reason for name, reason in reasons.items() if reason is not None}
        self.converted: dict[str, list[Any]] = {}

    def peer_job(self, peer: Peer, p: Problem, rounds: int) -> tuple[Job, dict[str, Any]]:
        if peer.name not in self.converted:
            self.converted[peer.name] = [peer.convert(weights) for weights in self.stacked]
        with torch.no_grad():
            calls = [peer.bind(p, weights) for weights in self.converted[peer.name]]
        job, facts = graph_job(p, calls, rounds)
        return job, dict(facts, backend=peer.backend)

    def record(self, num_tokens: int, routing: str) -> None:
        p = Problem(self.config, num_tokens, routing, self.stacked[0])
        rounds = min(MOST_ROUNDS, max(1, FEW_TOKENS // num_tokens))
        ours = [functools.partial(run_ours, p, self.ops, weights) for weights in self.stacked]
        builds: Builds = {"moe_gpu": lambda: graph_job(p, ours, rounds)}
        compared = num_tokens in PEER_SIZES
        if compared:
            present = [peer for peer in PEERS if peer.name not in self.absent]
            builds |= {peer.name: functools.partial(self.peer_job, peer, p, rounds) for peer in present}
        self.recorder.record(
            self.model,
            p,
            "forward",
            "graph",
            builds,
            calls=len(self.stacked) * rounds,
            budget_s=GRAPH_BUDGET_S,
            absent=self.absent if compared else {},
        )


def decode(recorder: Recorder, ops: TritonExpertOps) -> None:
    in_graphs(recorder, ops, uniform(DECODE))


def others(recorder: Recorder, ops: TritonExpertOps) -> None:
    in_graphs(recorder, ops, uniform(OTHERS))


def skew(recorder: Recorder, ops: TritonExpertOps) -> None:
    in_graphs(recorder, ops, SKEW)


def uniform(
    table: Sequence[tuple[str, MoEConfig, Sequence[int]]],
) -> list[tuple[str, MoEConfig, list[tuple[int, str]]]]:
    return [(name, config, [(tokens, "uniform") for tokens in sizes]) for name, config, sizes in table]


def in_graphs(
    recorder: Recorder, ops: TritonExpertOps, table: Sequence[tuple[str, MoEConfig, Sequence[tuple[int, str]]]]
) -> None:
    for model, config, problems in table:
        bench = GraphBench(recorder, ops, model, config)
        for num_tokens, routing in problems:
            bench.record(num_tokens, routing)
        del bench  # before the next model's weights are drawn
        torch.cuda.empty_cache()


def large_skew(recorder: Recorder, ops: TritonExpertOps) -> None:
    weights = make_weights(PRESETS[QWEN])
    for num_tokens in SKEW_EAGER_SIZES:
        skew_in_turn(recorder, ops, weights, num_tokens)


def skew_in_turn(recorder: Recorder, ops: TritonExpertOps, weights: ExpertWeights, num_tokens: int) -> None:
    """Every routing of so many tokens, eager and in turn, so that they share what the clock does."""
    cases, jobs, known = {}, {}, {}
    for routing in ("uniform", *SKEWS):
        p = Problem(PRESETS[QWEN], num_tokens, routing, weights)
        cases[routing] = Case(QWEN, p.config, num_tokens, torch.bfloat16, routing, "forward", "eager")
        jobs[routing], known[routing] = pass_job(p, functools.partial(run_ours, p, ops), "forward")
    samples, failures = time_interleaved(jobs, recorder.timer, dict.fromkeys(jobs, SKEW_SAMPLES))
    for routing, case in cases.items():
        facts = {"status": "failed", "reason": failures[routing]} if routing in failures else {"status": "ok"}
        if routing in samples:
            facts |= describe_samples(samples[routing])
        row = case.row("moe_gpu", scope="experts", **known[routing], **facts)
        recorder.rows.append(row)
        print(f"{case!s:72} {row.reason if row.p50_ms is None else f'{row.p50_ms:9.4f} ms'}", flush=True)
    write_rows(recorder.path, recorder.rows)


def fp8_job(
    p: Problem, ops: TritonExpertOps, way: Way, weights: Sequence[QuantisedExperts]
) -> tuple[Job, dict[str, Any]]:
    job, facts = graph_job(p, [functools.partial(way, p, ops, one) for one in weights])
    return job, dict(facts, min_bytes=p.min_bytes(weight_bytes=1))


def fp8(recorder: Recorder, ops: TritonExpertOps) -> None:
    config = PRESETS[QWEN]
    first = quantise(make_weights(config))
    stacked = [first, copy_of(first), copy_of(first)]
    assert len(stacked) * config.num_experts * config.parameters_per_expert > COPY_BYTES
    plain = [dequantised(weights) for weights in stacked]
    for num_tokens in FP8_SIZES:
        p = Problem(config, num_tokens, "uniform", plain[0])
        ours = [functools.partial(run_ours, p, ops, weights) for weights in plain]
        builds: Builds = {"moe_gpu": lambda p=p, ours=ours: graph_job(p, ours)}
        builds |= {name: functools.partial(fp8_job, p, ops, way, stacked) for name, way in WAYS.items()}
        recorder.record(QWEN, p, "forward", "graph", builds, calls=len(stacked), budget_s=GRAPH_BUDGET_S)


def count_unequal(p: Problem, run: Callable[[], tuple[torch.Tensor, ...]], repeats: int) -> int:
    """How many of `repeats` further calls differ in any bit from a first one, whose output is checked."""

    def run_for_bits() -> list[torch.Tensor]:
        return [tensor.contiguous().view(torch.uint8) for tensor in run()]

    p.check(run()[0])
    first = run_for_bits()
    unequal = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(repeats):
        unequal += torch.stack([(a != b).any() for a, b in zip(run_for_bits(), first, strict=True)]).any()
    return int(unequal)


def precision(recorder: Recorder, ops: TritonExpertOps) -> None:
    weights = make_weights(PRESETS[QWEN])
    for num_tokens, mode in PRECISION:
        p = Problem(PRESETS[QWEN], num_tokens, "uniform", weights)

        def run(p: Problem = p, mode: str = mode) -> tuple[torch.Tensor, ...]:
            with torch.set_grad_enabled(mode != "forward"):
                out = run_ours(p, ops)
                return (out,) if mode == "forward" else (out.detach(), *torch.autograd.grad(out, p.leaves, p.grad))

        outcome = attempt(functools.partial(count_unequal, p, run, REPEATS))
        recorder.note(
            Finding(
                name=f"{QWEN} T={num_tokens} {mode}: repeats that differ from the first call in any bit",
                value=outcome.value,
                unit="calls",
                samples=None if outcome.reason else REPEATS,
                verdict=None if outcome.reason else "missed" if outcome.value else "met",
                how="experts alone in bf16, eager; the output, and every gradient of a backward pass",
                reason=outcome.reason,
            )
        )


def sustained(run: Callable[[], torch.Tensor], uuid: str) -> dict[str, Any]:
    """A call's milliseconds while it runs over and over, and what clock and power the GPU settles at."""
    samples, clocks = [], []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    until = time.monotonic() + SUSTAINED_S
    while time.monotonic() < until or len(samples) < 2:
        begin.record()
        for _ in range(SUSTAINED_CALLS):
            run()
        end.record()
        clocks.append(nvml.sm_clock_mhz(uuid))  # the GPU is still at work
        end.synchronize()
        samples.append(begin.elapsed_time(end) / SUSTAINED_CALLS)
    settled = len(samples) // 2  # the first half brings power and clock there
    known = [clock for clock in clocks[settled:] if clock is not None]
    clock = statistics.median(known) if known else None
    return dict(describe_samples(samples[settled:]), sm_clock_mhz=clock, power_w=nvml.power_w(uuid))


@torch.no_grad()
def budget(recorder: Recorder, _: TritonExpertOps) -> None:
    """Not in turn: each budget runs at a clock of its own, since more SMs meet the power limit, so it is recorded."""
    uuid = f"GPU-{torch.cuda.get_device_properties(recorder.device).uuid}"
    for num_tokens in (4096, 16384):
        p = Problem(PRESETS[QWEN], num_tokens, "uniform")
        case = Case(QWEN, p.config, num_tokens, torch.bfloat16, p.routing, "forward", "eager")
        rates: dict[int, float] = {}
        for sms in BUDGETS:
            ops = TritonExpertOps("cuda", sm_budget=sms)
            errors = p.check(run_ours(p, ops))
            found = sustained(functools.partial(run_ours, p, ops), uuid)
            row = case.row(f"moe_gpu {sms} SMs", scope="experts, sustained", status="ok", **errors, **found)
            recorder.rows.append(row)
            clock = found["sm_clock_mhz"]
            print(f"{case!s:72} {row.provider:20} {row.p50_ms:9.4f} ms at {clock} MHz, {row.power_w} W", flush=True)
            if clock is not None:
                rates[sms] = 1 / (found["p50_ms"] * sms * clock)
            share = rates[sms] / rates[BUDGETS[0]] if {sms, BUDGETS[0]} <= set(rates) else None
            recorder.note(
                Finding(
                    name=f"{QWEN} T={num_tokens}: rate per SM and clock on {sms} SMs",
                    value=share,
                    unit=f"of that on {BUDGETS[0]}",
                    verdict=None if share is None else "met" if abs(share - 1) <= BUDGET_GOAL else "missed",
                    how=f"experts alone in bf16, forward, {SUSTAINED_S:g} s of calls, the second half timed",
                    reason="the driver tells no clock" if share is None else None,
                )
            )


def require_sorted(p: Problem, ops: TritonExpertOps) -> None:
    """RuntimeError unless the given choices are sorted as the reference sorts them."""
    found = ops.sort_routes(p.ids, p.scores, p.config.num_experts)
    rows = (found.demand_P, found.offsets_P, found.row_route_R, found.row_of_route_TK)
    wanted = sort_routes_reference(p.ids.cpu(), p.config.num_experts, None)
    if not all(torch.equal(row.cpu(), want) for row, want in zip(rows, wanted, strict=True)):
        raise RuntimeError("the routes are not sorted as by the reference")


def routing_jobs(p: Problem, ops: TritonExpertOps) -> dict[str, tuple[Job, int]]:
    """Graphs of routing alone and of the whole, by name, each with how many calls it holds; sorting is checked."""
    c = p.config
    require_sorted(p, ops)
    logits = torch.randn(p.num_tokens, c.num_experts, device=p.x.device, dtype=torch.bfloat16)
    weights = ExpertWeights(p.up, p.down)
    route = functools.partial(ops.route, logits, c.top_k, c.router)

    def graph(call: Callable[[], Any], count: int) -> tuple[Job, int]:
        captured = capture(lambda: [call() for _ in range(count)][-1], p.x.device)
        return Job(lambda _: captured.replay()), count

    return {
        "choosing from logits and sorting": graph(route, ROUTING_CALLS),
        "sorting given ids": graph(lambda: ops.sort_routes(p.ids, p.scores, c.num_experts), ROUTING_CALLS),
        "choosing, sorting and the experts": graph(lambda: ops.experts(p.x, route(), weights), 1),
    }


def routing(recorder: Recorder, ops: TritonExpertOps) -> None:
    weights = make_weights(PRESETS[QWEN])
    for num_tokens in ROUTING_SIZES:
        p = Problem(PRESETS[QWEN], num_tokens, "uniform", weights)
        with torch.no_grad():
            made = attempt(functools.partial(routing_jobs, p, ops))
            at = f"{QWEN} T={num_tokens}"
            if made.reason is not None:
                recorder.note(Finding(f"{at}: routing", None, "us", reason=made.reason))
                continue
            jobs: dict[str, tuple[Job, int]] = made.value
            samples, failures = time_interleaved(
                {name: job for name, (job, _) in jobs.items()}, recorder.timer, dict.fromkeys(jobs, 60)
            )
        for name, reason in failures.items():
            recorder.note(Finding(f"{at}: {name}", None, "us", reason=reason))
        median_us = {name: percentile(times, 0.5) / jobs[name][1] * 1e3 for name, times in samples.items()}
        for name, value in median_us.items():
            how = f"bf16, median of graphs of {jobs[name][1]} calls, cold L2"
            recorder.note(Finding(f"{at}: {name}", value, "us", samples=len(samples[name]), how=how))
        if len(median_us) == len(jobs):
            alone, _, whole = median_us.values()
            verdict = None if num_tokens < 4096 else "met" if alone / whole <= ROUTING_GOAL else "missed"
            how = "choosing and sorting over the whole"
            recorder.note(Finding(f"{at}: share of routing", alone / whole, "ratio", verdict=verdict, how=how))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--table", action="append", choices=TABLES, help="run this table; all without it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: needs an NVIDIA GPU of compute capability 9.0\n")
    recorder = Recorder(arguments.output)
    ops = TritonExpertOps("cuda")
    for name in arguments.table or TABLES:
        globals()[name](recorder, ops)
    print(f"{time.monotonic() - recorder.begin:.0f} s; results: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
