"""Record the expert cache on a GPU: `python benchmarks/run_expert_cache.py FILE.jsonl [--trace TRACE]`.

A stack of bf16 MoE layers of a real model's size, weights in pinned host memory, runs the steps of a routing trace.
Arms at 25, 50 and 75 % of the experts: on-demand copies, a static pin (by the trace's own counts), plain LRU, `auto`
without and with prefetching; beside them fully resident weights. All run in turn, then once more in reverse. Every
step's output is compared bit by bit with the resident one; times are of a step of all layers, host work included,
divided by the layers. Without `--trace` a small language model with the same experts and top-k is trained first on the
text that ships with Python, and the routing of held-out text is recorded; traces of another shape are refused.
`--smoke` runs tiny layers on a CPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from text_trace import record_text_trace
from torch import nn

from moe_gpu.benchmark.timing import attempt, describe_samples
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.expert_cache import ExpertCache
from moe_gpu.expert_cache.cache import ExpertCacheStats
from moe_gpu.expert_cache.simulate import counted, simulate
from moe_gpu.machine import describe_machine
from moe_gpu.model import AdvancedMoELayer, set_hbm_budget
from moe_gpu.profiler import RoutingTrace
from moe_gpu.results import ExpertCacheRow, Row, write_rows

MODEL = "olmoe-1b-7b"
SHARES = (0.25, 0.5, 0.75)
TOKENS = (1, 8, 64)
ARMS = ("on-demand", "static", "lru", "auto without prefetch", "auto")
RESIDENT = "resident"


@dataclass(frozen=True)
class Settings:
    """What of the real run a smoke test makes smaller."""

    config: MoEConfig
    device: torch.device
    dtype: torch.dtype
    layers: int
    steps: int
    training_steps: int
    seconds: float

    @property
    def expert_bytes(self) -> int:
        return self.config.parameters_per_expert * self.dtype.itemsize


class Stack(nn.Module):
    """Layers one after another, each with its share of a routing trace for its router's choices."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.config = settings.config
        self.layers = nn.ModuleList()
        for index in range(settings.layers):  # converted one by one: float32 of all at once is not needed
            torch.manual_seed(index)
            layer = AdvancedMoELayer.from_config(settings.config, use_cuda_graphs=False, layer_index=index)
            self.layers.append(layer.to(settings.dtype))
        self.eval().requires_grad_(False)

    def forward(self, x_TH: torch.Tensor, logits_LTE: torch.Tensor) -> torch.Tensor:
        for layer, logits_TE in zip(self.layers, logits_LTE, strict=True):
            x_TH = x_TH + layer(x_TH, router_logits_TE=logits_TE)[0]
        return x_TH


