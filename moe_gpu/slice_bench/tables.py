"""The tables of `moe-gpu slices bench`, a function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from moe_gpu.model import AdvancedMoELayer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.results import percentile
from moe_gpu.slice_bench.adaptive import measure_adaptive
from moe_gpu.slice_bench.bench import Part, SliceBench, background, run_all
from moe_gpu.slices.costs import CostPoint, CostTable
from moe_gpu.slices.plan import BackendUnavailableError

COST_CALLS = 8


def _median(samples: Sequence[float]) -> dict[str, Any]:
    return {"samples": len(samples), "p50_ms": percentile(samples, 0.5)}


def _tail(samples: Sequence[float]) -> dict[str, Any]:
    return {**_median(samples), "p99_ms": percentile(samples, 0.99), "max_ms": max(samples)}


def measure_partition(bench: SliceBench) -> None:
    """SMs that blocks really ran on in each of two partitions, eager and in a replayed graph, and those in both."""
    if not bench.on_gpu:
        raise BackendUnavailableError("SMs can be told apart on a GPU only")
    from moe_gpu.triton_kernels.sm_ids import record_sm_ids

    with bench.partitions(64, 32) as parts:
        seen: dict[str, list[set[int]]] = {"eager": [], "graph": []}
        for asked, part in zip((64, 32), parts, strict=True):
            out = torch.full((8 * bench.num_sms,), -1, dtype=torch.int32, device=bench.device)
            torch.cuda.synchronize(bench.device)
            for launch in seen:
                call = partial(record_sm_ids, out)
                run = call if launch == "eager" else bench.graphed(call, part)
                out.fill_(-1)
                torch.cuda.synchronize(bench.device)
                with part.current():
                    run()
                part.wait()
                found = set(out.tolist())
                seen[launch].append(found)
                facts = dict(asked_sms=asked, got_sms=part.sms, value=float(len(found)), unit="SMs")
                bench.add("partition", "green_context", f"SMs seen, {launch}", **facts)
        for launch, (first, second) in seen.items():
            shared = float(len(first & second))
            bench.add("partition", "green_context", f"SMs in both parts, {launch}", value=shared, unit="SMs")


def measure_rates(bench: SliceBench) -> None:
    """GEMM and copy rate on the whole device and on green contexts of each size."""
    n, moved = bench.sizes.matmul, 2 * bench.sizes.copy_bytes
    work = {"matmul": (bench.matmul(), 2 * n**3, "FLOP/s"), "copy": (bench.copies(), moved, "B/s")}

    def rate(what: str, part: Part) -> dict[str, Any]:
        call, amount, unit = work[what]
        facts = _median(bench.per_call_ms(call, part))
        return {**facts, "got_sms": part.sms, "value": amount / facts["p50_ms"] * 1e3, "unit": unit}

    def in_context(what: str, sms: int) -> dict[str, Any]:
        with bench.partitions(sms) as (part,):
            return rate(what, part)

    for what in work:
        bench.trial("rate", "alone", what, partial(rate, what, bench.whole()), asked_sms=bench.num_sms)
        for sms in bench.sizes.splits:
            bench.trial("rate", "green_context", what, partial(in_context, what, sms), asked_sms=sms)


def measure_launches(bench: SliceBench) -> None:
    """A tiny launch, and a replay of a graph of twenty, on a plain stream and in a green context."""
    small = torch.zeros(1, device=bench.device)

    def twenty() -> None:
        for _ in range(20):
            small.add_(1)

    def launch(part: Part, graph: bool) -> dict[str, Any]:
        call = bench.graphed(twenty, part) if graph else lambda: small.add_(1)
        return {**_median(bench.per_call_ms(call, part)), "got_sms": part.sms}

    for graph, what in ((False, "one launch"), (True, "replay of 20 launches")):
        bench.trial("launch", "alone", what, partial(launch, bench.whole(), graph))

        def in_context(graph: bool = graph) -> dict[str, Any]:
            with bench.partitions(64) as (part,):
                return launch(part, graph)

        bench.trial("launch", "green_context", what, in_context, asked_sms=64)


def measure_costs(bench: SliceBench) -> None:
    """Experts' products against experts, rows and SMs; then the slowdown beside a neighbour. Fills `bench.costs`."""
    c, sizes = bench.config, bench.sizes
    points: list[CostPoint] = []
    experts = [count for count in sizes.cost_experts if count <= c.num_experts]

    def measure(part: Part, sms: int) -> None:
        for count in experts:
            for rows in sizes.cost_rows:
                # Other experts each time, so that few experts' weights are not found in the L2; as one graph, so that
                # no launch is timed.
                calls = [bench.experts(rows, count, sms, first=count * number) for number in range(COST_CALLS)]
                run = bench.graphed(partial(run_all, calls), part)
                facts = _median([time_ms / COST_CALLS for time_ms in bench.per_call_ms(run, part)])
                points.append(CostPoint(count, rows, sms, facts["p50_ms"]))
                bench.add("cost", "green_context", f"{rows} rows of {count} experts", got_sms=part.sms, **facts)

    for sms in sizes.cost_sms:
        with bench.partitions(sms) as (part,):
            measure(part, part.sms)
    measure(bench.whole(), bench.num_sms)
    half = sizes.cost_sms[-1] // 2 // 8 * 8 or 8
    rows = sizes.cost_rows[1]
    with bench.partitions(half, half) as (left, right):
        mine = bench.graphed(bench.experts(rows, experts[-1], left.sms), left)
        alone = percentile(bench.per_call_ms(mine, left), 0.5)
        with background(bench, bench.experts(rows, experts[-1], right.sms), right):
            beside = percentile(bench.per_call_ms(mine, left), 0.5)
        short = bench.graphed(bench.experts(sizes.cost_rows[0], 1, left.sms), left)
        shorter = bench.graphed(bench.experts(sizes.cost_rows[0], 1, right.sms), right)
        single = percentile(bench.latency_ms(short, left, 0.1), 0.5)

        def both() -> None:
            short()
            with right.current():
                shorter()
            right.wait()

        double = percentile(bench.latency_ms(both, left, 0.1), 0.5)
    slowdown, launch_ms = max(1.0, beside / alone), max(0.0, double - single)
    bench.add("cost", "green_context", "time beside a busy neighbour", value=beside / alone, unit="ratio")
    bench.add("cost", "green_context", "added by a second slice", p50_ms=double - single)
    table = CostTable(
        bench.machine, bench.preset, str(bench.dtype)[6:], "green_context", tuple(points), slowdown, launch_ms
    )
    table.check()
    bench.costs = table


