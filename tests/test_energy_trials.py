"""Loops measured again and again on an invented meter: intervals, comparisons, verdicts, and the choice of a slice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.energy_monitor import (
    EnergyTrials,
    PerformanceComparator,
    Ratio,
    measure_energy,
    measure_interleaved,
    select_sm_slice,
)
from moe_gpu.energy_monitor.trials import compare_trials, student_t
from moe_gpu.nvml import NoPermissionError
from moe_gpu.results import EnergyMeasurement
from tests.energy_cases import InventedMeter, MovedClock, failing, moved_monitor


def worker(time: MovedClock, meter: InventedMeter, seconds: float, watts: float):
    """A call that takes some time at some power."""

    def call():
        meter.watts = lambda t: watts
        time.pass_s(seconds)

    return call


def test_measure_energy_gives_joules_per_call_with_an_interval():
    time, meter, monitor = moved_monitor()
    rests = []
    monitor.clock = type(monitor.clock)(monitor.clock.now_ns, lambda s: (rests.append(s), time.pass_s(s)))
    trials = measure_energy(worker(time, meter, 0.01, 400.0), 2.5, trials=3, cooldown_s=1.0, monitor=monitor, tokens=8)
    assert rests == [1.0] * 3
    assert [w.window for w in trials.windows] == ["measure"] * 3
    assert all(w.duration_s >= 2.5 for w in trials.windows)
    assert trials.joules_per_call == pytest.approx(4.0, rel=0.01)
    assert trials.joules_per_token == pytest.approx(0.5, rel=0.01)
    low, high = trials.interval_j_per_token
    assert low <= 0.5 * 1.003
    assert high >= 0.5 * 0.997
    assert trials.seconds_per_call == pytest.approx(0.01, rel=0.01)
    assert trials.quality == "ok"


def test_interleaved_trials_turn_round_every_second_time():
    time, meter, monitor = moved_monitor()
    order = []
    calls = {"a": worker(time, meter, 0.05, 300), "b": worker(time, meter, 0.05, 500)}
    measure_interleaved(calls, monitor=monitor, min_duration_s=0.3, trials=4, on_trial=order.append)
    assert "".join(order) == "abbaabba"
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_interleaved({}, monitor=monitor)
    with pytest.raises(ValueError, match="trials=0"):
        measure_interleaved(calls, monitor=monitor, trials=0)


def test_the_comparator_finds_a_real_difference_with_its_interval():
    time, meter, monitor = moved_monitor()
    comparator = PerformanceComparator(monitor, rounds=3, block_s=2.5)
    found = comparator.compare(worker(time, meter, 0.02, 300.0), worker(time, meter, 0.01, 450.0), ("loop", "ours"))
    assert found.throughput.value == pytest.approx(2, rel=0.02)
    assert found.throughput.verdict == "better"
    assert found.energy.value == pytest.approx(0.75, rel=0.02)
    assert found.energy.low < 0.76 < 1.01 * found.energy.high / found.energy.low
    assert found.energy.verdict == "better"
    assert found.utilisation.verdict == "inconclusive"
    rows = found.findings()
    assert [row.verdict for row in rows] == ["better", "better", "inconclusive"]
    assert rows[1].name == "energy per call, ours over loop"


def test_the_comparator_without_energy_still_compares_speed_and_says_why():
    time, meter, monitor = moved_monitor()
    meter.faults["energy"] = failing(NoPermissionError("NO_PERMISSION", "total energy"))
    found = PerformanceComparator(monitor, rounds=2, block_s=0.5).compare(
        worker(time, meter, 0.02, 300.0), worker(time, meter, 0.01, 450.0)
    )
    assert found.throughput.verdict == "better"
    assert (found.energy.value, found.energy.verdict) == (None, "inconclusive")
    assert "NO_PERMISSION" in found.findings()[1].reason


def trials_of(per_call: list[float], name: str = "x") -> EnergyTrials:
    windows = [
        EnergyMeasurement("r", name, 1.0, energy_j=100 * e, calls=100, n_ticks=50, quality="ok") for e in per_call
    ]
    return EnergyTrials(name, windows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)), min_size=2, max_size=6), st.floats(0.01, 1000.0))
def test_swapped_noise_is_inconclusive(pairs, scale):
    """Every noise that the baseline meets meets the optimised one in another round: there is no difference."""
    a, b = [], []
    for x, y in pairs:
        a += [x * scale, x * scale, y * scale, y * scale]
        b += [y * scale, y * scale, x * scale, x * scale]
    found = compare_trials(trials_of(a), trials_of(b))
    assert found.energy.verdict == "inconclusive"
    assert found.energy.value == pytest.approx(1)


def test_equal_noise_is_called_a_difference_no_more_often_than_the_interval_says():
    chance, wrong = random.Random(0), 0
    for _ in range(400):
        a, b = ([chance.gauss(1, 0.05) for _ in range(8)] for _ in range(2))
        wrong += compare_trials(trials_of(a), trials_of(b)).energy.verdict != "inconclusive"
    assert wrong <= 0.08 * 400


def test_a_difference_beyond_the_noise_is_found():
    chance = random.Random(0)
    a = [chance.gauss(1, 0.01) for _ in range(8)]
    b = [chance.gauss(0.9, 0.01) for _ in range(8)]
    found = compare_trials(trials_of(a), trials_of(b)).energy
    assert found.verdict == "better"
    assert found.low < 0.9 < found.high


def test_ratios_without_repeats_have_no_verdict():
    assert Ratio.of([], "up", "down").value is None
    assert Ratio.of([2.0], "up", "down") == Ratio(pytest.approx(2.0), None, None, "inconclusive")
    with pytest.raises(ValueError, match="degrees=0"):
        student_t(0)
    assert student_t(3) == pytest.approx(3.182)
    assert student_t(1000) < student_t(15)


def slice_of(time, meter, seconds_of, watts_of):
    def fn(sms):
        meter.watts = lambda t: watts_of(sms)
        time.pass_s(seconds_of(sms))

    return fn


def test_a_slice_with_fewer_joules_within_the_bound_is_chosen():
    time, meter, monitor = moved_monitor()
    fn = slice_of(time, meter, lambda sms: {132: 0.01, 100: 0.0102, 66: 0.014}[sms], lambda sms: 100 + 4.0 * sms)
    options = dict(monitor=monitor, rounds=2, block_s=2.5)
    choice = select_sm_slice(fn, [66, 132, 100], max_slowdown=1.1, **options)
    assert choice.sm_count == 100
    assert "of the whole GPU's joules_per_token" in choice.reason
    assert choice.ratios[66][0].value < choice.ratios[100][0].value, "fewer joules, but too slow"
    assert choice.trials[100].windows[0].sm_count == 100
    assert select_sm_slice(fn, [132, 66], max_slowdown=2.0, **options).sm_count == 66
    assert select_sm_slice(fn, [132, 66], 2.0, "energy_delay", **options).sm_count == 132


def test_the_whole_gpu_stays_where_nothing_is_surely_better_or_nothing_is_measured():
    time, meter, monitor = moved_monitor()
    even = slice_of(time, meter, lambda sms: 0.01, lambda sms: 300.0)
    options = dict(monitor=monitor, rounds=2, block_s=0.5)
    assert select_sm_slice(even, [132, 66], **options).sm_count == 132
    meter.faults["energy"] = failing(NoPermissionError("NO_PERMISSION", "total energy"))
    choice = select_sm_slice(even, [132, 66], **options)
    assert choice.sm_count == 132
    assert "NO_PERMISSION" in choice.reason


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([132],), "candidates="),
        (([132, 0],), "candidates="),
        (([132, 66], 0.9), "max_slowdown=0.9"),
        (([132, 66], 1.1, "beauty"), "'beauty' is not one of joules_per_token, energy_delay"),
    ],
)
def test_a_senseless_slice_question_is_refused(arguments, said):
    _, _, monitor = moved_monitor()
    with pytest.raises(ValueError, match=said):
        select_sm_slice(lambda sms: None, *arguments, monitor=monitor)
