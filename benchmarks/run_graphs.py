"""Record what graphs and streams do on a GPU: `python benchmarks/run_graphs.py benchmarks/results/h200_graphs.jsonl`.

Table `graphs`: a Qwen3-30B-A3B layer, eager and replayed, 1 to 256 tokens: milliseconds a call when calls are queued
one after another and when each is waited for, and the time of the kernels themselves by torch.profiler. Table `beside`:
a shared expert and the routed ones, after each other, on plain streams and in slices, each arm as a graph. Table
`divided`: the experts of one layer undivided, and in two and four groups in slices by measured load, each as a graph.
All arms of a comparison take turns; outputs are checked before they are timed. Under two minutes. `--trial` runs tiny
work on the CPU instead, to try the script: its rows hold no numbers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark.problem import Problem, make_problem
from moe_gpu.benchmark.providers import use_tensors
from moe_gpu.cuda_graph_manager import Arm, BatchScheduler, CUDAGraphManager, StreamManager
from moe_gpu.cuda_graph_manager.scheduler import IN_TURN, STREAMS, time_graphs
from moe_gpu.expert_slices import ExpertSlices
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.results import SliceRow, percentile
from moe_gpu.slice_bench import Sizes, SliceBench, print_summary, why_not
from moe_gpu.slices.plan import SliceError

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARED_TOKENS, SHARED_WIDTHS = (16, 64, 256), (768, 5632)  # an expert's width, and that of Qwen1.5-MoE-A2.7B
DIVIDED_TOKENS, ROUTINGS = (16, 256, 1024, 4096), ("uniform", "zipf-1.2")
UNDIVIDED = Arm("undivided")
ROUNDS, QUEUED, PROFILED, INPUTS = 30, 20, 20, 8


def facts_of(times_ms: Sequence[float]) -> dict[str, Any]:
    return dict(samples=len(times_ms), p50_ms=percentile(times_ms, 0.5), p99_ms=percentile(times_ms, 0.99))


def build_layer(bench: SliceBench, graphs: CUDAGraphManager | bool, shared: int = 0) -> AdvancedMoELayer:
    config = bench.config.with_(shared_hidden_dim=shared)
    with bench.device:  # weights drawn on the host would take most of the run
        layer = AdvancedMoELayer.from_config(config, use_cuda_graphs=graphs, enable_energy_monitoring=False)
    return layer.to(bench.device, bench.dtype).eval()


def inputs(bench: SliceBench, num_tokens: int) -> list[torch.Tensor]:
    shape = (num_tokens, bench.config.input_dim)
    return [torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(INPUTS)]


def require_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error, scale = (float(value.abs().max()) for value in (actual.float() - expected.float(), expected.float()))
    if not error <= 0.02 * scale:
        raise RuntimeError(f"wrong output: error {error:.3g} at a scale of {scale:.3g}")


def measure_graphs(bench: SliceBench) -> None:
    """Eager calls against replays, which copy their input and, but for `bare`, their results."""
    layer = build_layer(bench, CUDAGraphManager())
    eager = build_layer(bench, False)
    eager.load_state_dict(layer.state_dict())
    managers = {"output": CUDAGraphManager(), "bare": CUDAGraphManager(clone=False)}

    def output(x: torch.Tensor) -> torch.Tensor:
        return eager(x)[0]

    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "eager": eager,
        "replay": layer,
        "replay, output only": managers["output"].wrap(output),
        "replay, bare": managers["bare"].wrap(output),
    }
    for num_tokens in TOKENS if bench.on_gpu else (1, 3):
        given = inputs(bench, num_tokens)
        for x in (*given, *given):
            require_same(calls["replay"](x)[0], calls["eager"](x)[0])
            for name in ("replay, output only", "replay, bare"):
                require_same(calls[name](x), calls["eager"](x)[0])
        for name, manager in (("replay", layer.graphs), *managers.items()):
            assert manager is not None
            if bench.on_gpu and manager.get_stats()["graphs"] < 1 + TOKENS.index(num_tokens):
                raise RuntimeError(f"{name} was not captured for {num_tokens} tokens: {manager.get_stats()}")
        time_calls(bench, calls, given)
    for name, manager in (("replay", layer.graphs), *managers.items()):
        assert manager is not None
        stats = manager.get_stats()
        print(f"{name}: {stats}")
        bench.add("graphs", name, "memory of all graphs", value=float(stats["memory_bytes"]), unit="B")


def time_calls(
    bench: SliceBench, calls: Mapping[str, Callable[[torch.Tensor], Any]], given: Sequence[torch.Tensor]
) -> None:
    """Rows of one number of tokens: the arms in turn, then the kernels of each arm."""

    def wait() -> None:
        if bench.on_gpu:
            torch.cuda.synchronize(bench.device)

    def timed(call: Callable[[torch.Tensor], Any], count: int) -> float:
        wait()
        begin = time.perf_counter()
        for number in range(count):
            call(given[number % INPUTS])
        wait()
        return (time.perf_counter() - begin) / count * 1e3

    num_tokens = given[0].shape[0]
    queued: dict[str, list[float]] = {name: [] for name in calls}
    waited: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS if bench.on_gpu else 2):
        for name, call in calls.items():
            queued[name].append(timed(call, QUEUED))
            waited[name] += [timed(call, 1) for _ in range(10)]
    for name, call in calls.items():
        bench.add("graphs", name, f"layer, T={num_tokens}, queued", **facts_of(queued[name]))
        bench.add("graphs", name, f"layer, T={num_tokens}, waited for", **facts_of(waited[name]))
        if not bench.on_gpu:
            continue
        total_ms, busy_ms = kernel_ms(call, given)
        for what, value in (("sum of kernels", total_ms), ("busy with kernels", busy_ms)):
            bench.add("graphs", name, f"layer, T={num_tokens}, {what}", value=value, unit="ms")
        ratio = percentile(queued[name], 0.5) / total_ms
        bench.add("graphs", name, f"layer, T={num_tokens}, queued over sum of kernels", value=ratio, unit="ratio")


def kernel_ms(call: Callable[[torch.Tensor], Any], given: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Milliseconds a call: all kernels and copies added up, and the time in which any of them ran."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(PROFILED):
            call(given[number % INPUTS])
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        raise RuntimeError("torch.profiler saw no kernel")
    busy_us, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy_us += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return sum(end - start for start, end in spans) / PROFILED / 1e3, busy_us / PROFILED / 1e3


def measure_beside(bench: SliceBench) -> None:
    """The shared expert beside the routed ones in every way that the scheduler knows, and what it chose."""
    arms = None if bench.on_gpu else (IN_TURN, STREAMS)
    kept: dict[Arm, list[float]] = {}

    def timer(
        calls: Mapping[Arm, Callable[[], Any]], device: torch.device, samples: int
    ) -> tuple[dict[Arm, list[float]], dict[Arm, str]]:
        kept.clear()
        times, failures = time_graphs(calls, device, samples) if bench.on_gpu else ({arm: [1.0] for arm in calls}, {})
        kept.update(times)
        return times, failures

    scheduler = BatchScheduler(StreamManager(1, bench.device), arms, samples=100, timer=timer)
    sizes = itertools.product(SHARED_WIDTHS, SHARED_TOKENS) if bench.on_gpu else [(16, 3)]
    for width, num_tokens in sizes:
        layer = build_layer(bench, False, width)
        what = f"shared expert of {width} beside routed, T={num_tokens}"
        x = inputs(bench, num_tokens)[0]
        expected = layer(x)[0]
        layer.use_scheduler(scheduler)
        require_same(layer(x)[0], expected)
        choice = list(scheduler.choices.values())[-1]
        for arm, times_ms in kept.items():
            main, side = arm.sms or (None, None)
            bench.add("beside", arm.name, what, asked_sms=main, background_sms=side, **facts_of(times_ms))
        for name, reason in choice.refused.items():
            bench.add("beside", name, what, status="unavailable", reason=reason)
        if kept:
            gain = choice.times_ms[IN_TURN.name] / choice.times_ms[choice.arm.name]
            bench.add("beside", "chosen", f"{what}: {choice.arm.name}", value=gain, unit="ratio")
        print(f"{what}: {choice.reason}")
        scheduler.choices.clear()
    scheduler.close()


def measure_divided(bench: SliceBench) -> None:
    """A layer's experts undivided, and in groups that PROPORTIONAL gave slices by their loads in this very routing."""
    sizes = itertools.product(DIVIDED_TOKENS, ROUTINGS) if bench.on_gpu else [(6, "uniform")]
    for num_tokens, routing in sizes:
        problem = make_problem(bench.config, num_tokens, routing, bench.dtype, bench.device)
        with torch.device("meta"):
            layer = AdvancedMoELayer.from_config(bench.config, use_cuda_graphs=False, enable_energy_monitoring=False)
        use_tensors(layer.eval(), problem)
        what = f"layer, T={num_tokens}, {routing}"
        expected, stats = layer(problem.x_TH, problem.logits())
        loads = stats.counts_E.tolist()
        calls: dict[Arm, Callable[[], Any]] = {UNDIVIDED: partial(call_divided, layer, problem, None)}
        plans: dict[Arm, tuple[int, ...]] = {}
        for backend, groups in itertools.product(("cta", "green_context"), (2, 4)):
            arm = Arm(f"{backend}, {groups} groups", True, backend)
            try:
                layer.divide_experts(groups, backend)
            except SliceError as error:
                bench.add("divided", arm.name, what, status="unavailable", reason=str(error))
                continue
            divided = layer.divided
            assert divided is not None
            divided.manager.optimize_allocations(loads)
            plans[arm] = divided.manager.plan.sms
            calls[arm] = partial(call_divided, layer, problem, divided)
            require_same(calls[arm](), expected)
        layer.divided = None
        if not bench.on_gpu:
            for arm in calls:
                bench.add("divided", arm.name, what)
            continue
        times, failures = time_graphs(calls, bench.device, samples=60)
        medians = {arm: percentile(times_ms, 0.5) for arm, times_ms in times.items()}
        for arm, times_ms in times.items():
            shown = what if arm == UNDIVIDED else f"{what}: {'+'.join(map(str, plans[arm]))} SMs"
            bench.add("divided", arm.name, shown, **facts_of(times_ms))
            bench.add(
                "divided", arm.name, f"{what}, over undivided", value=medians[arm] / medians[UNDIVIDED], unit="ratio"
            )
        for arm, reason in failures.items():
            bench.add("divided", arm.name, what, status="failed", reason=reason)
        print(f"{what}: " + ", ".join(f"{arm.name} {median * 1e3:.0f} us" for arm, median in medians.items()))


