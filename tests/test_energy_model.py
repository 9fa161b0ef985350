"""The model of experts' joules on invented GPUs that obey it, and on some that do not; what a layer says of itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu import AdvancedMoELayer, ExpertProfiler, layer_energy
from moe_gpu.config import PRESETS
from moe_gpu.energy import standard_workloads
from moe_gpu.energy_model import CalibrationError, EnergyModel, Workload, calibration_path, nonnegative_least_squares
from moe_gpu.explain import layer_work
from moe_gpu.nvml import NoPermissionError
from tests.energy_cases import (
    J_PER_BYTE,
    J_PER_FLOP,
    MODEL,
    STATIC_W,
    UUID,
    measured_window,
    moved_monitor,
    points,
    simple_work,
    true_energy,
)
from tests.tuning_cases import own_cache  # noqa: F401 a fixture

QWEN = PRESETS["qwen3-30b-a3b"]


def model(noise: float = 0.0, **changes) -> EnergyModel:
    return replace(EnergyModel.fit(points(noise), "bfloat16", UUID, "999.99"), **changes)


# Fitting


def test_a_gpu_that_obeys_the_model_gives_its_coefficients():
    fitted = model()
    assert fitted.static_w == pytest.approx(STATIC_W)
    assert fitted.j_per_flop == pytest.approx(J_PER_FLOP)
    assert fitted.j_per_byte == pytest.approx(J_PER_BYTE)
    assert fitted.held_out_error < 1e-9
    assert fitted.flops_per_s == 7e14
    assert fitted.bytes_per_s == 4e12


def test_intervals_cover_the_truth_of_noisy_windows_and_narrow_with_more_of_them():
    inside = 0
    for seed in range(16):
        fitted = EnergyModel.fit(points(0.01, seed, trials=8), "bfloat16", UUID, None)
        low, high = fitted.intervals["j_per_byte"]
        inside += low <= J_PER_BYTE <= high
    assert inside >= 11
    few, many = (EnergyModel.fit(points(0.02, 1, trials), "bfloat16", UUID, None) for trials in (3, 24))
    assert many.covariance[2][2] < few.covariance[2][2]


def test_the_held_out_error_finds_a_workload_that_does_not_obey():
    odd = [replace(p, energy_j=p.energy_j * 1.5) if "256" in p.workload else p for p in points()]
    fitted = EnergyModel.fit(odd, "bfloat16", UUID, None)
    assert fitted.held_out["experts, 256 rows each"] == pytest.approx(1 - 1 / 1.5, abs=0.02)
    assert set(fitted.held_out) == {p.workload for p in odd if not p.anchor}


def limited(limit_w):
    """Windows of a board that obeys the model up to its power limit."""
    return [replace(p, energy_j=min(p.energy_j, limit_w * p.duration_s)) for p in points()]


def test_windows_at_the_power_limit_do_not_spoil_the_fit():
    limit_w = 0.8 * max(p.energy_j / p.duration_s for p in points())
    assert sum(p.energy_j / p.duration_s > limit_w for p in points()) >= 8
    fitted = EnergyModel.fit(limited(limit_w), "bfloat16", UUID, None, limit_w)
    assert fitted.j_per_flop == pytest.approx(J_PER_FLOP, rel=1e-6)
    assert fitted.j_per_byte == pytest.approx(J_PER_BYTE, rel=1e-6)
    assert fitted.held_out_error < 1e-6
    assert EnergyModel.fit(limited(limit_w), "bfloat16", UUID, None).held_out_error > 0.03, "the limit is what helps"


def test_a_window_at_the_power_limit_takes_no_more_than_it_allows():
    limit_w = 300.0
    free, bound = (EnergyModel.fit(points(), "bfloat16", UUID, "999.99", limit) for limit in (None, 1e6))
    bound = replace(bound, power_limit_w=limit_w)
    work, counts, calls = simple_work(), [64, 64, 64, 64], 20_000_000
    assert free.predict(work, counts, 5.0, calls)[0] > 5 * limit_w
    assert bound.predict(work, counts, 5.0, calls)[0] == pytest.approx(5 * limit_w)
    report = bound.attribute(counts, measured_window(5 * limit_w), work, calls=calls)
    assert report.total.closure == pytest.approx(0, abs=1e-9)
    assert report.total.static_j + report.total.dynamic_j + report.total.shared_j == pytest.approx(5 * limit_w)
    assert sum(row.dynamic_j for row in report.experts) == pytest.approx(report.total.dynamic_j)
    idle = bound.predict(work, counts, 5.0, 1)[0]
    assert idle == free.predict(work, counts, 5.0, 1)[0], "below the limit nothing changes"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-20, 20).map(lambda n: n / 10)] * 4), min_size=4, max_size=9))
def test_nonnegative_least_squares_is_optimal(rows):
    """Karush, Kuhn and Tucker: no coefficient is negative, none that is positive could move, none at 0 would rise.

    Of tenths, which are never so nearly dependent that float64 cannot tell the optimum (columns 1e-15 apart were once).
    """
    table = np.array(rows)
    a, b = table[:, :3], table[:, 3]
    x = nonnegative_least_squares(a, b)
    gradient = a.T @ (a @ x - b)
    assert (x >= 0).all()
    assert (gradient >= -1e-6).all()
    assert abs(gradient @ x) < 1e-6


def test_a_coefficient_that_would_be_negative_is_nought():
    a = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative_least_squares(a, np.array([3.0, 2.0, 1.0]))[1] == 0


@pytest.mark.parametrize("left", [(), ("idle",), ("idle", "copy"), ("copy", "product in L2")])
def test_points_that_do_not_tell_the_coefficients_apart_are_refused(left):
    some = [p for p in points() if p.workload in left]
    with pytest.raises(CalibrationError, match="do not tell time, FLOPs and bytes apart"):
        EnergyModel.fit(some, "bfloat16", UUID, None)


def busy(time, meter, rate_flops, rate_bytes, seconds=0.02):
    def call():
        meter.watts = lambda t: STATIC_W + J_PER_FLOP * rate_flops + J_PER_BYTE * rate_bytes
        time.pass_s(seconds)

    return call


def test_calibrating_measures_every_workload_in_shuffled_order_and_fits_them():
    time, meter, monitor = moved_monitor(STATIC_W)
    idle = monitor.clock.sleep

    def rest(seconds):
        meter.watts = lambda t: STATIC_W
        idle(seconds)

    monitor.clock = type(monitor.clock)(monitor.clock.now_ns, rest)
    workloads = [
        Workload("idle", None, anchor=True),
        Workload("copy", busy(time, meter, 0, 4e12), hbm_bytes=4e12 * 0.02, anchor=True),
        Workload("product", busy(time, meter, 7e14, 0), flops=7e14 * 0.02, anchor=True),
        Workload("experts", busy(time, meter, 3e14, 2e12), flops=3e14 * 0.02, hbm_bytes=2e12 * 0.02),
    ]
    order = []
    found = EnergyModel.calibrate(
        workloads, "bfloat16", monitor=monitor, min_duration_s=3.0, trials=3, on_trial=lambda *told: order.append(told)
    )
    names = [name for _, _, name in order]
    assert sorted(names) == sorted([w.name for w in workloads] * 3)
    assert names != sorted(names)
    assert found.static_w == pytest.approx(STATIC_W, rel=0.01)
    assert found.j_per_flop == pytest.approx(J_PER_FLOP, rel=0.01)
    assert found.j_per_byte == pytest.approx(J_PER_BYTE, rel=0.01)
    assert found.held_out_error < 0.01
    assert (found.gpu_uuid, found.driver) == (UUID, "999.99")


def test_a_window_that_cannot_be_measured_ends_the_calibration_by_name():
    time, meter, monitor = moved_monitor(STATIC_W)
    meter.faults["energy"] = lambda t: NoPermissionError("NO_PERMISSION", "total energy")
    with pytest.raises(CalibrationError, match=r"copy could not be measured: .*NO_PERMISSION"):
        EnergyModel.calibrate([Workload("copy", busy(time, meter, 0, 1e12))], "bfloat16", monitor=monitor)
    monitor.close()
    with pytest.raises(CalibrationError, match="the monitor is closed"):
        EnergyModel.calibrate([], "bfloat16", monitor=monitor)


def test_the_standard_workloads_run_and_count_what_they_execute():
    small = PRESETS["small"].with_(input_dim=16, expert_dim=16, hidden_dim=32, num_experts=4)
    workloads = standard_workloads(torch.device("cpu"), torch.float32, small, (1, 16), copy_bytes=4096, square=8)
    assert [w.name for w in workloads[:3]] == ["idle", "copy", "product in L2"]
    for workload in workloads[1:]:
        workload.call()
    assert [w.anchor for w in workloads] == [True, True, True, False, False]
    one, many = workloads[3:]
    assert many.flops == 16 * one.flops == small.forward_flops(16 * 4)
    weights = 4 * 4 * small.parameters_per_expert
    assert weights < one.hbm_bytes < many.hbm_bytes


# Attribution

COUNTS = st.lists(st.integers(0, 300), min_size=4, max_size=4)


@settings(max_examples=80, deadline=None)
@given(COUNTS, st.floats(650.0, 5000.0), st.integers(1, 5000))
def test_parts_sum_to_the_whole_and_none_is_negative(counts, energy_j, calls):
    work = simple_work(shared_flops_per_token=1e4, shared_bytes_per_token=100.0, shared_bytes_per_call=1000.0)
    report = MODEL.attribute(counts, measured_window(energy_j, calls=calls), work)
    total = report.total
    raw = math.fsum(row.dynamic_j for row in report.experts)
    assert raw == pytest.approx(total.dynamic_j)
    assert total.static_j + total.dynamic_j + total.shared_j + total.unattributed_j == pytest.approx(energy_j)
    assert total.closure == pytest.approx(abs(total.unattributed_j) / energy_j)
    for row in report.experts:
        assert min(row.dynamic_j, row.static_j, row.tokens, row.padded_tokens - row.tokens) >= -1e-9
        assert row.stderr_j >= 0
    rescaled = math.fsum(row.rescaled_j for row in report.experts) + total.rescaled_shared_j
    assert rescaled + total.static_j == pytest.approx(energy_j)
    if sum(counts):
        assert math.fsum(row.static_j for row in report.experts) == pytest.approx(total.static_j)


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.permutations(range(4)))
def test_permuting_experts_permutes_the_result(counts, order):
    work = simple_work()
    plain = MODEL.attribute(counts, measured_window(), work).experts
    moved = MODEL.attribute([counts[e] for e in order], measured_window(), work).experts
    for expert, source in enumerate(order):
        for name, value in vars(moved[expert]).items():
            if isinstance(value, float):  # sums over experts are taken in another order
                assert value == pytest.approx(getattr(plain[source], name)), name
        assert (moved[expert].joules_per_token is None) == (plain[source].joules_per_token is None)


def test_an_idle_expert_takes_nothing_and_has_no_joules_per_token():
    idle, used, *_ = MODEL.attribute([0, 5, 5, 5], measured_window(), simple_work()).experts
    assert (idle.dynamic_j, idle.static_j, idle.joules_per_token) == (0, 0, None)
    assert used.joules_per_token > 0


def test_fetching_an_experts_weights_costs_what_many_tokens_through_it_do():
    """Why shares of time or tokens are wrong in decode: the first token brings the weights along."""
    work = layer_work(None, QWEN, 64, torch.bfloat16)
    done = [work.execute([rows] + [0] * 127) for rows in (1, 2)]
    first, second = (J_PER_FLOP * float(d.flops_E[0]) + J_PER_BYTE * float(d.bytes_E[0]) for d in done)
    assert first > 50 * (second - first)


def test_the_intervention_is_predicted_as_the_gpu_would_take_it():
    """The same tokens to 1, 8, 64 and 128 experts, on a GPU that obeys the model: differences as measured."""
    work = layer_work(None, QWEN, 64, torch.bfloat16)
    fitted = model()
    found = []
    for used in (8, 64, 128):
        counts = [512 // used] * used + [0] * (128 - used)
        done = work.execute(counts, calls=1000)
        flops, moved = done.flops_E.sum() + done.shared_flops, done.bytes_E.sum() + done.shared_bytes
        predicted, stderr = fitted.predict(work, counts, 2.0, calls=1000)
        assert predicted == pytest.approx(true_energy(2.0, flops, moved))
        assert stderr < 0.01 * predicted
        found.append(predicted)
    assert found[0] < found[1] < found[2]


def test_a_window_without_energy_gives_the_prediction_alone():
    report = MODEL.attribute([1, 2, 3, 4], measured_window(None, reason="why"), simple_work())
    assert report.total.measured_j is report.total.closure is report.total.unattributed_j is None
    assert report.experts[0].rescaled_j is None
    assert report.experts[0].dynamic_j > 0
    assert report.rows[0] is report.total


def test_experts_as_csv_have_the_columns_and_leave_the_unknown_empty(tmp_path):
    MODEL.attribute([0, 2, 3, 4], measured_window(), simple_work()).to_csv(tmp_path / "a.csv")
    head, idle, *_ = (tmp_path / "a.csv").read_text().splitlines()
    assert head == (
        "run_id,layer,expert,tokens,padded_tokens,flops,hbm_bytes,dynamic_j,static_j,stderr_j,joules_per_token,method,"
        "calibration_id"
    )
    assert idle == f"run,0,0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,,modelled,{MODEL.calibration_id}"


def test_the_window_counts_its_calls_and_another_number_may_be_given():
    work = simple_work()
    by_window = MODEL.attribute([1, 2, 3, 4], measured_window(calls=50), work)
    given_calls = MODEL.attribute([1, 2, 3, 4], measured_window(calls=None), work, calls=50, layer=3)
    assert given_calls.total.dynamic_j == by_window.total.dynamic_j
    assert {row.layer for row in given_calls.experts} == {3}


# Keeping


def test_a_calibration_is_kept_by_board_driver_and_dtype_and_reads_back(cache):
    fitted = model(0.01)
    path = fitted.save()
    assert path == calibration_path(UUID, "999.99", "bfloat16")
    assert path.parent == cache / "energy"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    again = EnergyModel.load(UUID, "999.99", "bfloat16")
    assert again == fitted
    assert again.calibration_id == fitted.calibration_id
    assert model(0.02).calibration_id != fitted.calibration_id


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("GPU-other", "999.99", "bfloat16"), f"the calibration is of GPU {UUID}, not of GPU-other"),
        ((UUID, "1000.0", "bfloat16"), "of driver 999.99, not of 1000.0"),
        ((UUID, "999.99", "float16"), "of dtype bfloat16, not of float16"),
    ],
)
def test_a_calibration_of_something_else_is_refused_in_one_line(asked, said, tmp_path):
    path = model().save(tmp_path / "c.json")
    with pytest.raises(CalibrationError, match=said) as refusal:
        EnergyModel.load(*asked, path)
    assert "\n" not in str(refusal.value)
    assert "moe-gpu energy calibrate" in str(refusal.value)
    with pytest.raises(CalibrationError, match="no calibration of"):
        EnergyModel.load(*asked)


def test_windows_and_work_of_something_else_are_refused():
    with pytest.raises(CalibrationError, match="not of GPU-other"):
        MODEL.attribute([1, 2, 3, 4], measured_window(gpu_uuid="GPU-other"), simple_work())
    with pytest.raises(CalibrationError, match="not of float16"):
        MODEL.attribute([1, 2, 3, 4], measured_window(), replace(simple_work(), dtype="float16"))


@pytest.mark.parametrize("damage", ["cut", "newer", "list", "binary", "field", "folder"])
def test_a_damaged_calibration_is_refused_by_name(damage, tmp_path):
    path = model().save(tmp_path / "c.json")
    values = json.loads(path.read_text())
    if damage == "cut":
        path.write_text(path.read_text()[:-30])
    elif damage == "newer":
        path.write_text(json.dumps({**values, "schema": values["schema"] + 1}))
    elif damage == "list":
        path.write_text("[]")
    elif damage == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif damage == "field":
        path.write_text(json.dumps({**values, "mood": 1}))
    else:
        path = tmp_path
    with pytest.raises(CalibrationError, match=str(path)):
        EnergyModel.load(UUID, "999.99", "bfloat16", path)


# The layer


def test_a_layer_without_a_gpu_says_why_its_energy_is_not_measured():
    layer = AdvancedMoELayer(8, 8, 16, 4)
    layer(torch.randn(3, 8))
    feature = layer.features["energy"]
    assert (feature.asked, feature.active) == (True, False)
    assert feature.reason == "energy is read from the NVIDIA driver, and the layer is on cpu"
    energy = layer.get_performance_stats()["energy"]
    assert (energy.measurement, energy.experts, energy.reason) == (None, None, feature.reason)
    quiet = AdvancedMoELayer(8, 8, 16, 4, enable_energy_monitoring=False)
    assert not quiet.features["energy"].asked
    assert quiet.get_performance_stats()["energy"] is None
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.features["energy"] == feature


@pytest.fixture
def metered(monkeypatch):
    """A layer on the CPU whose energy is read from an invented meter, by a clock that the test moves."""
    time, meter, _ = moved_monitor(400.0)
    monkeypatch.setattr(layer_energy, "meter_of", lambda device: (meter, "an invented meter"))
    monkeypatch.setattr(layer_energy.time, "monotonic_ns", lambda: time.now_ns)
    profiler = ExpertProfiler(4, copy_interval_s=0.0)
    layer = AdvancedMoELayer(8, 8, 16, 4, profiler=profiler)
    return time, meter, layer


def run(layer, calls=10, tokens=6):
    for _ in range(calls):
        layer(torch.randn(tokens, 8))
    layer.profiler.flush()


def test_a_layer_tells_joules_since_it_was_last_asked_without_a_thread(metered):
    time, meter, layer = metered
    first = layer.get_performance_stats()["energy"]
    assert first.measurement.energy_j is None
    assert "first reading" in first.reason
    time.pass_s(5.0)
    m = layer.get_performance_stats()["energy"].measurement
    assert m.energy_j == pytest.approx(2000, abs=40)
    assert abs(m.energy_j - 2000) <= 3 * m.stderr_j
    assert m.quality == "ok"
    time.pass_s(0.5)
    assert layer.get_performance_stats()["energy"].measurement.quality == "short"
    meter.offset_j = -1e4
    time.pass_s(1.0)
    assert "went backwards" in layer.get_performance_stats()["energy"].reason
    meter.faults["energy"] = lambda t: NoPermissionError("NO_PERMISSION", "total energy")
    assert "NO_PERMISSION" in layer.get_performance_stats()["energy"].reason


def test_a_calibrated_layer_tells_what_each_expert_took(metered):
    time, _, layer = metered
    assert "no calibration of" in layer.features["energy"].reason
    assert layer.features["energy"].active
    fitted = EnergyModel.fit(points(), "float32", UUID, "999.99")
    fitted.save()
    assert layer.features["energy"].reason == "an invented meter"
    run(layer)
    layer.get_performance_stats()
    before = layer.profiler.counts_LE()[0].clone()
    time.pass_s(5.0)
    run(layer, calls=20)
    energy = layer.get_performance_stats()["energy"]
    assert energy.reason is None
    report = energy.experts
    served = layer.profiler.counts_LE()[0] - before
    assert served.sum() == 20 * 6 * 2
    assert [row.tokens for row in report.experts] == pytest.approx(served.tolist())
    assert energy.measurement.energy_j > 0
    assert report.total.measured_j is report.total.closure is None, "other layers' joules are in it too"
    for row in report.experts:
        assert row.static_j is row.rescaled_j is None
        assert row.joules_per_token == (pytest.approx(row.dynamic_j / row.tokens) if row.tokens else None)
    time.pass_s(5.0)
    assert "no eager call" in layer.get_performance_stats()["energy"].reason


def test_without_a_profiler_experts_are_not_told(metered):
    time, _, layer = metered
    layer.profiler = None
    layer.get_performance_stats()
    time.pass_s(5.0)
    energy = layer.get_performance_stats()["energy"]
    assert energy.measurement.energy_j > 0
    assert "profiler" in energy.reason


def test_a_layers_own_work_fits_the_model():
    layer = AdvancedMoELayer(8, 8, 16, 4)
    _, stats = layer(torch.randn(5, 8))
    work = layer.energy_work(5)
    fitted = EnergyModel.fit(points(), "float32", UUID, "999.99")
    report = fitted.attribute(stats.routing, measured_window(), work)
    assert [row.tokens for row in report.experts] == [1000 * count for count in stats.counts_E.tolist()]


def test_counting_calls_costs_the_compiled_layer_no_graph_break():
    x = torch.randn(5, 8)
    breaks = []
    for monitored in (True, False):
        torch._dynamo.reset()
        layer = AdvancedMoELayer(8, 8, 16, 4, enable_energy_monitoring=monitored)
        breaks.append(torch._dynamo.explain(layer)(x).graph_break_count)
    assert breaks[0] == breaks[1]
