"""Windows on an invented meter and a moved clock: what they measure, what they refuse to say, and comparisons."""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import os
import random
import threading
import time as wall

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.energy_monitor import EnergyMonitor, EnergyUnavailableError, PowerSampler
from moe_gpu.energy_monitor.monitor import MEASUREMENT_COLUMNS
from moe_gpu.energy_monitor.sampler import SAMPLE_COLUMNS
from moe_gpu.energy_monitor.ticks import fit_slope
from moe_gpu.nvml import GpuLostError, NoPermissionError, NotSupportedError, NvmlError
from moe_gpu.results import EnergyMeasurement
from tests.energy_cases import (
    ROOT,
    InventedMeter,
    MovedClock,
    RecordedMeter,
    WorldClock,
    failing,
    moved_monitor,
    sample_at,
)


def measured(time, monitor, seconds=5.0, name="work", **options) -> EnergyMeasurement:
    with monitor.window(name, **options) as window:
        time.pass_s(seconds)
    return window.measurement


# Windows


@pytest.mark.parametrize("watts", [70.0, 300.0, 699.0])
@pytest.mark.parametrize("begin_s", [0.0, 0.031, 0.099])
def test_a_steady_window_is_its_power_times_its_time_whatever_its_edges(watts, begin_s):
    time, _, monitor = moved_monitor(watts)
    time.pass_s(begin_s)
    m = measured(time, monitor, 5.037, tokens=100)
    assert m.energy_j == pytest.approx(watts * 5.037, rel=2e-3)
    assert m.stderr_j < 0.01 * m.energy_j
    assert (m.quality, m.source, m.scope, m.driver, m.reason) == ("ok", "counter", "gpu", "999.99", None)
    assert m.joules_per_token == pytest.approx(m.energy_j / 100)
    assert m.tokens_per_joule == pytest.approx(100 / m.energy_j)
    assert 49 <= m.n_ticks <= 51
    assert (m.gpu_util_pct, m.mem_util_pct) == (97, 41)
    assert m.temp_end_c - m.temp_start_c == pytest.approx(5, abs=1)


def test_the_slope_beats_the_difference_of_two_readings_at_the_edges():
    """Both ends fall just before a tick: the counter itself is off by most of a tick, the slope is not."""
    time, meter, monitor = moved_monitor(300.0)
    time.pass_s(0.098)
    before = meter.energy_mj() / 1000
    m = measured(time, monitor, 2.004)  # a tick at its beginning and one at its end
    by_difference = meter.energy_mj() / 1000 - before
    truth = 300 * 2.004
    assert abs(by_difference - truth) > 25
    assert abs(m.energy_j - truth) < 3


def test_the_interval_covers_the_truth_of_a_noisy_load_about_as_often_as_it_says():
    """Not quite 95 of 100: the load before the first tick and after the last is taken to be that between them."""
    chance, inside = random.Random(0), 0
    for _ in range(100):
        noise = [chance.gauss(0, 20) for _ in range(64)]
        time, _, monitor = moved_monitor(lambda t, noise=noise: 300 + noise[int(t / 0.1) % 64])
        m = measured(time, monitor, 5.0)
        truth = sum(300 + noise[i] for i in range(50)) * 0.1
        inside += abs(m.energy_j - truth) <= 1.96 * m.stderr_j
    assert 85 <= inside <= 99


def test_a_load_that_changes_widens_the_interval_over_its_true_energy():
    time, _, monitor = moved_monitor(lambda t: 100.0 if t < 3.5 else 600.0)
    m = measured(time, monitor, 5.0)
    truth = 100 * 3.5 + 600 * 1.5
    assert abs(m.energy_j - truth) > 20, "a line does not fit"
    assert abs(m.energy_j - truth) <= 1.96 * m.stderr_j


def test_a_window_of_few_ticks_is_short_and_one_of_none_is_unknown_never_zero():
    time, _, monitor = moved_monitor(300.0)
    short = measured(time, monitor, 1.0)
    assert short.quality == "short"
    assert short.energy_j == pytest.approx(300, rel=0.02)
    for seconds in (0.0, 0.05, 0.15):
        nothing = measured(time, monitor, seconds, tokens=5)
        assert (nothing.energy_j, nothing.joules_per_token, nothing.quality) == (None, None, "invalid")
        assert "ticks of the counter" in nothing.reason


