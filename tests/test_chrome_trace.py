"""Expert loads inside a trace of torch.profiler: at the right time, the right numbers, nothing else changed."""

from __future__ import annotations

import gzip
import json
import time

import pytest
import torch

from moe_gpu import AdvancedMoELayer, ExpertProfiler, add_expert_counters


def recorded(path, steps: int = 3):
    """A layer's calls under torch.profiler, read after each, and the trace."""
    profiler = ExpertProfiler(4, copy_interval_s=float("inf"))
    layer = AdvancedMoELayer(16, 16, 32, 4, top_k=2, profiler=profiler)
    layer(torch.randn(8, 16))
    profiler.flush()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            with torch.profiler.record_function("a step"):
                layer(torch.randn(10, 16))
            time.sleep(0.002)
            profiler.flush()
    trace.export_chrome_trace(str(path))
    return profiler


def read(path):
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_counters_lie_beside_the_steps_that_they_count(name, tmp_path):
    path = tmp_path / name
    profiler = recorded(path)
    before = read(path)
    added = add_expert_counters(path, profiler)
    trace = read(path)
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C" and event.get("cat") == "moe_gpu"]
    assert len(counters) == added == 2 * (3 + 1)
    assert {**trace, "traceEvents": None} == {**before, "traceEvents": None}
    assert [event for event in trace["traceEvents"] if event.get("cat") != "moe_gpu"] == before["traceEvents"]
    routes = [event for event in counters if "by expert" in event["name"]]
    steps = sorted(event["ts"] for event in before["traceEvents"] if event.get("name") == "a step")
    windows = [window for window in profiler.history() if window.counts_LE.sum() == 10 * 2]
    for event, following, step, window in zip(routes, routes[1:], steps, windows, strict=False):
        assert event["ts"] <= step <= following["ts"]
        seconds = (following["ts"] - event["ts"]) / 1e6
        assert sum(event["args"].values()) * seconds == pytest.approx(10 * 2, rel=1e-2)
        rates = [window.counts_LE[0, expert].item() for expert in range(4)]
        assert [rate * seconds for rate in event["args"].values()] == pytest.approx(rates, rel=1e-2)
    assert set(routes[-1]["args"].values()) == {0.0}
    assert all(event["args"]["load"] >= 1 for event in counters if "busiest" in event["name"] and event["args"]["load"])


def test_a_second_call_replaces_what_the_first_added(tmp_path):
    path = tmp_path / "trace.json"
    profiler = recorded(path)
    assert add_expert_counters(path, profiler) == add_expert_counters(path, profiler)
    assert sum(event.get("cat") == "moe_gpu" for event in read(path)["traceEvents"]) == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "holds no JSON"),
        (b"[]", "no traceEvents"),
        (b'{"traceEvents": []}', "no recorded work"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1, "dur": 1}]}', "no window"),
    ],
)
def test_what_is_no_trace_is_refused_and_kept(content, said, tmp_path):
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        add_expert_counters(path, ExpertProfiler(4))
    assert content is None or path.read_bytes() == content


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layer=1 is outside the profiler's 1 layers"):
        add_expert_counters(tmp_path / "trace.json", ExpertProfiler(4), layers=[1])
