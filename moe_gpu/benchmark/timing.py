"""Timing and memory of calls on a device, CUDA-graph capture, and the device's ceilings."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_gpu.cuda_graph_manager.capture import record_graph, waits_refused
from moe_gpu.results import Ceiling, percentile

MIN_SAMPLES = 5
WARM_UP_CALLS = 3


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Job:
    """A call to time: `run` takes what `prepare`, which is not timed, returns."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Attempt:
    """What came of a call that may fail: its value, or the reason in one line."""

    value: Any = None
    reason: str | None = None


def attempt(call: Callable[[], Any]) -> Attempt:
    """Call; a failure becomes a reason in one line, and leaves the device's memory as free as it was."""
    reason = None
    try:
        return Attempt(call())
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {_first_line(error)}"
    except Exception as error:  # noqa: BLE001 peers raise what they like; one that fails is a row, never the end
        reason = f"{type(error).__name__}: {_first_line(error)}"
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
    return Attempt(reason=reason)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def describe_samples(times_ms: Sequence[float]) -> dict[str, float | int]:
    """The statistics of a BenchmarkRow, in its field names; the standard deviation needs two samples."""
    values: dict[str, float | int] = {
        "samples": len(times_ms),
        "mean_ms": statistics.fmean(times_ms),
        "min_ms": min(times_ms),
        "max_ms": max(times_ms),
    }
    if len(times_ms) > 1:
        values["std_ms"] = statistics.stdev(times_ms)
    for share in (20, 50, 80, 95):
        values[f"p{share}_ms"] = percentile(times_ms, share / 100)
    return values


class Timer:
    """Milliseconds of one call from a quiet device with a cold L2: CUDA events on a GPU, the monotonic clock on a CPU.

    Before a call on a GPU everything is waited for, then a buffer of twice the L2 is overwritten; the launches of the
    call overlap with that write, for every provider alike. A CPU's caches are left as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def __call__(self, job: Job) -> float:
        state = job.prepare()
        if self._buffer is None:
            begin = time.perf_counter_ns()
            job.run(state)
            return (time.perf_counter_ns() - begin) / 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        self._buffer.zero_()
        start.record()
        job.run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def warm_up(job: Job, timer: Timer, budget_s: float) -> float:
    """Call at least three times, so that nothing is compiled or tuned later; the last call's milliseconds."""
    begin = time.perf_counter()
    calls, last_ms = 0, 0.0
    while calls < WARM_UP_CALLS or (calls < 10 and time.perf_counter() - begin < budget_s / 4):
        last_ms = timer(job)
        calls += 1
    return last_ms


def sample_count(estimate_ms: float, num_iterations: int, budget_s: float) -> int:
    """Samples that fit the time budget: at least five (fewer only if fewer are wanted), at most `num_iterations`."""
    fitting = int(budget_s * 1000 / max(estimate_ms, 1e-6))
    return min(num_iterations, max(MIN_SAMPLES, fitting))


def time_interleaved(
    jobs: Mapping[str, Job], timer: Timer, counts: Mapping[str, int]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Sample the jobs in turn (A B C A B C ...), so that a drifting clock hits all alike: (samples in ms, failures).

    A job with fewer samples is spread over all the rounds. One that fails is left out from then on.
    """
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    failures: dict[str, str] = {}
    rounds = max(counts.values(), default=0)
    for index in range(rounds):
        for name, job in jobs.items():
            due = (index + 1) * counts[name] // rounds > index * counts[name] // rounds
            if not due or name in failures:
                continue
            outcome = attempt(functools.partial(timer, job))
            if outcome.reason is None:
                samples[name].append(outcome.value)
            else:
                failures[name] = outcome.reason
    return {name: times for name, times in samples.items() if name not in failures}, failures


def peak_memory_bytes(job: Job, device: torch.device) -> int | None:
    """Most memory that one call holds beyond what was allocated before it; None on a CPU, where it is not measured."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    job.run(job.prepare())
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class CapturedCall:
    """A call captured into a CUDA graph; `output` is overwritten by every replay."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.output


def capture(run: Callable[[], torch.Tensor], device: torch.device) -> CapturedCall:
    """Capture `run` after warming it up on a side stream; RuntimeError for a call that cannot be captured.

    A call that waits for the device is found out before the capture begins, since a capture that breaks off can leave
    the allocator and the random generators in a state of capture.
    """
    outside = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(outside)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            run()
        with waits_refused():
            run()
    torch.cuda.synchronize(device)
    return CapturedCall(*record_graph(run, side))


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> list[Ceiling]:
    """The dense product's FLOP/s and the copy's bytes/s that this device reaches: the best of ten cold calls."""
    on_gpu = device.type == "cuda"
    timer = Timer(device)
    name = str(dtype).removeprefix("torch.")
    n = 8192 if on_gpu else 1024
    a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    product = Job(lambda _: torch.mm(a, b, out=c))
    product_ms = _best_ms(product, timer)
    num_bytes = (512 if on_gpu else 128) << 20
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    copy_ms = _best_ms(Job(lambda _: target.copy_(source)), timer)
    best = "best of 10 calls"
    return [
        Ceiling("matmul", name, 2 * n**3 / product_ms * 1e3, "FLOP/s", f"{n} x {n} x {n} torch.mm, {best}"),
        Ceiling("copy", name, 2 * num_bytes / copy_ms * 1e3, "B/s", f"{num_bytes >> 20} MiB read and written, {best}"),
    ]


def _best_ms(job: Job, timer: Timer) -> float:
    warm_up(job, timer, 0.2)
    return min(timer(job) for _ in range(10))