def test_a_counter_that_stands_still_or_a_power_of_nought_is_unknown_never_zero():
    time, meter, monitor = moved_monitor(0.0)
    assert measured(time, monitor, 5.0).energy_j is None
    time, meter, monitor = moved_monitor(0.0)
    meter.faults["energy"] = failing(NotSupportedError("NOT_SUPPORTED", "total energy"))
    m = measured(time, monitor, 5.0)
    assert (m.source, m.energy_j, m.quality) == ("integrated", None, "invalid")


def test_a_tick_lies_between_the_readings_that_it_was_found_between():
    time = MovedClock(step_s=0.04)
    meter = InventedMeter(time, 300.0, 0.1)
    monitor = EnergyMonitor(meter, synchronise=False, clock=time.clock, background=False)
    time.listeners.append(monitor.poll)
    monitor.begin_window("work")
    time.pass_s(0.52)
    found = [(at - meter.begin_ns) / 1e9 for at, _ in monitor._reader.readings.ticks]
    assert found == pytest.approx([0.1, 0.18, 0.3, 0.38, 0.5])  # the second is at 0.2, read at 0.16 and 0.2


def test_windows_nest_and_overlap_each_with_its_own_energy():
    time, _, monitor = moved_monitor(lambda t: 200.0 if t < 4 else 400.0)
    monitor.begin_window("step")
    monitor.begin_window("layer")
    time.pass_s(4.0)
    monitor.begin_window("layer")
    time.pass_s(4.0)
    inner = monitor.end_window("layer")
    outer = monitor.end_window("layer", tokens=7)
    time.pass_s(1.0)
    step = monitor.end_window("step")
    assert inner.energy_j == pytest.approx(1600, rel=0.01)
    assert outer.duration_s == pytest.approx(8)
    assert outer.tokens == 7
    assert step.duration_s == pytest.approx(9)
    assert [m.window for m in monitor.measurements] == ["layer", "layer", "step"]


def test_ending_a_window_that_is_not_open_names_those_that_are():
    _, _, monitor = moved_monitor()
    monitor.begin_window("step")
    with pytest.raises(ValueError, match=r"window 'layer' is not open \(open: step\)"):
        monitor.end_window("layer")


def test_a_block_that_raises_leaves_no_measurement_and_no_open_window():
    _, _, monitor = moved_monitor()
    with pytest.raises(KeyError), monitor.window("work"):
        raise KeyError("mine")
    assert not monitor.measurements
    with pytest.raises(ValueError, match="open: none"):
        monitor.end_window("work")


def test_what_was_read_is_forgotten_once_no_open_window_asks_for_it():
    time, _, monitor = moved_monitor()
    monitor.begin_window("outer")
    for _ in range(3):
        measured(time, monitor, 3.0)
    assert len(monitor._reader.readings.ticks) >= 85, "the outer window is open"
    monitor.end_window("outer")
    measured(time, monitor, 1.0)
    assert len(monitor._reader.readings.ticks) <= 11


def test_a_window_open_for_long_keeps_a_bounded_number_of_readings(monkeypatch):
    monkeypatch.setattr("moe_gpu.energy_monitor.ticks.KEPT", 64)
    time, meter, monitor = moved_monitor(lambda t: 300.0 + 50 * (t > 10))
    monitor.begin_window("long")
    meter.reasons = 0x20
    time.pass_s(0.2)
    meter.reasons = 0
    time.pass_s(59.8)
    meter.faults["energy"] = failing(NvmlError("TIMEOUT", "total energy"), 50.0, 55.0)
    kept = monitor._reader.readings
    assert all(len(items) <= 65 for items in (kept.ticks, kept.faults, kept.slow))
    recent = measured(time, monitor, 5.0)
    assert recent.energy_j == pytest.approx(5 * 350, rel=0.01)
    m = monitor.end_window("long")
    truth = 10 * 300 + 55 * 350
    assert abs(m.energy_j - truth) <= 1.96 * m.stderr_j
    assert m.clocks_event_reasons == 0x20, "what held the clocks is kept"


# What goes wrong


@pytest.mark.parametrize("offset_j", [-900.0, -40.0])
def test_a_counter_that_goes_backwards_discards_the_window_and_the_next_is_right(offset_j):
    time, meter, monitor = moved_monitor(300.0)
    monitor.begin_window("work")
    time.pass_s(2.0)
    meter.offset_j = offset_j
    time.pass_s(3.0)
    m = monitor.end_window("work", tokens=10)
    assert (m.energy_j, m.joules_per_token, m.quality) == (None, None, "invalid")
    assert "went backwards" in m.reason
    assert measured(time, monitor).energy_j == pytest.approx(1500, rel=0.01)