def steps_of(trace: RoutingTrace, settings: Settings, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and router logits that choose what the trace chose, in its order, on the device."""
    generator = torch.Generator().manual_seed(0)
    k = torch.arange(trace.top_k, 0, -1, dtype=torch.float32)
    found = []
    for step in range(min(settings.steps, trace.topk_ids_LTK.shape[1] // tokens)):
        ids_LTK = torch.stack([trace.replay(tokens, layer, step * tokens).long() for layer in range(trace.num_layers)])
        logits_LTE = torch.full((trace.num_layers, tokens, trace.num_experts), -20.0)
        logits_LTE.scatter_(2, ids_LTK, (0.3 * k).expand(ids_LTK.shape))
        x_TH = torch.randn(tokens, settings.config.input_dim, generator=generator)
        found.append((x_TH.to(settings.device, settings.dtype), logits_LTE.to(settings.device, settings.dtype)))
    return found


@torch.no_grad()
def timed(stack: Stack, steps: list, settings: Settings) -> tuple[list[torch.Tensor], list[float]]:
    """Every step's output, and its milliseconds a layer; stops early when its time is up."""
    outputs, times_ms = [], []
    begin = time.perf_counter()
    for x_TH, logits_LTE in steps:
        start = time.perf_counter()
        outputs.append(stack(x_TH, logits_LTE))
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
        now = time.perf_counter()
        times_ms.append((now - start) * 1e3 / settings.layers)
        if now - begin > settings.seconds:
            break
    return outputs, times_ms


@dataclass(frozen=True)
class Outcome:
    """One pass of an arm: whether its outputs were exact, milliseconds a layer of each timed step, the statistics."""

    exact: bool
    times_ms: list[float]
    stats: ExpertCacheStats


class Recorder:
    def __init__(self, path: Path, settings: Settings, trace: RoutingTrace) -> None:
        self.path, self.settings, self.trace = path, settings, trace
        self.rows: list[Row] = [describe_machine(settings.device)]
        self.stack = Stack(settings)
        set_hbm_budget(self.stack, "100%")
        self.stack.to(settings.device)

    def arm(self, name: str, share: float, steps: list, expected: list[torch.Tensor]) -> Outcome:
        """Run one arm over the steps; its first quarter warms it up and is not timed."""
        policy = name.split()[0]
        profile = self.trace.counts_LE() if policy == "static" else None
        policy = "auto" if policy == RESIDENT else policy
        cache = ExpertCache(share, policy, prefetch=name == "auto", profile_LE=profile)
        set_hbm_budget(self.stack, cache)
        outputs, times_ms = timed(self.stack, steps, self.settings)
        exact = all(torch.equal(got, wanted) for got, wanted in zip(outputs, expected, strict=False))
        return Outcome(exact and bool(outputs[0].abs().max() > 0), times_ms[len(times_ms) // 4 :], cache.stats())

    def row(self, name: str, slots: int, tokens: int, passes: list[Outcome], failure: str | None) -> ExpertCacheRow:
        """The passes' times together, the statistics of the last; of no pass if one failed."""
        trace = self.trace
        shape = (trace.source, name, trace.num_layers, trace.num_experts, trace.top_k, slots, tokens)
        if failure is not None:
            return ExpertCacheRow(*shape, simulated=False, status="failed", reason=failure)
        exact = all(one.exact for one in passes)
        stats = passes[-1].stats
        values = describe_samples([time_ms for one in passes for time_ms in one.times_ms])
        return ExpertCacheRow(
            *shape,
            simulated=False,
            status="ok" if exact else "wrong",
            reason=None if exact else "an output differs from that of fully resident weights",
            expert_bytes=self.settings.expert_bytes,
            bytes_copied=stats.counts.bytes_copied,
            prefetch=name == "auto",
            serving=stats.policy,
            policy_switches=stats.policy_switches,
            bit_exact=exact,
            **{field: values[field] for field in ("samples", "mean_ms", "p50_ms", "p95_ms")},  # type: ignore[arg-type]
            **counted(stats.counts, self.settings.expert_bytes),
        )

    def run(self, tokens: int) -> None:
        """All arms at one number of tokens a step, there and back; one that fails is a row, and the next goes on."""
        steps = steps_of(self.trace, self.settings, tokens)
        set_hbm_budget(self.stack, "100%")
        expected = timed(self.stack, steps[:2], self.settings)[0]  # loads and compiles
        expected = timed(self.stack, steps, self.settings)[0]
        arms = [(RESIDENT, 1.0), *((name, share) for share in SHARES for name in ARMS)]
        passes: dict[tuple[str, float], list[Outcome]] = {arm: [] for arm in arms}
        failures: dict[tuple[str, float], str] = {}
        for arm in (*arms, *reversed(arms)):  # a host that slows down slows the first arms' second pass too
            if arm not in failures:
                outcome = attempt(functools.partial(self.arm, *arm, steps, expected))
                if outcome.reason is None:
                    passes[arm].append(outcome.value)
                else:
                    failures[arm] = outcome.reason
        for name, share in arms:
            slots = max(1, round(share * self.trace.num_experts))
            self.rows.append(self.row(name, slots, tokens, passes[name, share], failures.get((name, share))))
            print(line(self.rows[-1]), flush=True)
        write_rows(self.path, self.rows)

    def simulated(self) -> None:
        """What knowing the future would have reached, for scale."""
        for share in SHARES:
            slots = max(1, round(share * self.trace.num_experts))
            short = replace(self.trace, topk_ids_LTK=self.trace.topk_ids_LTK[:, : self.settings.steps])
            outcome = attempt(lambda slots=slots, short=short: simulate(short, slots, "optimal"))
            if outcome.reason is None:
                self.rows.append(outcome.value)
                print(line(outcome.value), flush=True)
        write_rows(self.path, self.rows)


def line(row: Row) -> str:
    assert isinstance(row, ExpertCacheRow)
    where = f"T={row.tokens_per_step:<3} {row.slots_per_layer:3}/{row.num_experts} {row.policy:22}"
    if row.status == "failed":
        return f"{where} failed: {row.reason}"
    rate = "   -  " if row.hit_rate is None else f"{row.hit_rate:6.1%}"
    speed = "simulated" if row.mean_ms is None else f"{row.mean_ms:8.3f} ms a layer (p50 {row.p50_ms:.3f})"
    gib = "" if row.bytes_copied is None else f" {row.bytes_copied / 2**30:7.2f} GiB copied"
    same = "" if row.bit_exact is None else " bit-exact" if row.bit_exact else " WRONG BITS"
    return f"{where} hits {rate} {speed}{gib}{same}"


def summary(rows: list[Row]) -> str:
    """The mean times of each share beside on-demand copies, which the goal of 2x is set against."""
    measured = [row for row in rows if isinstance(row, ExpertCacheRow) and row.mean_ms is not None]
    found = {(row.tokens_per_step, row.slots_per_layer, row.policy): row.mean_ms for row in measured}
    lines = ["mean ms a layer: on-demand -> others (times faster than on-demand)"]
    for row in measured:
        if row.policy == "on-demand":
            at = row.tokens_per_step, row.slots_per_layer
            times = {name: found[(*at, name)] for name in ARMS[1:] if (*at, name) in found}
            whole = found.get((row.tokens_per_step, row.num_experts, RESIDENT))
            if whole is not None:
                times[RESIDENT] = whole
            others = ", ".join(f"{name} {ms:.3f} ({row.mean_ms / ms:.2f}x)" for name, ms in times.items())
            lines.append(f"T={at[0]:<3} {at[1]:3}/{row.num_experts}: {row.mean_ms:.3f} -> {others}")
    wrong = sum(isinstance(row, ExpertCacheRow) and row.status != "ok" for row in rows)
    return "\n".join([*lines, f"{wrong} arms wrong or failed"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--trace", type=Path, help="a recorded routing trace of as many experts and as large a top-k")
    parser.add_argument("--preset", default=MODEL, choices=list(PRESETS), help="the layers' sizes")
    parser.add_argument("--layers", type=int, default=4, help="layers, if no trace says how many")
    parser.add_argument("--smoke", action="store_true", help="tiny layers on a CPU, to test this script")
    given = parser.parse_args(arguments)
    if not given.smoke and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: needs an NVIDIA GPU; --smoke tests the script on a CPU\n")
    trace = RoutingTrace.load(given.trace) if given.trace else None
    layers = trace.num_layers if trace else given.layers
    config = PRESETS[given.preset].with_(shared_hidden_dim=0, selection_bias=False)
    settings = Settings(config, torch.device("cuda"), torch.bfloat16, layers, 200, 400, 3.0)
    if given.smoke:
        tiny = config.with_(input_dim=16, expert_dim=16, hidden_dim=8, num_experts=8, top_k=2, bias=False)
        settings = Settings(tiny, torch.device("cpu"), torch.float32, min(layers, 2), 12, 3, 1.0)
    c = settings.config
    trace = trace or record_text_trace(c, layers, settings.training_steps, 64 * settings.steps, settings.device)
    if (trace.num_experts, trace.top_k) != (c.num_experts, c.top_k):
        parser.exit(
            2,
            f"{parser.prog}: error: the trace has {trace.num_experts} experts, top {trace.top_k}; {given.preset} has "
            f"{c.num_experts}, top {c.top_k}: give a trace of those or another --preset\n",
        )
    begin = time.perf_counter()
    recorder = Recorder(given.output, settings, trace)
    for tokens in TOKENS:
        outcome = attempt(lambda tokens=tokens: recorder.run(tokens))
        if outcome.reason is not None:
            print(f"T={tokens}: failed: {outcome.reason}", flush=True)
    recorder.simulated()
    print(f"{time.perf_counter() - begin:.0f} s; results: {given.output}")
    print(summary(recorder.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
