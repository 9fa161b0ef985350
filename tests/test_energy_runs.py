"""`moe-gpu energy`, energy in the benchmark's rows, and Prometheus: on the CPU, with an invented meter."""

from __future__ import annotations

import csv
import functools
import json
import logging
import time
import urllib.request

import pytest
import torch

from moe_gpu import energy
from moe_gpu.benchmark import MoEBenchmark
from moe_gpu.benchmark.measure import EnergyPlan
from moe_gpu.cli import main
from moe_gpu.config import PRESETS
from moe_gpu.energy_model import EnergyModel, EnergyReport, Workload
from moe_gpu.energy_monitor import EnergyMonitor, EnergyUnavailableError, PowerSampler
from moe_gpu.nvml import NotSupportedError
from moe_gpu.results import (
    AttributionRow,
    AttributionSum,
    BenchmarkRow,
    EnergyMeasurement,
    Finding,
    from_json,
    read_rows,
    select,
    to_json,
    write_rows,
)
from tests.energy_cases import (
    MODEL,
    UUID,
    InventedMeter,
    WorldClock,
    failing,
    measured_window,
    points,
    sample_at,
    simple_work,
    with_fake_nvml,
)
from tests.result_rows import CPU, benchmark_row


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    """They take seconds, and nothing here asks for shares of them."""
    monkeypatch.setattr("moe_gpu.benchmark.timing.measure_ceilings", lambda *_: [])


def cpu_monitor(**options) -> EnergyMonitor:
    """Reads an invented meter whose counter ticks every 2 ms, from its thread."""
    return EnergyMonitor(InventedMeter(WorldClock(), 300.0, 0.002), synchronise=False, poll_s=0.0005, **options)


def small_benchmark(plan: EnergyPlan, **options) -> MoEBenchmark:
    return MoEBenchmark(
        16, 16, 32, 4, 2, batch_sizes=(8,), num_iterations=3, device="cpu", providers=("torch_loop", "moe_gpu"),
        energy=plan, **options,
    )  # fmt: skip


def test_the_benchmarks_rows_carry_energy_and_its_windows_follow():
    told = []
    with cpu_monitor() as monitor:
        plan = EnergyPlan(monitor, 0.15, 2, on_trials=lambda case, trials: told.append((str(case), sorted(trials))))
        rows = small_benchmark(plan, modes=("forward", "backward")).run_comparison()
    forward, backward = ([r for r in select(rows, BenchmarkRow) if r.mode == m] for m in ("forward", "backward"))
    for row in forward:
        assert row.status == "ok"
        assert row.energy_j_per_token > 0
        assert row.energy_stderr_j_per_token > 0
        assert row.power_w == pytest.approx(300, rel=0.15)
        assert (row.gpu_util_pct, row.mem_util_pct) == (97, 41)
        assert row.energy_quality in ("ok", "short")
    for row in backward:
        assert row.status == "ok"
        assert row.energy_j_per_token is row.energy_quality is row.gpu_util_pct is None
    windows = select(rows, EnergyMeasurement)
    assert [w.window.split()[-1] for w in windows] == ["torch_loop", "moe_gpu", "moe_gpu", "torch_loop"]
    assert all(w.tokens == 8 * w.calls for w in windows)
    assert told == [("custom T=8 uniform forward eager", ["moe_gpu", "torch_loop"])]
    assert all(from_json(to_json(row)) == row for row in rows)


def test_rows_without_a_plan_carry_no_energy_and_a_blind_monitor_none_either():
    rows = small_benchmark(None).run_comparison()
    assert all(row.energy_j_per_token is None for row in select(rows, BenchmarkRow))
    assert select(rows, EnergyMeasurement) == []
    blind = EnergyMonitor("cpu", "none", synchronise=False)
    rows = small_benchmark(EnergyPlan(blind, 0.01, 1)).run_comparison()
    for row in select(rows, BenchmarkRow):
        assert (row.status, row.energy_j_per_token, row.energy_quality, row.power_w) == ("ok", None, "invalid", None)


