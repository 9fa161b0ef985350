"""Expert loads as counters inside a trace of `torch.profiler`, on its own time axis."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_gpu.files import write_atomically
from moe_gpu.profiler import ExpertProfiler, LoadWindow

CATEGORY = "moe_gpu"


def add_expert_counters(path: str | Path, profiler: ExpertProfiler, layers: Sequence[int] | None = None) -> int:
    """Add the profiler's windows to a trace that `torch.profiler` exported (.json or .json.gz), in place.

    For the windows that overlap the trace and hold a route: a counter track a layer holds routes a second by expert,
    another the busiest expert's load over the mean. Call it in the process that recorded the trace, after the work and
    `profiler.flush()`; a second call replaces what the first one added. layers: by default all. Returns how many events
    were added.
    Raises ValueError, and changes nothing, for a file that is no such trace, a layer that is not there, and where no
    window of the profiler lies in the trace's time.
    """
    path, chosen = Path(path), list(range(profiler.num_layers) if layers is None else layers)
    wrong = [layer for layer in chosen if not 0 <= layer < profiler.num_layers]
    if wrong:
        raise ValueError(f"layer={wrong[0]} is outside the profiler's {profiler.num_layers} layers")
    trace = _read(path)
    events = [event for event in trace["traceEvents"] if event.get("cat") != CATEGORY]
    spans = [(event["ts"], event.get("dur", 0)) for event in events if event.get("ph") == "X"]
    if not spans:
        raise ValueError(f"{path} holds no recorded work; export it after the profiler of PyTorch has stopped")
    begin_us, end_us = min(ts for ts, _ in spans), max(ts + duration for ts, duration in spans)
    # The trace counts from a base in the world's time, the profiler's windows in seconds of the monotonic clock.
    to_us = (time.time_ns() - time.monotonic_ns() - trace.get("baseTimeNanoseconds", 0)) / 1e3
    windows = [
        window
        for window in profiler.history()
        if window.end_s * 1e6 + to_us >= begin_us and window.begin_s * 1e6 + to_us <= end_us and window.counts_LE.any()
    ]
    if not windows:
        raise ValueError(
            f"no window of the profiler lies in the time of {path}: call profiler.flush() before and after the work"
        )
    added = [event for layer in chosen for event in _counters(windows, layer, to_us)]
    trace["traceEvents"] = [*events, *added]
    content = json.dumps(trace).encode()
    write_atomically(path, gzip.compress(content) if path.suffix == ".gz" else content)
    return len(added)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        trace = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; give a trace of torch.profiler") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no JSON; give a trace that torch.profiler exported") from error
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise ValueError(f"{path} has no traceEvents; give a trace that torch.profiler exported")
    return trace


def _counters(windows: Sequence[LoadWindow], layer: int, to_us: float) -> Iterator[dict[str, Any]]:
    """A value at the beginning of each window, and nothing from the last one's end on."""
    common = {"ph": "C", "cat": CATEGORY, "pid": "moe_gpu", "tid": 0}
    experts = range(windows[0].counts_LE.shape[1])
    by_expert, uneven = f"layer {layer}: routes/s by expert", f"layer {layer}: busiest over mean"
    for window in windows:
        ts, seconds = window.begin_s * 1e6 + to_us, max(window.end_s - window.begin_s, 1e-9)
        counts = window.counts_LE[layer].tolist()
        rates = {f"expert {expert}": counts[expert] / seconds for expert in experts}
        yield {**common, "name": by_expert, "ts": ts, "args": rates}
        mean = sum(counts) / len(counts)
        yield {**common, "name": uneven, "ts": ts, "args": {"load": max(counts) / mean if mean else 0.0}}
    ts = windows[-1].end_s * 1e6 + to_us
    yield {**common, "name": by_expert, "ts": ts, "args": {f"expert {expert}": 0.0 for expert in experts}}
    yield {**common, "name": uneven, "ts": ts, "args": {"load": 0.0}}
