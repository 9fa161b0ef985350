"""PowerSampler on an invented meter: its rate, its files, a lost GPU; and recorded samples that are played back."""

from __future__ import annotations

import csv
import json
import math
import time as wall

import pytest

from moe_gpu.energy_monitor import EnergyMonitor, PowerSampler
from moe_gpu.energy_monitor.sampler import SAMPLE_COLUMNS
from moe_gpu.nvml import GpuLostError
from moe_gpu.results import EnergyMeasurement
from tests.energy_cases import (
    ROOT,
    InventedMeter,
    MovedClock,
    RecordedMeter,
    WorldClock,
    failing,
    measured,
    sample_at,
    threads,
)


def test_the_sampler_takes_samples_at_its_rate_from_one_thread_and_writes_them(tmp_path):
    meter = InventedMeter(WorldClock(), 300.0, 0.1)
    meter.sample = sample_at(meter)
    with PowerSampler(meter, hz=100) as sampler:
        assert threads() == ["moe_gpu-power"]
        sampler.start()
        assert threads() == ["moe_gpu-power"]
        wall.sleep(0.3)
    assert threads() == []
    samples = sampler.timeline()
    assert 15 <= len(samples) <= 40
    stamps = [sample.timestamp_ns for sample in samples]
    assert stamps == sorted(stamps)
    assert abs(stamps[-1] - wall.time_ns()) < 5e9, "in the world's time"
    sampler.to_csv(tmp_path / "s.csv")
    sampler.to_json(tmp_path / "s.jsonl")
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert tuple(rows[0]) == SAMPLE_COLUMNS
    assert ",".join(SAMPLE_COLUMNS) == (
        "timestamp_ns,gpu_uuid,scope,power_instant_w,power_average_w,memory_power_w,energy_counter_mj,temperature_c,"
        "sm_clock_mhz,mem_clock_mhz,gpu_util_pct,mem_util_pct,clocks_event_reasons,error"
    )
    assert (rows[0]["power_instant_w"], rows[0]["power_average_w"], rows[0]["error"]) == ("300.0", "", "")
    written = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(written) == len(samples)
    assert written[0]["power_average_w"] is None


def test_the_sampler_ends_with_a_lost_gpu_and_keeps_no_more_than_it_may():
    time = MovedClock()
    meter = InventedMeter(time)
    meter.sample = sample_at(meter)
    sampler = PowerSampler(meter, clock=time.clock, background=False, max_samples=5)
    for _ in range(9):
        time.pass_s(0.1)
        sampler.take()
    assert len(sampler.timeline()) == 5
    meter.faults["power"] = failing(GpuLostError("GPU_IS_LOST", "power"))
    sampler.take()
    assert sampler.latest.power_instant_w is None
    assert "GPU_IS_LOST" in sampler.latest.error
    assert "GPU_IS_LOST" in sampler.lost


TRACES = sorted((ROOT / "benchmarks" / "results").glob("*.trace.csv"))


def play(path) -> tuple[RecordedMeter, EnergyMeasurement]:
    """A window over the whole of a recorded trace."""
    time = MovedClock()
    meter = RecordedMeter(time, path)
    monitor = EnergyMonitor(meter, synchronise=False, clock=time.clock, background=False)
    time.listeners.append(monitor.poll)
    return meter, measured(time, monitor, meter.duration_s)


@pytest.mark.skipif(not TRACES, reason="no trace of a real GPU has been recorded yet (benchmarks/run_energy.py)")
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name)
def test_a_real_trace_gives_the_energy_that_its_counter_counted(path):
    meter, m = play(path)
    counted = [int(row["energy_counter_mj"]) for _, row in meter.rows if row["energy_counter_mj"]]
    truth = (counted[-1] - counted[0]) / 1000
    assert abs(m.energy_j - truth) <= 3 * m.stderr_j + 0.02 * truth
    assert m.n_ticks > 0.3 * len(counted), "samples at 10 Hz meet a counter that moves about as often"


def test_a_recorded_trace_plays_back_as_it_was(tmp_path):
    """Samples as the sampler writes them, of a made-up GPU; `benchmarks/run_energy.py` records a real one."""
    time = MovedClock()
    meter = InventedMeter(time, lambda t: 250 + 100 * math.sin(t / 3), 0.1)
    meter.sample = lambda at: type(sample_at(meter)(at))(
        **{**vars(sample_at(meter)(at)), "gpu_util_pct": 80, "mem_util_pct": 20, "clocks_event_reasons": 4}
    )
    sampler = PowerSampler(meter, hz=10, clock=time.clock, background=False)
    for _ in range(1200):
        time.pass_s(0.01)
        sampler.take()
    sampler.to_csv(tmp_path / "trace.csv")

    recorded, m = play(tmp_path / "trace.csv")
    assert recorded.duration_s == pytest.approx(12, abs=0.1)
    samples = sampler.timeline()
    truth = (samples[-1].energy_counter_mj - samples[0].energy_counter_mj) / 1000
    assert abs(m.energy_j - truth) <= 2 * m.stderr_j + 0.02 * truth
    assert m.n_ticks == pytest.approx(119, abs=2)
    assert (m.gpu_util_pct, m.clocks_event_reasons, m.quality) == (80, 4, "ok")
