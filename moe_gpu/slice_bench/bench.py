"""SliceBench: slices to measure in, clocks as the caller sees them, and the work that is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark.timing import attempt
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.machine import describe_machine
from moe_gpu.profiler import RoutingTrace
from moe_gpu.reference import ExpertWeights
from moe_gpu.results import Row, SliceRow, SliceSeries, percentile, write_rows
from moe_gpu.slices.costs import CostTable
from moe_gpu.slices.green import keep_partitions, take_partitions
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.triton_kernels.ops import TritonExpertOps


@dataclass(frozen=True)
class Sizes:
    """How large the measured work is. `tiny()` only tries the program, on any machine."""

    splits: tuple[int, ...] = (8, 16, 32, 48, 64, 96, 112, 128)
    matmul: int = 4096
    copy_bytes: int = 512 << 20
    cost_sms: tuple[int, ...] = (8, 16, 32, 64, 96, 128)
    cost_rows: tuple[int, ...] = (128, 1024, 8192, 65536)
    cost_experts: tuple[int, ...] = (1, 8, 32, 128)
    decode_tokens: int = 16
    background_tokens: int = 16384
    foreground_sms: tuple[int, ...] = (32, 64)
    isolation_s: float = 3.0
    profiler_tokens: int = 256
    least_s: float = 0.03  # of one sample of a rate
    samples: int = 7
    quiet_rows: int = 128  # of a group of experts, a call
    phase_steps: int = 24  # of a load that shifts, until it does
    step_repeats: int = 7

    @classmethod
    def tiny(cls) -> Sizes:
        return cls((8, 64), 64, 1 << 16, (8, 64), (8, 256), (1, 8), 2, 64, (32,), 0.02, 16, 0.0005, 2, 4, 2, 1)


@dataclass(frozen=True)
class Part:
    """A slice to measure in: the SMs that it got, and its stream (None on a CPU, where the program is only tried)."""

    sms: int
    stream: torch.cuda.Stream | None

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def current(self) -> Any:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class SliceBench:
    """One run: the device, the sizes, the rows so far (written after every section) and the time left."""

    def __init__(self, preset: str, sizes: Sizes, device: torch.device, seconds: float, output: Path | None) -> None:
        self.device, self.sizes, self.output = device, sizes, output
        self.on_gpu = device.type == "cuda"
        self.config: MoEConfig = PRESETS[preset]
        self.preset = preset
        if not self.on_gpu:
            self.config = MoEConfig(32, 32, 16, 8, 2)
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count if self.on_gpu else 132
        self.machine = describe_machine(device)
        self.rows: list[Row] = [self.machine]
        self.deadline = time.monotonic() + seconds
        self.costs: CostTable | None = None
        self.trace: tuple[RoutingTrace, int, int] | None = (
            None  # to be replayed: which layer, in calls of how many tokens
        )
        self._weights: ExpertWeights | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    # Rows

    def add(self, table: str, arm: str, what: str, **facts: Any) -> None:
        if not self.on_gpu and facts.get("status", "ok") == "ok":
            facts = {"status": "unavailable", "reason": "tried on a CPU: nothing was measured"}
        self.rows.append(SliceRow(table, arm, what, **facts))

    def add_series(self, series: SliceSeries) -> None:
        if not self.on_gpu:
            reason = "tried on a CPU: nothing was measured"
            series = SliceSeries(series.scenario, series.policy, "unavailable", reason)
        self.rows.append(series)

    def section(self, table: str, run: Callable[[SliceBench], None]) -> None:
        """Run a section; what it leaves undone is a row with the reason. Rows are written after it."""
        if time.monotonic() > self.deadline:
            self.add(table, "-", "whole table", status="unavailable", reason="not reached in time; give more seconds")
        else:
            outcome = attempt(partial(run, self))
            if outcome.reason is not None:
                self.add(table, "-", "whole table", status=_status(outcome.reason), reason=outcome.reason)
        if self.output is not None:
            write_rows(self.output, self.rows)

    def trial(self, table: str, arm: str, what: str, run: Callable[[], dict[str, Any]], **known: Any) -> None:
        """One row of a section; a failure is a row too."""
        outcome = attempt(run)
        if outcome.reason is None:
            self.add(table, arm, what, **{**known, **outcome.value})
        else:
            self.add(table, arm, what, status=_status(outcome.reason), reason=outcome.reason, **known)

    # Slices

    @contextmanager
    def partitions(self, *sizes: int) -> Iterator[list[Part]]:
        """Green contexts of these sizes; on a CPU parts in name only."""
        if not self.on_gpu:
            yield [Part(size, None) for size in sizes]
            return
        torch.zeros(1, device=self.device)
        made = take_partitions(self.device.index or 0, sizes)
        parts = made.in_order_of(sizes)
        try:
            yield [Part(sms, torch.cuda.ExternalStream(handle, device=self.device)) for sms, handle in parts]
        finally:
            keep_partitions(made)
            self.release_graphs()

    def release_graphs(self) -> None:
        """Give back what graphs hold; none of them may be replayed any more."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def whole(self, priority: int = 0) -> Part:
        """The whole device, by a stream of its own."""
        return Part(self.num_sms, torch.cuda.Stream(self.device, priority=priority) if self.on_gpu else None)

    # Clocks

    def per_call_ms(self, call: Callable[[], Any], part: Part) -> list[float]:
        """Milliseconds a call, in samples of many calls queued one after another."""

        def sample(calls: int) -> float:
            part.wait()
            begin = time.perf_counter()
            with part.current():
                for _ in range(calls):
                    call()
            part.wait()
            return (time.perf_counter() - begin) / calls * 1e3

        sample(2)
        calls = max(1, int(self.sizes.least_s * 1e3 / max(sample(3), 1e-4)))
        return [sample(calls) for _ in range(self.sizes.samples)]

    def latency_ms(self, call: Callable[[], Any], part: Part, seconds: float) -> list[float]:
        """Milliseconds from one call to its end, again and again for a while."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        with part.current():
            for _ in range(5):
                call()
            part.wait()
            while time.perf_counter() < end or len(times) < 20:
                begin = time.perf_counter()
                call()
                part.wait()
                times.append((time.perf_counter() - begin) * 1e3)
        return times

    def graphed(self, call: Callable[[], Any], part: Part) -> Callable[[], Any]:
        """The call captured on the part's stream, to be replayed there; as it is on a CPU."""
        if part.stream is None:
            return call
        with part.current():
            for _ in range(3):
                call()
        part.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=part.stream):
            call()
        self._graphs.append(graph)

        def replay(read_by_the_graph: object = call) -> None:
            graph.replay()

        return replay

    # Work

    @property
    def weights(self) -> ExpertWeights:
        if self._weights is None:
            c = self.config
            new: dict[str, Any] = dict(device=self.device, dtype=self.dtype)
            up = torch.randn(c.num_experts, c.up_rows, c.input_dim, **new) * c.input_dim**-0.5
            self._weights = ExpertWeights(up, torch.randn(c.num_experts, c.expert_dim, c.hidden_dim, **new) * 0.03)
        return self._weights

    def experts(self, rows: int, experts: int, sms: int | None, first: int = 0) -> Callable[[], torch.Tensor]:
        """The experts' forward products over `rows` rows spread over `experts` experts from `first` on."""
        ids = torch.arange(rows, device=self.device, dtype=torch.int32) % experts
        return self.products((ids + first) % self.config.num_experts, sms)

    def products(self, ids: torch.Tensor, sms: int | None) -> Callable[[], torch.Tensor]:
        """The experts' forward products over a row for each of these expert ids."""
        ops, rows = TritonExpertOps(self.device, sm_budget=None if sms == self.num_sms else sms), len(ids)
        x = torch.randn(rows, self.config.input_dim, device=self.device, dtype=self.dtype)
        routing = ops.sort_routes(ids.unsqueeze(1), torch.ones(rows, 1, device=self.device), self.config.num_experts)

        weights = self.weights  # made here, never inside a capture

        @torch.no_grad()
        def call() -> torch.Tensor:
            return ops.experts(x, routing, weights)

        return call

    def decode(self, sms: int | None) -> Callable[[], torch.Tensor]:
        """The experts of one layer for a decode step: few tokens, each to K experts."""
        rows = self.sizes.decode_tokens * self.config.top_k
        return self.experts(rows, min(rows, self.config.num_experts), sms)

    def matmul(self) -> Callable[[], torch.Tensor]:
        n = self.sizes.matmul
        a, b, out = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(3))
        return partial(torch.mm, a, b, out=out)

    def copies(self) -> Callable[[], torch.Tensor]:
        source = torch.zeros(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device)
        return partial(torch.empty_like(source).copy_, source)


def _status(reason: str) -> str:
    return "unavailable" if reason.startswith(BackendUnavailableError.__name__) else "failed"


@contextmanager
def background(bench: SliceBench, call: Callable[[], Any], part: Part) -> Iterator[Callable[[], float | None]]:
    """Keep a part busy from a thread; yields a function that says how many calls a second it has made so far.

    The calls are replayed as one graph of about 30 ms, so that the thread hardly ever holds Python's lock. None: fewer
    than two graphs have ended yet.
    """
    batch_s = min(0.03, bench.sizes.isolation_s / 20)
    batch = max(1, min(64, int(batch_s / (percentile(bench.per_call_ms(call, part), 0.5) / 1e3))))
    replay = bench.graphed(partial(run_all, [call] * batch), part)
    stop, started = threading.Event(), threading.Event()
    ends: list[float] = []

    def run() -> None:
        with part.current():
            while not stop.is_set():
                replay()
                started.set()
                part.wait()
                ends.append(time.perf_counter())

    def rate() -> float | None:
        return (len(ends) - 1) * batch / (ends[-1] - ends[0]) if len(ends) > 1 else None

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(30)
    try:
        yield rate
    finally:
        stop.set()
        thread.join(60)


def run_all(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()
