"""The manager of slices: who is evicted, refused calls that change nothing, and plans in files."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager, GPUSliceOptimizer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.slices.device import DeviceDescription, described_device
from moe_gpu.slices.plan import BackendUnavailableError, PlanError, SliceError, SlicePlan, SliceUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy
from tests.slice_cases import BACKENDS, H200, POLICIES, PROPORTIONAL, STATIC, no_costs_of_the_user, synthetic_costs  # noqa: F401 a fixture


def state(manager):
    return (
        manager.plan,
        manager.allocations,
        manager.reallocations,
        manager.evictions,
        list(manager.log),
        manager.get_stats(),
    )


def test_slices_are_given_back_evicted_by_priority_and_counted():
    manager = AdvancedGPUSliceManager(8, STATIC, H200, "green_context")
    manager.allocate_slices(0, 3, priority=1)
    manager.allocate_slices(1, 3, priority=0)
    manager.allocate_slices(2, 2, priority=0)
    manager.update_slice_utilization(1, 0.9)
    manager.update_slice_utilization(2, 0.2)
    assert manager.free_slices == 0
    assert [item.asked_sms for item in manager.slices] == [48, 48, 32]
    manager.allocate_slices(3, 2, priority=5)
    assert [held.expert_id for held in manager.allocations] == [0, 1, 3], "the least busy of the lowest priority went"
    assert manager.release_slices(0) == 3
    stats = manager.get_stats()
    assert (stats["evictions"], stats["free_slices"], stats["simulated"]) == (1, 3, True)
    assert [item["got_sms"] for item in stats["slices"]] == [None, None]
    assert not any(item["enforced"] for item in stats["slices"])
    assert "evicting 2" in manager.log[-2].reason
    for tenant in (1, 3):
        manager.release_slices(tenant)
    assert not manager.plan.sliced


def test_nobody_is_evicted_in_vain():
    manager = AdvancedGPUSliceManager(4, STATIC, H200)
    for tenant, size in enumerate((1, 1, 2)):
        manager.allocate_slices(tenant, size, priority=tenant)
    manager.allocate_slices(9, 2, priority=9)
    assert [held.expert_id for held in manager.allocations] == [2, 9]
    manager = AdvancedGPUSliceManager(4, STATIC, H200)
    for tenant, size in enumerate((1, 3)):
        manager.allocate_slices(tenant, size, priority=tenant)
    manager.allocate_slices(9, 3, priority=9)
    assert [held.expert_id for held in manager.allocations] == [0, 9], "the first was not needed once the second went"


BAD_CALLS = [
    (lambda m: m.allocate_slices(7, 9), SliceError, "required_slices=9 exceeds total_slices=8"),
    (lambda m: m.allocate_slices(7, 0), SliceError, "required_slices=0"),
    (lambda m: m.allocate_slices(-1), SliceError, "from 0 on"),
    (lambda m: m.allocate_slices(7, experts=[]), SliceError, "must name experts"),
    (lambda m: m.allocate_slices(7, experts=[8, 8]), SliceError, "named twice"),
    (lambda m: m.allocate_slices(7, experts=[7, 1]), SliceError, "already belongs to 1"),
    (lambda m: m.allocate_slices(0), SliceError, "already holds 4"),
    (lambda m: m.allocate_slices(7, 8, priority=3), SliceUnavailableError, "8 of the 8 slices are missing and 4 are"),
    (lambda m: m.allocate_slices(7, 1, priority=0), SliceUnavailableError, "priority below 0"),
    (lambda m: m.release_slices(7), SliceError, "these do: 0, 1"),
    (lambda m: m.update_slice_utilization(7, 0.5), SliceError, "holds no slice"),
    (lambda m: m.update_slice_utilization(0, 1.5), SliceError, "between 0 and 1"),
    (lambda m: m.optimize_allocations([1.0]), SliceError, "expert 1 holds a slice"),
    (lambda m: m.optimize_allocations([1.0, -1.0]), SliceError, "below 0"),
    (lambda m: m.apply_plan(replace(m.plan, device="NVIDIA A100")), PlanError, "the plan is of NVIDIA A100"),
    (lambda m: m.apply_plan(replace(m.plan, backend="cta")), PlanError, "this manager's backend"),
    (lambda m: m.apply_plan(replace(m.plan, slices=m.plan.slices[:1])), PlanError, "allocate them first"),
    (lambda m: m.budget(7), SliceError, "holds no slice"),
]


@pytest.mark.parametrize(("call", "error", "said"), BAD_CALLS, ids=[said for _, _, said in BAD_CALLS])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
def test_a_refused_call_says_why_and_changes_nothing(call, error, said, policy):
    manager = AdvancedGPUSliceManager(8, policy, H200, "green_context", costs=synthetic_costs())
    manager.allocate_slices(0, 4, priority=1)
    manager.allocate_slices(1, 4, priority=3)
    before = state(manager)
    with pytest.raises(error, match=said) as refused:
        call(manager)
    assert "\n" not in str(refused.value)
    assert state(manager) == before


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_calls_keeps_the_promises(data):
    policy = data.draw(st.sampled_from(POLICIES))
    manager = AdvancedGPUSliceManager(8, policy, H200, data.draw(BACKENDS), seed=1)
    for _ in range(data.draw(st.integers(1, 25))):
        before, held = state(manager), {item.expert_id: item for item in manager.allocations}
        call = data.draw(st.sampled_from(["allocate", "release", "busy", "optimise"]))
        tenant, priority = data.draw(st.integers(0, 9)), data.draw(st.integers(-2, 2))
        try:
            if call == "allocate":
                manager.allocate_slices(tenant, data.draw(st.integers(1, 9)), priority)
            elif call == "release":
                manager.release_slices(tenant)
            elif call == "busy":
                manager.update_slice_utilization(tenant, data.draw(st.floats(0, 1)))
            else:
                manager.optimize_allocations(data.draw(st.lists(st.floats(0, 1e4), min_size=10, max_size=10)))
        except SliceError:
            assert state(manager) == before
            continue
        now = {item.expert_id: item for item in manager.allocations}
        assert sum(item.required_slices for item in now.values()) <= 8
        if call == "allocate":
            assert all(held[gone].priority < priority for gone in set(held) - set(now))
        manager.plan.check(H200)
        if manager.plan.sliced:
            assert [item.tenant for item in manager.slices] == list(now)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(total_slices=0), ValueError, "total_slices=0"),
        (dict(total_slices=133), SliceError, "exceeds the 132 SMs"),
        (dict(total_slices=17, backend="green_context"), SliceError, "smallest green_context slice of 8; use at most"),
        (dict(policy="fair"), ValueError, "policy='fair' must be a SliceAllocationPolicy, one of STATIC"),
        (dict(device="NVIDIA Z9"), ValueError, "device='NVIDIA Z9' is not known"),
        (dict(backend="rocket"), BackendUnavailableError, "backend='rocket' is not one of device, cta"),
        (dict(backend="mig"), BackendUnavailableError, "moe-gpu slices mig"),
        (dict(device="A100", costs=synthetic_costs()), SliceError, "costs are of NVIDIA H200"),
    ],
    ids=str,
)  # fmt: skip
def test_a_manager_that_cannot_be_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        AdvancedGPUSliceManager(**{"device": "H200", **arguments})


def test_a_policy_name_that_is_unknown_is_refused():
    assert SliceAllocationPolicy.parse("Proportional") is PROPORTIONAL
    with pytest.raises(ValueError, match="policy='fair' is not one of static, dynamic, proportional, adaptive"):
        SliceAllocationPolicy.parse("fair")


def test_a_plan_changes_only_for_a_gain_and_the_log_says_why():
    manager = AdvancedGPUSliceManager(8, PROPORTIONAL, H200, "green_context")
    for tenant in range(2):
        manager.allocate_slices(tenant, 4)
    assert manager.optimize_allocations([70, 30]).changed
    assert manager.plan.sms == (88, 40)
    small = manager.optimize_allocations([65, 35])
    assert not small.changed
    assert "would even the load by" in small.reason
    assert manager.optimize_allocations([30, 70]).changed
    assert manager.reallocations == 2
    assert [entry.changed for entry in manager.log][-3:] == [True, False, True]


def test_work_inside_no_slice_is_told():
    manager = AdvancedGPUSliceManager(8, PROPORTIONAL, H200)
    manager.allocate_slices(0, experts=(0, 1))
    manager.optimize_allocations([10, 20, 30, 40])
    assert manager.get_stats()["unassigned_load_share"] == pytest.approx(0.7)


def test_on_a_described_device_work_runs_unsliced_with_its_budget():
    manager = AdvancedGPUSliceManager(8, STATIC, H200)
    manager.allocate_slices(5, 2)
    with manager.enter(5) as run:
        assert (run.sm_budget, run.stream) == (32, None)
    manager.join()
    manager.close()


def test_the_optimiser_waits_for_its_interval_and_the_profiler(monkeypatch):
    clock = type("Clock", (), {"now": 10.0})
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    profiler = ExpertProfiler(4, copy_interval_s=0.0)
    manager = AdvancedGPUSliceManager(4, PROPORTIONAL, H200, "green_context")
    for tenant in range(4):
        manager.allocate_slices(tenant)
    optimizer = GPUSliceOptimizer(manager, profiler, update_interval_s=2.0)
    assert optimizer.step() is None
    for _ in range(4):
        clock.now += 0.5
        profiler.record(torch.tensor([64, 16, 10, 10, 0], dtype=torch.int32))
    decision = optimizer.step()
    assert decision.changed
    assert manager.plan.sms == (80, 16, 16, 16)
    assert optimizer.step() is None
    clock.now += 2.0
    assert not optimizer.step().changed
    for wrong in (dict(update_interval_s=-1), dict(layer=1)):
        with pytest.raises(ValueError, match=r"must not be negative|outside the profiler"):
            GPUSliceOptimizer(manager, profiler, **wrong)


# Plans in files


def test_a_plan_survives_its_file_without_what_the_device_gave(tmp_path):
    manager = AdvancedGPUSliceManager(8, STATIC, H200, "green_context")
    manager.allocate_slices(0, 3)
    manager.plan = replace(manager.plan, slices=(replace(manager.plan.slices[0], got_sms=48, enforced=True),))
    manager.plan.save(tmp_path / "plan.json")
    loaded = SlicePlan.load(tmp_path / "plan.json")
    assert loaded.sms == (48,)
    assert loaded.slices[0].got_sms is None
    assert not loaded.slices[0].enforced
    loaded.check(H200)
    manager.apply_plan(loaded)
    for device, said in [
        (described_device("A100"), "is of NVIDIA H200, this is NVIDIA A100"),
        (replace(H200, num_sms=114), "is for 132 SMs, NVIDIA H200 has 114"),
    ]:
        with pytest.raises(PlanError, match=said):
            loaded.check(device)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan["slices"][0].update(asked_sms=140), "140 SMs, NVIDIA H200 has 132"),
        (lambda plan: plan["slices"][0].update(asked_sms=4), "below the smallest green_context slice"),
        (lambda plan: plan["slices"][0].update(asked_sms=20), "no multiple of 8"),
        (lambda plan: plan.update(backend="rocket"), "backend='rocket'"),
        (lambda plan: plan.update(slices=[]), "no slice"),
        (lambda plan: plan["slices"][0].update(asked_sms="many"), "damaged"),
        (lambda plan: plan["slices"][0].pop("tenant"), "damaged"),
        (lambda plan: plan.update(mood=1), "damaged"),
        (lambda plan: plan.update(schema=7), "schema 7"),
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(change, said, tmp_path):
    manager = AdvancedGPUSliceManager(8, STATIC, H200, "green_context")
    manager.allocate_slices(0, 3)
    path = tmp_path / "plan.json"
    manager.plan.save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(SliceError, match=said) as refused:
        SlicePlan.load(path).check(H200)
    assert "\n" not in str(refused.value)


def test_random_bytes_are_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="No such file"):
        SlicePlan.load(path)
    path.write_bytes(random.Random(0).randbytes(100))
    with pytest.raises(PlanError, match="not JSON"):
        SlicePlan.load(path)


def test_a_part_of_a_name_is_enough_if_only_one_device_has_it():
    assert described_device("h100").num_sms == 132
    for name in ("NVIDIA", "", "T4"):
        with pytest.raises(ValueError, match="is not known"):
            described_device(name)
    with pytest.raises(ValueError, match="num_sms=0"):
        DeviceDescription("x", 0, (9, 0), 1)