def test_without_a_counter_power_is_integrated_and_said_to_be():
    time, meter, monitor = moved_monitor(lambda t: 300 + 50 * math.sin(t))
    meter.faults["energy"] = failing(NotSupportedError("NOT_SUPPORTED", "total energy"))
    m = measured(time, monitor, 5.0)
    assert m.source == "integrated"
    truth = 300 * 5 + 50 * (1 - math.cos(5))
    assert m.energy_j == pytest.approx(truth, abs=max(3 * m.stderr_j, 15))
    assert 45 <= m.n_ticks <= 52


def test_without_permission_the_energy_is_none_and_the_warning_comes_once(caplog):
    time, meter, monitor = moved_monitor()
    meter.faults["energy"] = failing(NoPermissionError("NO_PERMISSION", "total energy"))
    with caplog.at_level(logging.WARNING):
        first, second = measured(time, monitor), measured(time, monitor)
    assert first.energy_j is second.energy_j is None
    assert "NO_PERMISSION" in first.reason
    assert len(caplog.records) == 1


def test_a_lost_gpu_ends_the_window_and_every_later_one_and_never_raises():
    time, meter, monitor = moved_monitor()
    meter.faults["energy"] = failing(GpuLostError("GPU_IS_LOST", "total energy"), 2.0)
    lost = measured(time, monitor)
    assert (lost.energy_j, lost.quality) == (None, "invalid")
    assert "GPU_IS_LOST" in lost.reason
    assert not monitor.available
    assert measured(time, monitor).energy_j is None


@pytest.mark.parametrize(
    ("begin_s", "end_s", "known"),
    [(2.0, 2.6, True), (0.0, 0.6, True), (4.4, 9.0, True), (0.0, 3.0, False), (2.0, 9.0, False), (1.0, 4.0, True)],
)
def test_failed_readings_are_counted_and_only_unseen_ends_make_a_window_unknown(begin_s, end_s, known):
    """The counter keeps counting while it cannot be read, so a gap inside is no loss."""
    time, meter, monitor = moved_monitor()
    meter.faults["energy"] = failing(NvmlError("TIMEOUT", "total energy"), begin_s, end_s)
    m = measured(time, monitor)
    assert m.failed_reads > 50
    if known:
        assert m.energy_j == pytest.approx(1500, rel=0.01)
    else:
        assert m.energy_j is None
        assert "TIMEOUT" in m.reason


def test_a_gap_in_integrated_power_is_a_loss():
    time, meter, monitor = moved_monitor()
    meter.faults["energy"] = failing(NotSupportedError("NOT_SUPPORTED", "total energy"))
    meter.faults["power"] = failing(NvmlError("TIMEOUT", "power"), 1.0, 4.0)
    assert measured(time, monitor).energy_j is None


def test_a_counter_that_stops_being_supported_is_a_fault_and_is_not_mixed_with_power():
    time, meter, monitor = moved_monitor()
    measured(time, monitor, 1.0)
    meter.faults["energy"] = failing(NotSupportedError("NOT_SUPPORTED", "total energy"), 2.0)
    m = measured(time, monitor)
    assert (m.energy_j, m.source) == (None, "counter")


@pytest.mark.parametrize(
    ("reasons", "quality"), [(0x4, "ok"), (0x1, "ok"), (0x20, "contaminated"), (0x8, "contaminated")]
)
def test_clocks_held_down_contaminate_a_window_and_the_power_cap_does_not(reasons, quality):
    time, meter, monitor = moved_monitor()
    monitor.begin_window("work")
    time.pass_s(3)
    meter.reasons = reasons
    time.pass_s(1)
    meter.reasons = 0
    time.pass_s(1)
    m = monitor.end_window("work")
    assert m.quality == quality
    assert m.clocks_event_reasons == reasons


def test_another_process_contaminates_a_window():
    time, meter, monitor = moved_monitor()
    meter.shared = True
    assert measured(time, monitor, 1.0).quality == "short+contaminated"