def call_divided(layer: AdvancedMoELayer, problem: Problem, divided: ExpertSlices | None) -> torch.Tensor:
    layer.divided = divided
    return layer(problem.x_TH, problem.logits())[0]


SECTIONS = {"graphs": measure_graphs, "beside": measure_beside, "divided": measure_divided}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--table", action="append", choices=sorted(SECTIONS), help="run this one; all without it")
    parser.add_argument("--trial", action="store_true", help="tiny work on the CPU: only tries the script")
    arguments = parser.parse_args()
    reason = None if arguments.trial else why_not()
    if reason:
        parser.exit(1, f"{parser.prog}: {reason}\n")
    device = torch.device("cpu") if arguments.trial else torch.device("cuda", torch.cuda.current_device())
    sizes = Sizes.tiny() if arguments.trial else Sizes()
    bench = SliceBench("qwen3-30b-a3b", sizes, device, seconds=300.0, output=arguments.output)
    with torch.no_grad():
        for name in arguments.table or SECTIONS:
            bench.section(name, SECTIONS[name])
    print_summary(bench.rows)
    print(f"results: {arguments.output}")
    statuses = [row.status for row in bench.rows if isinstance(row, SliceRow)]
    return 1 if "failed" in statuses or not statuses else 0


if __name__ == "__main__":
    sys.exit(main())