def measure_interference(bench: SliceBench) -> None:
    """A decode step's latency in one partition while the other idles, copies, or multiplies."""
    with bench.partitions(64, 64) as (part, other):
        step = bench.graphed(bench.decode(part.sms), part)
        known = dict(asked_sms=64, got_sms=part.sms, background_sms=other.sms)
        latency = partial(bench.latency_ms, step, part, bench.sizes.isolation_s / 3)
        bench.trial("interference", "alone", "decode step", lambda: _tail(latency()), **known)
        neighbours = {"copies": bench.copies(), "products": bench.matmul()}
        for name, call in neighbours.items():

            def beside(call: Callable[[], Any] = call) -> dict[str, Any]:
                with background(bench, call, other):
                    return _tail(latency())

            bench.trial("interference", "green_context", f"decode step beside {name}", beside, **known)


def measure_isolation(bench: SliceBench) -> None:
    """Latency of a decode step and the rate of background work, by each means of keeping them apart."""
    rows = bench.sizes.background_tokens * bench.config.top_k

    def work(kind: str, sms: int | None) -> Callable[[], Any]:
        return bench.matmul() if kind == "matmul" else bench.experts(rows, bench.config.num_experts, sms)

    def alone(kind: str) -> dict[str, Any]:
        ms = percentile(bench.per_call_ms(work(kind, None), bench.whole()), 0.5)
        return {"p50_ms": ms, "value": 1e3 / ms, "unit": "background calls/s"}

    def decode_alone() -> dict[str, Any]:
        part = bench.whole()
        return _tail(bench.latency_ms(bench.graphed(bench.decode(None), part), part, bench.sizes.isolation_s))

    def pair(front: Part, back: Part, kind: str, sms: int | None, back_sms: int | None) -> dict[str, Any]:
        step = bench.graphed(bench.decode(sms), front)
        with background(bench, work(kind, back_sms), back) as rate:
            facts = _tail(bench.latency_ms(step, front, bench.sizes.isolation_s))
            return {**facts, "value": rate(), "unit": "background calls/s"}

    def green(kind: str, sms: int) -> dict[str, Any]:
        with bench.partitions(sms, (bench.num_sms - sms) // 8 * 8) as (front, back):
            facts = pair(front, back, kind, front.sms, back.sms)
            return {**facts, "got_sms": front.sms, "background_sms": back.sms}

    bench.trial("isolation", "alone", "decode step", decode_alone)
    for kind in ("experts", "matmul"):
        bench.trial("isolation", "alone", f"background {kind}", partial(alone, kind))
        what = f"decode step beside {kind}"
        for arm, priority in (("unsliced", 0), ("priorities", -5)):
            run = partial(pair, bench.whole(priority), bench.whole(), kind, None, None)
            bench.trial("isolation", arm, what, run)
        for sms in bench.sizes.foreground_sms:
            left = bench.num_sms - sms
            if kind == "matmul":
                reason = "PyTorch's product takes no budget of thread blocks"
                bench.add("isolation", "cta", what, status="unavailable", reason=reason, asked_sms=sms)
            else:
                run = partial(pair, bench.whole(), bench.whole(), kind, sms, left)
                bench.trial("isolation", "cta", what, run, asked_sms=sms, background_sms=left)
            bench.trial("isolation", "green_context", what, partial(green, kind, sms), asked_sms=sms)


def measure_profiler(bench: SliceBench) -> None:
    """A layer in a graph with and without ExpertProfiler, replayed in turn."""
    part = bench.whole()
    layer = AdvancedMoELayer.from_config(bench.config).to(bench.device, bench.dtype)
    x = torch.randn(bench.sizes.profiler_tokens, bench.config.input_dim, device=bench.device, dtype=bench.dtype)
    runs: dict[str, Callable[[], Any]] = {}
    for name, profiler in (("without", None), ("with", ExpertProfiler(bench.config.num_experts))):
        if profiler is not None:
            profiler.attach(bench.device)
        layer.profiler = profiler
        with torch.no_grad():
            runs[name] = bench.graphed(lambda: layer(x)[0], part)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            samples[name] += bench.per_call_ms(run, part)
    for name, times in samples.items():
        bench.add("profiler", name, f"layer, T={bench.sizes.profiler_tokens}, in a graph", **_median(times))
    ratio = percentile(samples["with"], 0.5) / percentile(samples["without"], 0.5)
    bench.add("profiler", "with over without", "layer in a graph", value=ratio, unit="ratio")


SECTIONS: dict[str, Callable[[SliceBench], None]] = {
    "partition": measure_partition,
    "rate": measure_rates,
    "launch": measure_launches,
    "isolation": measure_isolation,
    "interference": measure_interference,
    "profiler": measure_profiler,
    "cost": measure_costs,
    "adaptive": measure_adaptive,
}