def test_readings_that_the_driver_does_not_give_are_none():
    time, meter, monitor = moved_monitor()
    for reading in ("temperature", "utilisation", "reasons"):
        meter.faults[reading] = failing(NotSupportedError("NOT_SUPPORTED", reading))
    m = measured(time, monitor)
    assert (m.temp_start_c, m.temp_end_c, m.gpu_util_pct, m.clocks_event_reasons) == (None, None, None, None)
    assert m.energy_j == pytest.approx(1500, rel=0.01)


def test_where_there_is_no_nvml_it_raises_by_name_or_measures_nothing_if_asked(monkeypatch):
    def absent(device):
        raise EnergyUnavailableError("NVML does not start: Driver Not Loaded")

    monkeypatch.setattr("moe_gpu.energy_monitor.monitor.open_meter", absent)
    monkeypatch.setattr("moe_gpu.energy_monitor.sampler.open_meter", absent)
    with pytest.raises(EnergyUnavailableError, match="Driver Not Loaded"):
        EnergyMonitor()
    with pytest.raises(EnergyUnavailableError, match="Driver Not Loaded"):
        PowerSampler()
    monitor = EnergyMonitor(on_unavailable="none", synchronise=False)
    with monitor.window("work", tokens=5) as window:
        pass
    assert not monitor.available
    assert monitor.uuid is monitor.driver is None
    assert window.measurement.energy_j is None
    assert "Driver Not Loaded" in window.measurement.reason
    assert monitor.get_efficiency_metrics()["joules_per_1000_tokens"] is None
    sampler = PowerSampler(on_unavailable="none")
    with sampler:
        pass
    assert (sampler.timeline(), sampler.latest) == ([], None)
    assert "Driver Not Loaded" in sampler.reason