def test_a_call_that_fails_while_energy_is_measured_leaves_its_times_and_a_warning(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("moe_gpu.benchmark.measure.measure_interleaved", fail)
    with cpu_monitor() as monitor, caplog.at_level(logging.WARNING):
        rows = small_benchmark(EnergyPlan(monitor, 0.01, 1)).run_comparison()
    assert all(row.p50_ms > 0 and row.energy_j_per_token is None for row in select(rows, BenchmarkRow))
    assert "out of luck" in caplog.text


@pytest.mark.parametrize("options", [{"seconds": 0}, {"trials": 0}, {"cooldown_s": -1}])
def test_a_senseless_plan_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EnergyPlan(EnergyMonitor("cpu", "none"), **options)


# The commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.fixture
def metered(here, monkeypatch):
    """The commands take the CPU for a GPU whose meter is invented; Qwen3's name stands for a tiny layer."""
    monkeypatch.setattr(energy, "open_monitor", lambda device=None: (torch.device("cpu"), cpu_monitor()))
    tiny = PRESETS["small"].with_(input_dim=16, expert_dim=16, hidden_dim=32, num_experts=4)
    monkeypatch.setattr(energy, "PRESETS", {"qwen3-30b-a3b": tiny})
    monkeypatch.setattr(energy, "CALIBRATION_LAYER", tiny)
    return here


def test_measure_writes_rows_by_provider_and_by_expert_once_calibrated(metered, capsys):
    arguments = ["energy", "measure", "--tokens", "8", "--dtype", "fp32", "--provider", "torch_loop,moe_gpu"]
    arguments += ["--seconds", "0.15", "--trials", "2", "--output-dir", "out"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "Joules per 1000 tokens" in said
    assert "not by expert: there is no calibration of" in said
    rows = read_rows(metered / "out" / "energy.jsonl")
    assert len(select(rows, BenchmarkRow)) == 2
    assert select(rows, AttributionRow) == []

    EnergyModel.fit(points(), "float32", UUID, "999.99").save()
    assert main([*arguments, "--json"]) == 0
    printed = [from_json(line) for line in capsys.readouterr().out.splitlines()]
    rows = read_rows(metered / "out" / "energy.jsonl")
    assert printed == rows
    experts, (total,) = select(rows, AttributionRow), select(rows, AttributionSum)
    assert [row.expert for row in experts] == [0, 1, 2, 3]
    ours = [w for w in select(rows, EnergyMeasurement) if w.window.endswith("moe_gpu")]
    assert total.measured_j == pytest.approx(sum(w.energy_j for w in ours))
    assert sum(row.tokens for row in experts) == pytest.approx(8 * 2 * sum(w.calls for w in ours))
    assert main(["energy", "report", "out/energy.jsonl"]) == 0
    assert "by expert (modelled)" in capsys.readouterr().out


def test_bench_with_energy_carries_it_and_takes_it_apart(metered, monkeypatch, capsys):
    short = functools.partial(energy.energy_plan, seconds=0.15, trials=2)
    monkeypatch.setattr("moe_gpu.runs.energy_plan", short)
    EnergyModel.fit(points(), "float32", UUID, "999.99").save()
    sizes = "--input-dim 16 --hidden-dim 32 --experts 4 --top-k 2 --tokens 8 --iterations 3 --mode forward"
    chosen = "--provider moe_gpu --provider torch_loop --routing one-expert --launch eager --device cpu"
    assert main(["bench", "--energy", *sizes.split(), *chosen.split(), "--output-dir", "out"]) == 0
    assert "by expert (modelled)" in capsys.readouterr().out
    rows = read_rows(metered / "out" / "results.jsonl")
    assert all(row.energy_j_per_token > 0 for row in select(rows, BenchmarkRow))
    experts = select(rows, AttributionRow)
    assert [row.tokens > 0 for row in experts] == [True, True, False, False], "one-expert routing uses K experts"
    assert main(["report", "out/results.jsonl", "--output-dir", "out"]) == 0
    page = (metered / "out" / "report.html").read_text()
    assert "Joules by expert: custom T=8 one-expert forward eager moe_gpu, layer 0" in page
    assert "J per 1000 tokens" in page


def test_calibrate_fits_keeps_and_prints(metered, monkeypatch, capsys):
    workloads = [
        Workload("idle", None, anchor=True),
        Workload("copy", lambda: time.sleep(0.001), hbm_bytes=1e9, anchor=True),
        Workload("product", lambda: time.sleep(0.001), flops=1e9, anchor=True),
        Workload("experts", lambda: time.sleep(0.001), flops=2e9, hbm_bytes=3e9),
    ]
    monkeypatch.setattr(energy, "standard_workloads", lambda *_: workloads)
    assert main(["energy", "calibrate", "--seconds", "0.12", "--trials", "2"]) == 0
    said = capsys.readouterr().out
    assert "W doing nothing" in said
    assert "held out: experts: off by" in said
    found = EnergyModel.load(UUID, "999.99", "bfloat16")
    assert found.static_w == pytest.approx(300, rel=0.2)
    assert main(["energy", "calibrate", "--seconds", "0.12", "--trials", "2", "--output", "c.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_uuid"] == UUID
    assert EnergyModel.load(UUID, "999.99", "bfloat16", "c.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ["energy", "measure"],
        ["energy", "measure", "--device", "cpu"],
        ["energy", "calibrate"],
        ["bench", "--energy", "--preset", "small"],
    ],
    ids=" ".join,
)
def test_without_a_gpu_it_is_one_line_and_status_1_before_any_work(arguments, here, capsys):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("moe-gpu: error: energy is the GPU's, and ")
    assert printed.err.count("\n") == 1
    assert [path for path in here.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["measure", "--seconds", "0"], "0 is not above 0"),
        (["measure", "--seconds", "many"], "'many' is not a number"),
        (["measure", "--mode", "backward"], "forward, forward+backward"),
        (["measure", "--preset", "gpt-9"], "'gpt-9'"),
        (["calibrate", "--trials", "0"], "0 is below"),
        (["report", "missing.jsonl"], "missing.jsonl"),
        (["watch", "--hz", "-1"], "-1 is not above 0"),
        (["watch", "--output", "samples.txt"], "ends in .csv"),
        (["watch", "--hz", "500"], "hz=500.0"),
        (["dance"], "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, said, here, capsys):
    assert main(["energy", *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_file_without_energy_is_refused_by_name(here, capsys):
    write_rows(here / "speed.jsonl", [CPU, benchmark_row()])
    assert main(["energy", "report", "speed.jsonl"]) == 2
    assert "speed.jsonl: no row carries energy" in capsys.readouterr().err


def test_the_report_says_what_was_not_measured_and_why(here, capsys):
    finding = Finding("counter over integrated power", None, "ratio", reason="the section failed: no permission")
    lost = EnergyMeasurement("run", "work", 5.0, reason="the GPU is lost")
    known = Finding("tick period", 0.1, "s", 0.099, 0.101, verdict="met")
    unmeasured = benchmark_row("moe_gpu", energy_quality="invalid")
    write_rows(here / "e.jsonl", [CPU, unmeasured, finding, known, lost, lost])
    assert main(["energy", "report", "e.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "counter over integrated power: not measured: the section failed: no permission" in said
    assert "tick period: 0.1 s (95 % 0.099 to 0.101), met" in said
    assert "2 windows without energy: the GPU is lost" in said
    assert " 0 " not in next(line for line in said.splitlines() if "moe_gpu" in line)


def test_watch_shows_and_writes_samples_of_the_fake_library(tmp_path):
    done = with_fake_nvml(
        """
from moe_gpu.cli import main
folder = sys.argv[1]
watch = ["energy", "watch", "--seconds", "0.4", "--hz", "50"]
assert main([*watch, "--output", folder + "/s.csv", "--metrics-port", "0"]) == 0
assert main([*watch, "--output", folder + "/s.jsonl", "--json"]) == 0
assert main([*watch, "--gpu", "GPU-nobody"]) == 1
put(fault_code=15, fault_where=7)
assert main([*watch, "--seconds", "60"]) == 0
""",
        str(tmp_path),
    )
    out = done.stdout.splitlines()
    assert out[0].startswith("metrics: http://127.0.0.1:")
    assert "NVML finds no GPU GPU-nobody: NOT_FOUND" in done.stderr
    assert "GPU_IS_LOST" in out[-1]
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert len(rows) >= 8
    assert {row["power_instant_w"] for row in rows} == {"300.0"}
    printed = [line for line in out if line.startswith("{")]
    assert printed == (tmp_path / "s.jsonl").read_text().splitlines()


# Prometheus


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def report() -> EnergyReport:
    return MODEL.attribute([1, 2, 3, 4], measured_window(), simple_work(shared_bytes_per_token=10.0), layer=2)


@pytest.fixture
def sampled():
    meter = InventedMeter(WorldClock(), 300.0, 0.1)
    meter.sample = sample_at(meter)
    return meter, PowerSampler(meter, background=False)


def test_metrics_are_served_here_only_and_what_is_unknown_is_left_out(sampled):
    pytest.importorskip("prometheus_client", reason="the endpoint needs the extra moe-gpu[metrics]")
    from moe_gpu.metrics import EnergyCollector, MetricsServer

    _, sampler = sampled
    with cpu_monitor() as monitor:
        collector = EnergyCollector(sampler, monitor)
        server = MetricsServer([collector], port=0)
        try:
            assert server.url.startswith("http://127.0.0.1:")
            assert server._server.server_address[0] == "127.0.0.1"
            assert scrape(server.url) == {}, "nothing has been sampled, nothing is 0"
            sampler.take()
            with monitor.window("work", tokens=12):
                pass
            with monitor.window("work", tokens=30):
                pass
            first = report()
            collector.add_report(first)
            collector.add_report(first)
            collector.add_report(MODEL.attribute([1, 2, 3, 4], measured_window(None), simple_work()))
            found = scrape(server.url)
        finally:
            server.close()
    gpu = f'{{gpu="{UUID}",scope="gpu"}}'
    assert found.pop(f"moe_gpu_energy_joules_total{gpu}") >= 1000
    assert found == {
        f"moe_gpu_power_watts{gpu}": 300.0,
        f"moe_gpu_temperature_celsius{gpu}": 40.0,
        "moe_gpu_tokens_total": 42.0,
        'moe_gpu_attributed_energy_joules_total{component="experts",layer="2"}': pytest.approx(
            2 * first.total.rescaled_j
        ),
        'moe_gpu_attributed_energy_joules_total{component="shared",layer="2"}': pytest.approx(
            2 * first.total.rescaled_shared_j
        ),
        'moe_gpu_attributed_energy_joules_total{component="static",layer="2"}': pytest.approx(2 * first.total.static_j),
    }


def test_expert_labels_come_on_request_and_a_reading_that_fails_is_left_out(sampled):
    pytest.importorskip("prometheus_client", reason="the endpoint needs the extra moe-gpu[metrics]")
    from moe_gpu.metrics import EnergyCollector

    meter, sampler = sampled
    sampler.take()
    collector = EnergyCollector(sampler, expert_labels=True)
    collector.add_report(report())
    families = {family.name: family for family in collector.collect()}
    components = {sample.labels["component"] for sample in families["moe_gpu_attributed_energy_joules"].samples}
    assert components == {"shared", "static", "expert-0", "expert-1", "expert-2", "expert-3"}
    assert "moe_gpu_tokens" not in families
    meter.sample = lambda at: type(sampler.latest)(at, UUID, "gpu")
    sampler.take()
    assert {family.name for family in collector.collect()} == {"moe_gpu_attributed_energy_joules"}


def test_the_endpoint_without_its_package_names_the_extra(monkeypatch, sampled, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(energy, "PowerSampler", lambda *_: sampled[1])
    assert main(["energy", "watch", "--metrics-port", "0"]) == 1
    assert "pip install 'moe-gpu[metrics]'" in capsys.readouterr().err


def test_open_monitor_wants_the_work_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnergyUnavailableError, match="PyTorch sees no NVIDIA GPU"):
        energy.open_monitor()


def test_a_meter_without_utilisation_leaves_the_rows_field_empty():
    meter = InventedMeter(WorldClock(), 300.0, 0.002)
    meter.faults["utilisation"] = failing(NotSupportedError("NOT_SUPPORTED", "utilisation"))
    with EnergyMonitor(meter, synchronise=False, poll_s=0.0005) as monitor:
        rows = small_benchmark(EnergyPlan(monitor, 0.15, 1)).run_comparison()
    assert all(row.gpu_util_pct is None and row.energy_j_per_token for row in select(rows, BenchmarkRow))


# The script for a GPU


def test_the_gpu_script_records_its_sections_and_goes_on_after_one_that_fails(tmp_path):
    done = with_fake_nvml(
        """
put(tick_ms=2)
from benchmarks.run_energy import SECTIONS, main
path = sys.argv[1]
statuses = [main([path, "--smoke", "--section", "attribute", "--section", "idle"])]  # there is no calibration yet
some = ["counter", "calibrate", "attribute", "intervention", "zeus"]
statuses.append(main([path, "--smoke", *(word for name in some for word in ("--section", name))]))
print(json.dumps([statuses, list(SECTIONS)]))
""",
        str(tmp_path / "e.jsonl"),
        MOE_GPU_CACHE=str(tmp_path / "cache"),
        FAKE_NVML_TICK_MS="2",
    )
    (failed, went_on), sections = json.loads(done.stdout.splitlines()[-1])
    assert (failed, went_on) == (1, 0)
    assert len(sections) == 12
    rows = read_rows(tmp_path / "e.jsonl")
    findings = {row.name.removeprefix("smoke test, no measurement: "): row for row in select(rows, Finding)}
    assert all(row.name.startswith("smoke test, no measurement: ") for row in select(rows, Finding))
    assert "no calibration of" in findings["section attribute"].reason
    assert findings["section attribute"].value is None
    assert findings["idle power with a CUDA context"].value == pytest.approx(300, rel=0.1)
    assert findings["smallest step of the energy counter"].value >= 0.6
    assert findings["closure of the attribution, T=8"].value >= 0
    assert findings["held-out error: experts, 16 rows each"].value >= 0
    assert "predicted over measured difference, 8 experts less 1 experts" in findings
    assert findings["energy by Zeus over ours"].reason
    assert (tmp_path / "e.calibration.json").exists()
    assert select(rows, AttributionRow)


def test_the_gpu_script_without_a_gpu_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from benchmarks.run_energy import main as script

    with pytest.raises(SystemExit) as stop:
        script([str(tmp_path / "e.jsonl")])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "e.jsonl").exists()
