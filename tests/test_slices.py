"""Slices: what policies promise, forecasts, and costs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.slices import forecast
from moe_gpu.slices.costs import CostTableError, cache_path, cached_costs
from moe_gpu.slices.device import KNOWN_DEVICES
from moe_gpu.slices.forecast import LoadForecaster
from moe_gpu.slices.plan import ExpertAllocation, SliceError
from moe_gpu.slices.policies import (
    EXPLORE,
    EXPLORE_COST,
    SLICING_GAIN,
    Setting,
    TenantLoad,
    choose_plan,
    plan_balanced,
    plan_dynamic,
    plan_proportional,
    plan_static,
    predict_ms,
    pressure,
    share_out,
)
from tests.slice_cases import (  # noqa: F401 a fixture
    ADAPTIVE,
    BACKENDS,
    H200,
    POLICIES,
    PROPORTIONAL,
    STATIC,
    no_costs_of_the_user,
    profile_of,
    synthetic_costs,
)

LOADS = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)
DEVICES = st.sampled_from(sorted(KNOWN_DEVICES))


# Sharing out


@given(LOADS, st.integers(8, 132))
def test_shares_are_whole_complete_and_starve_nobody(weights, total):
    units = share_out(weights, total)
    assert sum(units) == total
    assert min(units) >= 1


@given(LOADS, st.integers(8, 132), st.integers(0, 7), st.floats(0, 1e6))
def test_more_weight_never_gives_fewer_units(weights, total, which, more):
    which %= len(weights)
    heavier = list(weights)
    heavier[which] += more
    if sum(weights) > 0:
        assert share_out(heavier, total)[which] >= share_out(weights, total)[which]


@given(LOADS, st.integers(8, 132), st.lists(st.integers(-3, 3), min_size=8, max_size=8))
def test_a_heavier_or_higher_ranked_equal_never_has_fewer_units(weights, total, ranks):
    ranks = ranks[: len(weights)]
    units = share_out(weights, total, 1, ranks)
    for a, (weight_a, rank_a) in enumerate(zip(weights, ranks, strict=True)):
        for b, (weight_b, rank_b) in enumerate(zip(weights, ranks, strict=True)):
            if weight_a > weight_b or (weight_a == weight_b and rank_a > rank_b):
                assert units[a] >= units[b]


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=8), st.integers(64, 132))
def test_shares_lie_within_one_unit_of_the_exact_share(weights, total):
    exact = [weight / sum(weights) * total for weight in weights]
    units = share_out(weights, total)
    if min(exact) >= 1:
        assert all(abs(unit - share) < 1 for unit, share in zip(units, exact, strict=True))


def test_too_many_for_the_smallest_is_refused():
    with pytest.raises(SliceError, match="5 slices of at least 2 units exceed 9 units"):
        share_out([1] * 5, 9, 2)


# Every policy


@given(
    LOADS,
    DEVICES,
    BACKENDS,
    st.sampled_from(POLICIES),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_every_plan_fits_the_device(rows, name, backend, policy, utilization, draw):
    device = KNOWN_DEVICES[name]
    setting = Setting(device, backend, 8)
    costs = replace(synthetic_costs(), backend=backend)
    profile = profile_of(rows, utilization=utilization[: len(rows)])
    plan = None
    for _ in range(3):
        plan = choose_plan(policy, profile, setting, plan, costs, {}, draw).plan
        plan.check(device)
        smallest, step = device.limits(backend)
        if plan.sliced:
            assert sum(plan.sms) <= device.num_sms
            assert all(sms >= smallest and sms % step == 0 for sms in plan.sms)
            assert [item.tenant for item in plan.slices] == list(range(len(rows)))
        else:
            assert plan.sms == (device.num_sms,)


def test_policies_are_pure():
    profile, setting = profile_of([5, 1, 1], utilization=[0.9, 0.1, 0.6]), Setting(H200, "green_context", 8)
    for policy in POLICIES:
        first = choose_plan(policy, profile, setting, None, synthetic_costs(), {}, 0.5)
        assert choose_plan(policy, profile, setting, None, synthetic_costs(), {}, 0.5) == first


def test_static_gives_what_was_asked_for_whatever_the_load():
    setting = Setting(H200, "green_context", 8)
    for rows in ([1, 1000], [1000, 1], [None, None]):
        assert choose_plan(STATIC, profile_of(rows, required=[3, 1]), setting).plan.sms == (48, 16)


def test_proportional_follows_the_load_in_whole_steps():
    plan = plan_proportional(profile_of([3, 1]), Setting(H200, "green_context", 8))
    assert plan.sms == (96, 32)
    assert plan_proportional(profile_of([3, 1]), Setting(H200, "cta", 8)).sms == (99, 33)
    assert pressure(plan, profile_of([3, 1])) == pytest.approx(0.75 * 132 / 96)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.integers(0, 7), st.floats(0, 1))
def test_dynamic_never_takes_from_who_became_busier(utilization, which, more):
    which %= len(utilization)
    setting = Setting(H200, "green_context", 8)
    begun = plan_dynamic(profile_of([1] * len(utilization)), setting, None)
    busier = list(utilization)
    busier[which] = max(busier[which], more)
    rows = [1] * len(utilization)
    before = plan_dynamic(profile_of(rows, utilization=utilization), setting, begun)
    after = plan_dynamic(profile_of(rows, utilization=busier), setting, begun)
    assert after.sms[which] >= before.sms[which]
    assert sum(after.sms) == sum(begun.sms)


def test_dynamic_moves_one_step_from_the_idlest_to_the_busiest_and_says_so():
    setting = Setting(H200, "green_context", 4)
    begun = plan_dynamic(profile_of([1] * 4), setting, None)
    assert begun.sms == (32,) * 4
    moved = plan_dynamic(profile_of([1] * 4, utilization=[0.2, 0.1, 0.95, 0.6]), setting, begun)
    assert moved.sms == (32, 24, 40, 32)
    assert moved.reason == "8 SMs from 1 to 2"
    unknown = plan_dynamic(profile_of([1] * 4, utilization=[0.2, None, 0.5, 0.6]), setting, begun)
    assert unknown.sms == begun.sms
    assert "not known" in unknown.reason


# ADAPTIVE


def test_without_costs_adaptive_does_not_slice_and_says_why():
    setting = Setting(H200, "green_context", 8)
    for costs, said in [(None, "moe-gpu slices bench"), (replace(synthetic_costs(), backend="cta"), "are of cta")]:
        choice = choose_plan(ADAPTIVE, profile_of([3, 1]), setting, costs=costs)
        assert not choice.plan.sliced
        assert said in choice.plan.reason
    beyond = choose_plan(ADAPTIVE, profile_of([1e6, 1]), setting, costs=synthetic_costs())
    assert "do not cover" in beyond.plan.reason


def test_costs_left_by_the_benchmark_are_found_by_adaptive_alone():
    assert AdvancedGPUSliceManager(8, ADAPTIVE, H200).costs is None
    synthetic_costs().save(cache_path("NVIDIA H200"))
    assert AdvancedGPUSliceManager(8, ADAPTIVE, H200).costs == synthetic_costs()
    assert AdvancedGPUSliceManager(8, STATIC, H200).costs is None
    cache_path("NVIDIA H200").write_text("{")
    with pytest.raises(CostTableError, match="damaged"):
        AdvancedGPUSliceManager(8, ADAPTIVE, H200)


def run_policies(costs, loads, policies=POLICIES, seed=0):
    """Time of every window under every policy, by the costs of the load that really came; and the managers."""
    managers = {
        policy: AdvancedGPUSliceManager(8, policy, H200, "green_context", costs=costs, seed=seed) for policy in policies
    }
    times = {policy: [] for policy in [*policies, "not sliced"]}
    for manager in managers.values():
        for tenant in range(len(loads[0])):
            manager.allocate_slices(tenant)
    for rows in loads:
        work = [(float(row > 0), row) for row in rows]
        for policy, manager in managers.items():
            times[policy].append(time_of(manager.plan, work, costs))
            peak = max(costs.time_ms(*item, sms) for item, sms in zip(work, STATIC_SMS, strict=False)) or 1
            for tenant, item in enumerate(work):
                share = costs.time_ms(*item, 16) / peak
                manager.update_slice_utilization(tenant, min(1.0, share))
            manager.optimize_allocations(rows)
        times["not sliced"].append(costs.time_ms(sum(item[0] for item in work), sum(rows), 132))
    return times, managers


STATIC_SMS = (16,) * 8


def time_of(plan, work, costs):
    if not plan.sliced:
        return costs.time_ms(sum(item[0] for item in work), sum(item[1] for item in work), plan.num_sms)
    return costs.sliced_ms([(*item, sms) for item, sms in zip(work, plan.sms, strict=True)])


@given(
    st.lists(st.integers(1, 8000), min_size=2, max_size=8),
    st.floats(0.0, 0.2),
    st.floats(1.0, 1.5),
    st.floats(0.01, 0.5),
    st.floats(0.2, 1.0),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_adaptive_is_never_worse_than_the_best_by_more_than_its_margin_and_exploration(
    rows, launch_ms, slowdown, floor, scale, seed
):
    costs = synthetic_costs(launch_ms, slowdown, floor, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "_SHIFTS_EXPECTED", 0.0)  # a load that is known never to shift asks for no caution
        times, managers = run_policies(costs, [rows] * 16, seed=seed)
    log = list(managers[ADAPTIVE].log)[-16:]
    settled = [index for index in range(2, 16) if not log[index - 1].explored]
    adaptive = sum(times[ADAPTIVE][index] for index in settled)
    for other in (STATIC, PROPORTIONAL, "not sliced"):
        best = sum(times[other][index] for index in settled)
        assert adaptive <= best / (1 - SLICING_GAIN) + 1e-9, other


def test_adaptive_follows_a_shifting_load_within_two_percent_of_the_best():
    costs = synthetic_costs(launch_ms=0.0, slowdown=1.0, floor=0.01)
    loads = []
    for window in range(120):
        heavy = (window // 40) % 3
        loads.append([6000 if tenant == heavy else 300 for tenant in range(4)])
    times, managers = run_policies(costs, loads)
    totals = {name: sum(values[1:]) for name, values in times.items()}
    explored = [entry for entry in managers[ADAPTIVE].log if entry.explored]
    best = min(value for name, value in totals.items() if name is not ADAPTIVE)
    cost_of_exploring = len(explored) * max(times[STATIC])
    assert totals[ADAPTIVE] <= best * 1.02 + cost_of_exploring
    assert 0 < len(explored) <= 3 * EXPLORE * 120
    assert totals[ADAPTIVE] < totals[STATIC]


def test_measured_times_correct_the_predictions():
    costs = synthetic_costs(launch_ms=0.0, slowdown=1.0, floor=0.01)
    manager = AdvancedGPUSliceManager(8, ADAPTIVE, H200, "green_context", costs=costs, seed=1)
    for tenant in range(3):
        manager.allocate_slices(tenant)
    manager.optimize_allocations([4000, 3000, 2000])
    chosen = manager.plan
    predicted = manager.log[-1].predicted_ms[chosen.rule]
    for _ in range(20):
        manager.record_time(predicted * 100)
    manager.optimize_allocations([4000, 3000, 2000])
    assert manager.plan.rule != chosen.rule
    with pytest.raises(SliceError, match="time_ms=0"):
        manager.record_time(0)


def test_exploration_is_rare_and_seeded():
    costs = synthetic_costs(launch_ms=0.0, slowdown=1.0)
    logs = []
    for seed in (3, 3, 4):
        _, managers = run_policies(costs, [[500, 100]] * 250, [ADAPTIVE], seed=seed)
        logs.append([entry.explored for entry in managers[ADAPTIVE].log])
    assert logs[0] == logs[1] != logs[2]
    assert sum(logs[0]) <= 10


@given(st.lists(st.integers(1, 8000), min_size=2, max_size=8), st.floats(1.0, 1.5), st.floats(0.2, 1.0))
@example([1, 1], 1.0, 1.0)  # shares that sum to EXPLORE but for rounding
@settings(max_examples=15, deadline=None)
def test_exploration_is_expected_to_cost_almost_nothing(rows, slowdown, scale):
    profile, setting = profile_of(rows), Setting(H200, "green_context", 8)
    costs, draws = synthetic_costs(0.0, slowdown, scale=scale), 400
    found = [choose_plan(ADAPTIVE, profile, setting, None, costs, {}, draw / draws * EXPLORE) for draw in range(draws)]
    assert not choose_plan(ADAPTIVE, profile, setting, None, costs, {}, EXPLORE).explored
    best = choose_plan(ADAPTIVE, profile, setting, None, costs, {}, 1.0).plan.predicted_ms
    excess = [max(0.0, choice.plan.predicted_ms / best - 1) for choice in found if choice.explored]
    one_draw = EXPLORE / draws
    assert sum(excess) * one_draw <= 4 * (EXPLORE_COST + max(excess, default=0.0) * one_draw)


def test_forecasts_learn_a_trend_that_an_average_lags_behind():
    forecaster = LoadForecaster()
    assert forecaster.forecast() is None
    for window in range(30):
        forecaster.observe({0: 100 + 20 * window, 1: 900 - 20 * window})
    assert forecaster.method == "ridge"
    forecast = forecaster.forecast()
    assert forecast[0] == pytest.approx(100 + 20 * 30, rel=0.05)
    assert sum(forecast.values()) == pytest.approx(1000)
    before = dict(forecast)
    forecaster.observe({0: 0, 1: 0})
    assert forecaster.forecast() == before


def test_a_forecast_does_not_lag_behind_a_jump_and_shifts_are_counted():
    forecaster = LoadForecaster()
    for window in range(20):
        forecaster.observe({0: 100 + window % 3, 1: 100})
    seldom = forecaster.shift_share
    forecaster.observe({0: 4000, 1: 100})
    assert forecaster.forecast() == pytest.approx({0: 4000, 1: 100})
    assert forecaster.shift_share > seldom


def test_an_idle_tenant_has_no_work_whatever_experts_it_holds():
    held = ExpertAllocation(0, 1, 0, tuple(range(32)))
    assert TenantLoad(held, 0.0, 0.0).work == (0.0, 0.0)
    assert TenantLoad(held, 8.0).work == (8.0, 8.0)
    assert TenantLoad(held, 0.0, 0.0, forecast_rows=64.0).work == (32.0, 64.0)


def test_a_plan_that_only_this_load_suits_is_predicted_to_cost_more_where_loads_shift():
    costs, profile = synthetic_costs(launch_ms=0.0, slowdown=1.0), profile_of([4000, 10])
    fragile = plan_proportional(profile, Setting(H200, "green_context", 8))
    calm, restless = (replace(profile, shift_share=share) for share in (0.0, 0.2))
    assert predict_ms(fragile, restless, costs) > 1.5 * predict_ms(fragile, calm, costs)


def test_balancing_takes_no_longer_than_any_other_split():
    costs, setting = synthetic_costs(launch_ms=0.0, slowdown=1.0), Setting(H200, "green_context", 8)
    for rows in ([4000, 3000, 2000], [100, 100], [8000, 10, 10, 500]):
        profile = profile_of(rows, required=[8 // len(rows)] * len(rows))
        balanced = predict_ms(plan_balanced(profile, setting, costs), profile, costs)
        for other in (plan_static(profile, setting), plan_proportional(profile, setting)):
            assert balanced <= predict_ms(other, profile, costs) * (1 + 1e-9)
    assert plan_balanced(profile_of([1e6, 1]), setting, costs) is None


def test_one_hiccup_condemns_no_plan():
    costs = synthetic_costs(launch_ms=0.0, slowdown=1.0, floor=0.01, scale=0.5)
    manager = AdvancedGPUSliceManager(8, ADAPTIVE, H200, "green_context", costs=costs)
    for tenant in range(3):
        manager.allocate_slices(tenant)
    for _ in range(10):
        manager.optimize_allocations([3000, 3000, 3000])
        manager.record_time(manager.predict_ms(manager.plan, manager.profile(forecast=False)))
    before = manager.plan
    assert before.sliced
    manager.record_time(1000.0)
    manager.optimize_allocations([3000, 3000, 3000])
    assert manager.plan.sms == before.sms


# Costs


def test_costs_interpolate_and_never_extrapolate():
    costs = synthetic_costs()
    measured = {(point.experts, point.rows, point.sms): point.time_ms for point in costs.points}
    assert costs.time_ms(8, 64, 32) == pytest.approx(measured[8, 64, 32])
    between = costs.time_ms(8, 64, 48)
    assert costs.time_ms(8, 64, 64) < between < costs.time_ms(8, 64, 32)
    assert costs.time_ms(0, 0, 32) == 0
    assert costs.time_ms(0.5, 0.5, 32) == costs.time_ms(1, 1, 32)
    for beyond in ((65, 64, 32), (8, 65537, 32), (8, 64, 7), (8, 64, 133)):
        assert costs.time_ms(*beyond) is None
    assert costs.sliced_ms([(8, 64, 32), (8, 64, 7)]) is None


def test_slices_beside_each_other_cost_the_slowest_slowed_and_launched():
    costs = synthetic_costs(launch_ms=0.5, slowdown=2.0)
    slow, quick = (8, 4096, 16), (8, 64, 64)
    assert costs.sliced_ms([slow, quick, quick]) == pytest.approx(2 * costs.time_ms(*slow) + 2 * 0.5)
    assert costs.sliced_ms([slow, (0, 0, 64)]) == pytest.approx(costs.time_ms(*slow)), "an idle neighbour costs nothing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["machine"].update(device="NVIDIA A100"), "are of NVIDIA A100, this is NVIDIA H200"),
        (lambda v: v.update(schema=2), "schema is 2"),
        (lambda v: v["points"].pop(), "do not fill a grid"),
        (lambda v: v["points"][0].update(time_ms=-1), "not a positive number"),
        (lambda v: v["points"][0].update(sms=0), "do not fill a grid|size below 1"),
        (lambda v: v.update(points=[]), "not a positive number, or none"),
        (lambda v: v.update(mood=1), "damaged"),
        (lambda v: v.pop("slowdown"), "damaged"),
        (lambda v: v.update(points="fast"), "damaged"),
    ],
    ids=str,
)
def test_a_damaged_or_foreign_table_is_refused_by_name(change, said, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path))
    path = cache_path("NVIDIA H200")
    assert cached_costs("NVIDIA H200") is None
    synthetic_costs().save(path)
    assert cached_costs("NVIDIA H200") == synthetic_costs()
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CostTableError, match=said) as refused:
        cached_costs("NVIDIA H200")
    assert str(path) in str(refused.value)
    assert "moe-gpu slices bench" in str(refused.value)