@pytest.mark.parametrize("device", ["cpu", "cuda:0", 0, "toaster"])
def test_a_device_that_is_no_gpu_is_refused_by_name(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(EnergyUnavailableError, match=str(device)):
        EnergyMonitor(device)


@pytest.mark.parametrize(
    ("options", "said"), [({"on_unavailable": "maybe"}, "raise, none"), ({"poll_s": 0}, "poll_s=0 must be positive")]
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        EnergyMonitor(**options)
    with pytest.raises(ValueError, match="hz=0"):
        PowerSampler(hz=0)


# Threads, forks, ends


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moe_gpu-")]


def threaded_monitor(**options) -> EnergyMonitor:
    """A monitor that reads an invented meter from its thread; the counter ticks every 4 ms."""
    return EnergyMonitor(InventedMeter(WorldClock(), 300.0, 0.004), synchronise=False, poll_s=0.001, **options)


def test_many_windows_leave_no_thread_no_file_and_a_bounded_list(monkeypatch):
    monkeypatch.setattr("moe_gpu.energy_monitor.monitor.KEPT_WINDOWS", 50)
    files = "/proc/self/fd"
    with threaded_monitor() as monitor:
        before = len(os.listdir(files)) if os.path.isdir(files) else 0
        for _ in range(200):
            with monitor.window("step", tokens=2):
                pass
        assert threads() == []
        assert len(monitor.measurements) == 50
        assert monitor.tokens_total == 400
        assert monitor.get_efficiency_metrics()["windows_without_energy"] == 200
        assert (len(os.listdir(files)) if os.path.isdir(files) else 0) <= before


def test_the_thread_reads_while_a_window_is_open_and_not_otherwise():
    with threaded_monitor() as monitor:
        assert threads() == []
        with monitor.window("work") as window:
            assert threads() == ["moe_gpu-energy"]
            with monitor.window("inner"):
                assert threads() == ["moe_gpu-energy"]
            wall.sleep(0.2)
        assert threads() == []
    assert window.measurement.n_ticks > 10
    assert window.measurement.energy_j == pytest.approx(300 * window.measurement.duration_s, rel=0.1)


def test_closing_or_dropping_a_monitor_ends_its_thread_and_lets_the_driver_go():
    monitor = threaded_monitor()
    meter = monitor._meter
    monitor.begin_window("work")
    monitor.close()
    assert threads() == []
    assert meter.closed
    assert monitor.end_window("work").reason == "the monitor is closed"
    monitor = threaded_monitor()
    meter = monitor._meter
    monitor.begin_window("work")
    del monitor
    gc.collect()
    assert threads() == []
    assert meter.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_measures_its_own_windows_and_spoils_its_parents():
    monitor = threaded_monitor()
    monitor.begin_window("parent")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            spoiled = monitor.end_window("parent")
            with monitor.window("child") as window:
                wall.sleep(0.1)
            found = [spoiled.energy_j, spoiled.reason, window.measurement.energy_j, len(threads())]
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    wall.sleep(0.1)
    with os.fdopen(reading) as pipe:
        energy, reason, own, running = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert energy is None
    assert "forked" in reason
    assert own > 5
    assert running == 0
    assert monitor.end_window("parent").energy_j > 5


# Experts and efficiency


def test_efficiency_counts_windows_with_tokens_and_energy_and_says_how_many_have_none():
    time, _, monitor = moved_monitor(200.0)
    measured(time, monitor, 5.0, tokens=1000)
    measured(time, monitor, 5.0, tokens=3000)
    measured(time, monitor, 5.0)
    measured(time, monitor, 0.01, tokens=10)
    metrics = monitor.get_efficiency_metrics()
    assert metrics["tokens"] == 4000
    assert metrics["joules_per_1000_tokens"] == pytest.approx(500, rel=0.01)
    assert metrics["tokens_per_joule"] == pytest.approx(2, rel=0.01)
    assert (metrics["windows"], metrics["windows_without_energy"]) == (2, 1)
    assert metrics["stderr_j"] < 10


def test_experts_are_compared_by_joules_per_token_and_unknown_ones_stay_unknown():
    _, _, monitor = moved_monitor()
    monitor.record_expert_execution(0, 100, energy_j=10.0)
    monitor.record_expert_execution(0, 100, energy_j=30.0)
    monitor.record_expert_execution(1, 50, energy_j=40.0, method="modelled")
    monitor.record_expert_execution(2, 70, layer=1)
    first, second, third = monitor.get_expert_comparison()
    assert (first["tokens"], first["energy_j"], first["joules_per_token"]) == (200, 40, 0.2)
    assert first["over_mean"] == pytest.approx(0.2 / (80 / 250))
    assert (second["joules_per_token"], second["method"]) == (0.8, "modelled")
    assert (third["layer"], third["energy_j"], third["joules_per_token"], third["over_mean"]) == (1, None, None, None)
    with pytest.raises(ValueError, match="energy_j=-1"):
        monitor.record_expert_execution(0, 1, energy_j=-1)


def test_net_energy_is_above_the_idle_gpu_and_unknown_before_that_is_measured():
    time, _, monitor = moved_monitor(lambda t: 100.0 if t < 5 else 350.0)
    assert measured(time, monitor, 1.0).net_energy_j is None
    time, _, monitor = moved_monitor(lambda t: 100.0 if t < 5 else 350.0)
    assert monitor.measure_idle(5.0).energy_j == pytest.approx(500, rel=0.01)
    m = measured(time, monitor, 4.0)
    assert m.net_energy_j == pytest.approx(4 * 250, rel=0.02)
    assert m.idle_w == pytest.approx(100, rel=0.01)


def test_windows_as_csv_have_the_columns_and_leave_the_unknown_empty(tmp_path):
    time, _, monitor = moved_monitor()
    measured(time, monitor, 5.0, tokens=10)
    measured(time, monitor, 0.01)
    monitor.to_csv(tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text()
    assert text.splitlines()[0] == (
        "run_id,window,duration_s,energy_j,stderr_j,idle_w,net_energy_j,tokens,joules_per_token,tokens_per_joule,"
        "sm_count,temp_start_c,temp_end_c,n_ticks,source,scope,quality,driver"
    )
    good, bad = csv.DictReader(text.splitlines())
    assert float(good["energy_j"]) == monitor.measurements[0].energy_j
    assert (bad["energy_j"], bad["stderr_j"], bad["quality"]) == ("", "", "invalid")
    assert len(MEASUREMENT_COLUMNS) == 18


# The sampler


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


# The estimate itself, and traces


@given(st.floats(1, 1000), st.floats(0, 1e6), st.integers(2, 80))
@settings(deadline=None)
def test_a_line_is_found_whole(watts, start, n):
    times = [0.1 * i for i in range(n)]
    slope = fit_slope(times, [start + watts * t for t in times])
    assert slope.watts == pytest.approx(watts, rel=1e-6, abs=1e-4)
    assert (slope.stderr_w is None) == (n == 2)


def test_no_line_through_one_tick():
    assert fit_slope([], []) is None
    assert fit_slope([1.0], [2.0]) is None


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
