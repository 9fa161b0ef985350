"""`moe-gpu slices` and `moe-gpu profile`: what they decide, print and write on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_gpu import slice_bench
from moe_gpu.cli import main
from moe_gpu.profiler import RoutingTrace
from moe_gpu.results import ExpertLoadRow, Machine, SliceRow, SliceSeries, read_rows, select
from moe_gpu.slice_bench import adaptive, loads
from moe_gpu.slice_bench.bench import Sizes, SliceBench
from moe_gpu.slices.costs import cache_path
from moe_gpu.slices.plan import BackendUnavailableError
from tests.slice_cases import synthetic_costs

ROOT = Path(__file__).resolve().parent.parent
DESCRIBED = ["--device", "NVIDIA H200"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def trace(here):
    """Two layers of eight experts, top 2; half-way the load of the first moves from its first to its last experts."""
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([8.0, 8, 4, 4, 1, 1, 1, 1])
    halves = [torch.multinomial(weights.expand(2048, 8), 2, generator=generator) for weights in (first, first.flip(0))]
    even = torch.multinomial(torch.ones(4096, 8), 2, generator=generator)
    path = here / "trace.safetensors"
    RoutingTrace(torch.stack([torch.cat(halves), even]).to(torch.int16), 8, "a shifting load").save(path)
    return str(path)


def answer(capsys, *arguments: str) -> list[dict]:
    assert main([*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *arguments: str, status: int = 2) -> str:
    assert main(list(arguments)) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("moe-gpu: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_plan_writes_what_show_checks(here, capsys):
    (made,) = answer(capsys, "slices", "plan", "--load", "5,1,1,1", *DESCRIBED, "--output", "plan.json")
    assert [item["asked_sms"] for item in made["slices"]] == [80, 16, 16, 16]
    assert {item["got_sms"] for item in made["slices"]} == {None}
    assert made["present"] is False
    (shown,) = answer(capsys, "slices", "show", "plan.json", *DESCRIBED)
    assert shown["slices"] == made["slices"]
    line = refused(capsys, "slices", "show", "plan.json", "--device", "A100")
    assert "the plan is of NVIDIA H200, this is NVIDIA A100-SXM4-80GB" in line
    assert main(["slices", "plan", "--load", "3,1", *DESCRIBED]) == 0
    assert "described, not present" in capsys.readouterr().out


def test_show_of_a_device_says_what_is_not_measured(here, capsys):
    (shown,) = answer(capsys, "slices", "show", *DESCRIBED)
    assert (shown["num_sms"], shown["sm_granularity"], shown["cost_points"]) == (132, 8, None)
    synthetic_costs().save(cache_path("NVIDIA H200"))
    assert answer(capsys, "slices", "show", *DESCRIBED)[0]["cost_points"] == len(synthetic_costs().points)


def test_simulation_shows_what_every_policy_decides(trace, capsys):
    results = answer(capsys, "slices", "simulate", trace, "--tokens", "64", "--calls", "4", *DESCRIBED)
    by_policy = {result["policy"]: result for result in results}
    assert list(by_policy) == ["static", "dynamic", "proportional", "adaptive"]
    assert by_policy["static"]["changes"] == 0
    assert by_policy["static"]["final"] == {"rule": "static", "sms": [32] * 4}
    followed = by_policy["proportional"]
    assert followed["final"]["sms"][3] > followed["final"]["sms"][0], "the load has moved to the last experts"
    early = next(entry for entry in followed["decisions"] if entry["changed"])
    assert early["sms"][0] > early["sms"][3]
    assert followed["mean_pressure"] < by_policy["static"]["mean_pressure"]
    assert by_policy["adaptive"]["final"]["rule"] == "not sliced"
    assert {result["mean_predicted_ms"] for result in results} == {None}, "no costs, no times"
    assert "moe-gpu slices bench" in by_policy["adaptive"]["decisions"][0]["reason"]


def test_simulation_with_costs_predicts_and_adaptive_takes_the_least(trace, here, capsys):
    synthetic_costs(launch_ms=0.0, slowdown=1.0, floor=0.001).save(here / "costs.json")
    arguments = ["--tokens", "1024", "--calls", "1", "--costs", "costs.json", *DESCRIBED]
    results = answer(capsys, "slices", "simulate", trace, *arguments)
    times = {result["policy"]: result["mean_predicted_ms"] for result in results}
    assert all(value > 0 for value in times.values())
    assert min(times.values()) <= times["adaptive"] <= max(times.values())
    (layer,) = {result["windows"] for result in results}
    assert layer == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "--load"),
        (["plan", "--load", "1", "--trace", "trace.safetensors"], "--load"),
        (["plan", "--load", "1,1", "--policy", "fair"], "policy='fair' is not one of static"),
        (["plan", "--load", "1,x"], "'x' is not a number"),
        (["plan", "--load", "-1,2"], "at least 0"),
        (["plan", "--load", "1,1", "--backend", "rocket"], "'rocket' is not one of device, cta, green_context"),
        (["plan", "--load", "1,1", "--total-slices", "200"], "total_slices=200 exceeds the 132 SMs"),
        (["plan", "--load", "1,1", "--total-slices", "17"], "smallest green_context slice of 8; use at most 16"),
        (["plan", "--load", "1,1,1", "--total-slices", "2"], "3 tenants exceed total_slices=2"),
        (["plan", "--load", "1,1", "--utilization", "0.5"], "1 utilisations were given for 2 tenants"),
        (["plan", "--load", "1,1", "--utilization", "0.5,2"], "utilization=2.0 must lie between 0 and 1"),
        (["plan", "--load", "1,1", "--costs", "missing.json"], "cannot read costs missing.json"),
        (["plan", "--trace", "missing.safetensors"], "missing.safetensors"),
        (["plan", "--trace", "trace.safetensors", "--layer", "2"], "layer=2 is outside the trace's 2 layers"),
        (["plan", "--trace", "trace.safetensors", "--groups", "9"], "groups=9 must lie between 1 and the 8 experts"),
        (["show", "missing.json"], "cannot read plan missing.json"),
        (["simulate", "missing.safetensors"], "missing.safetensors"),
        (["mig", "--load", "1,1,1,1,1,1,1,1"], "8 loads exceed the 7 instances"),
        (["mig", "--load", "1", "--apply"], "leave --device out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_value_and_limit(arguments, said, trace, here, capsys):
    assert said in refused(capsys, "slices", *arguments, *DESCRIBED)
    assert sorted(path.name for path in here.iterdir()) == ["trace.safetensors"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured_or_applied(here, capsys):
    assert "has none" in refused(capsys, "slices", "bench", status=1)
    assert "has no GPU" in refused(capsys, "slices", "show", "--device", "cuda")
    assert "offers no MIG" in refused(capsys, "slices", "mig")
    assert "--apply needs the loads" in refused(capsys, "slices", "mig", "--apply")
    assert list(here.iterdir()) == []


def test_mig_prints_the_commands_of_a_layout(here, capsys):
    (made,) = answer(capsys, "slices", "mig", "--load", "4,1,1", "--memory-gib", "60,10,10", *DESCRIBED)
    assert made["commands"] == ["nvidia-smi -i 0 -mig 1", "nvidia-smi mig -i 0 -cgi 5:0,14:4,15:6 -C"]
    assert made["applied"] == []
    (listed,) = answer(capsys, "slices", "mig", *DESCRIBED)
    assert len(listed["profiles"]) == 6


def test_help_of_the_group_and_its_commands(capsys):
    for arguments in (["slices"], ["slices", "--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("plan", "show", "simulate", "mig", "bench"))
    for name in ("plan", "show", "simulate", "mig", "bench"):
        assert main(["slices", name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


# bench


def test_a_trial_runs_every_table_and_measures_nothing(here):
    command = [sys.executable, ROOT / "benchmarks" / "run_slices.py", here / "rows.jsonl", "--trial"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = select(read_rows(here / "rows.jsonl"), SliceRow)
    assert {row.table for row in rows} == set(slice_bench.SECTIONS)
    assert {row.status for row in rows} == {"unavailable"}
    assert all((row.p50_ms, row.value, row.got_sms) == (None, None, None) for row in rows)
    arms = {row.arm for row in rows if row.table == "isolation"}
    assert arms == {"alone", "unsliced", "priorities", "cta", "green_context"}
    series = select(read_rows(here / "rows.jsonl"), SliceSeries)
    assert {row.policy for row in series} == {"not sliced", "static", "dynamic", "proportional", "adaptive"}
    assert {(row.status, tuple(row.time_ms), tuple(row.sms)) for row in series} == {("unavailable", (), ())}
    assert not (here / "cache").exists()


def tiny_bench() -> SliceBench:
    """With costs by which slicing pays, for the CPU that stands in."""
    bench = SliceBench("qwen3-30b-a3b", Sizes.tiny(), torch.device("cpu"), 600.0, None)
    costs = synthetic_costs(launch_ms=0.0, slowdown=1.0, floor=0.001)
    machine = replace(costs.machine, device=bench.machine.device)
    bench.costs = replace(costs, machine=machine, model=bench.preset, dtype="float32")
    return bench


def test_every_policy_meets_every_step_of_the_shifting_loads(here, monkeypatch):
    bench, made = tiny_bench(), []
    monkeypatch.setattr(bench, "add_series", made.append)
    adaptive.measure_adaptive(bench)
    assert [(one.scenario, one.policy) for one in made] == [
        (load, policy)
        for load in ("four groups of experts", "two unequal jobs")
        for policy in ("not sliced", "static", "dynamic", "proportional", "adaptive")
    ]
    for one in made:
        assert len(one.rows) == len(one.sms) == len(one.time_ms) == len(one.changes) == one_step_count(one)
        assert min(one.time_ms) > 0
        assert one.changes[0] is None
        for step in range(1, len(one.sms)):
            assert (one.sms[step] != one.sms[step - 1]) <= (one.changes[step] is not None)
        assert one.policy != "not sliced" or set(map(str, one.sms)) == {"None"}
        assert one.policy != "static" or {tuple(sms) for sms in one.sms} in ({(32,) * 4}, {(64, 64)})
    assert len({tuple(map(str, one.sms)) for one in made[:5]}) > 2, "the policies differ"


def one_step_count(one: SliceSeries) -> int:
    return 14 if one.scenario == "four groups of experts" else 10


def test_adaptive_needs_costs_of_the_same_work(here):
    bench = tiny_bench()
    for costs in (None, replace(bench.costs, model="mixtral-8x7b")):
        bench.costs = costs
        with pytest.raises(BackendUnavailableError, match="measure the table cost first"):
            adaptive.measure_adaptive(bench)


def test_a_recorded_trace_is_a_load_too(trace, here):
    recorded = loads.recorded_load(RoutingTrace.load(trace), 0, 512)
    assert len(recorded.steps) == 8
    assert recorded.name == "recorded: a shifting load"
    assert recorded.steps[0][0] > recorded.steps[0][3]
    assert recorded.steps[-1][0] < recorded.steps[-1][3]
    assert all(sum(recorded.rows_E(step, 8)) == sum(rows) for step, rows in enumerate(recorded.steps))
    bench = tiny_bench()
    bench.trace = (RoutingTrace.load(trace), 0, 512)
    adaptive.measure_adaptive(bench)
    assert {row.scenario for row in select(bench.rows, SliceSeries)} >= {"recorded: a shifting load"}
    with pytest.raises(ValueError, match="has 8 experts, qwen3-30b-a3b has 128; choose the --preset"):
        slice_bench.check_trace(RoutingTrace.load(trace), "qwen3-30b-a3b", 0)
    with pytest.raises(ValueError, match="layer=2 is outside the trace's 2 layers"):
        slice_bench.check_trace(RoutingTrace.load(trace), "mixtral-8x7b", 2)


def test_a_section_that_fails_or_comes_too_late_is_a_row_and_the_next_goes_on(here):
    bench = SliceBench("qwen3-30b-a3b", Sizes.tiny(), torch.device("cpu"), 60.0, here / "rows.jsonl")

    def broken(bench: SliceBench) -> None:
        raise RuntimeError("CUDA error: out of luck")

    bench.section("rate", broken)
    bench.trial("launch", "alone", "one", lambda: 1 / 0)
    bench.deadline = 0.0
    bench.section("cost", broken)
    machine, rate, launch, cost = read_rows(here / "rows.jsonl")
    assert isinstance(machine, Machine)
    assert (rate.status, rate.reason) == ("failed", "RuntimeError: CUDA error: out of luck")
    assert (launch.status, launch.arm) == ("failed", "alone")
    assert (cost.status, "not reached in time" in cost.reason) == ("unavailable", True)


# profile


def test_the_profile_of_a_trace_is_printed_written_and_returned(trace, here, capsys):
    layers = answer(capsys, "profile", trace, "--output-dir", "out", "--tokens", "128", "--windows", "8")
    assert [one["layer"] for one in layers] == [0, 1]
    assert layers[0]["tokens_per_s_E"] is None, "a trace has no clock"
    assert layers[0]["calls"] == 32
    assert sum(layers[0]["counts_E"]) == 4096 * 2
    assert layers[1]["normalised_entropy"] > layers[0]["normalised_entropy"]
    rows = select(read_rows(here / "out" / "expert_load.jsonl"), ExpertLoadRow)
    assert len(rows) == 2 * 8
    total = torch.tensor([row.counts for row in rows if row.layer == 0]).sum(0)
    assert total.tolist() == layers[0]["counts_E"]
    assert (here / "out" / "expert_utilization_heatmap.png").stat().st_size > 1000
    assert main(["profile", trace, "--output-dir", "out", "--layer", "0"]) == 0
    shown = capsys.readouterr().out
    assert "layer 0, experts by time" in shown
    assert "█" in shown


def test_a_live_profile_has_rates_and_windows(here, capsys):
    layers = answer(capsys, "profile", "--steps", "3", "--output-dir", "out")
    assert all(sum(one["tokens_per_s_E"]) > 0 for one in layers)
    assert len({row.window for row in select(read_rows(here / "out" / "expert_load.jsonl"), ExpertLoadRow)}) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.safetensors"], "missing.safetensors"),
        (["trace.safetensors", "--layer", "2"], "layer=2 is outside the 2 layers"),
        (["trace.safetensors", "--tile", "48"], "tile=48 is not one of 16, 32, 64, 128"),
        (["trace.safetensors", "--tokens", "0"], "0 is below the limit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_profile_that_cannot_be_is_refused_before_anything_is_written(arguments, said, trace, here, capsys):
    assert said in refused(capsys, "profile", *arguments)
    assert sorted(path.name for path in here.iterdir()) == ["trace.safetensors"]
