"""The experts of one layer divided among slices: who computes what, when, and what the manager learns from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moe_gpu.config import RouterConfig
from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.expert_slices import _Timing, runs_of
from moe_gpu.slices.plan import SliceError
from moe_gpu.slices.policies import SliceAllocationPolicy
from tests.divided_cases import SCATTERED, manager_of, twins
from tests.test_graphs import StandIn


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def spy(monkeypatch, layer):
    """(first expert, experts, SM budget) of every part that the layer's operations compute."""
    seen = []
    kind = type(layer.ops)
    original = kind.expert_rows

    def expert_rows(self, x_TH, routing, weights, activation, first_bin, num_experts, out_RO=None):
        seen.append((first_bin, weights.up_EGH.shape[0], self.sm_budget))
        return original(self, x_TH, routing, weights, activation, first_bin, num_experts, out_RO)

    monkeypatch.setattr(kind, "expert_rows", expert_rows)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(bias=True, shared_hidden_dim=6),
        dict(activation="gelu", depth=2, bias=True),
        dict(capacity_factor=0.6),
        dict(router=RouterConfig("sigmoid")),
    ],
    ids=["plain", "biases", "depth 2", "capacity", "sigmoid"],
)
@pytest.mark.parametrize("groups", [3, SCATTERED], ids=["equal", "scattered"])
def test_the_output_is_that_of_the_undivided_layer(groups, changes):
    divided, plain = twins(torch.float64, **changes)
    divided.divide_experts(groups if isinstance(groups, int) else manager_of(groups))
    for tokens in (1, 17, 0, 2):
        x = torch.randn(tokens, 12, dtype=torch.float64)
        (got, stats), (expected, wanted) = divided(x), plain(x)
        assert torch.equal(got, expected)
        assert torch.equal(stats.counts_E, wanted.counts_E)
        assert tokens == 0 or got.abs().max() > 1e-3


def test_every_expert_is_computed_once_in_the_slice_of_its_tenant(monkeypatch):
    layer, _ = twins(torch.float32)
    manager = manager_of(SCATTERED)
    manager.optimize_allocations([3.0] + [0.5] * 3 + [3.0] + [0.5] * 2 + [3.0, 0.5])
    first, second = manager.plan.sms
    assert first > second
    layer.divide_experts(manager)
    seen = spy(monkeypatch, layer)
    layer(torch.randn(5, 12))
    assert seen == [(0, 1, first), (4, 1, first), (7, 1, first), (1, 3, second), (5, 2, None), (8, 1, None)]


def test_a_tenant_that_is_evicted_leaves_its_experts_to_the_others(monkeypatch):
    layer, plain = twins(torch.float32)
    manager = manager_of(SCATTERED)
    layer.divide_experts(manager)
    seen = spy(monkeypatch, layer)
    manager.allocate_slices(8, 6, priority=3, experts=(8,))
    x = torch.randn(5, 12)
    assert torch.equal(layer(x)[0], plain(x)[0])
    held = {item.tenant for item in manager.plan.slices}
    assert 8 in held
    assert held != {1, 4, 8}
    assert sorted(expert for first, count, _ in seen for expert in range(first, first + count)) == list(range(9))


def test_calls_that_cannot_be_divided_are_not(monkeypatch):
    layer, plain = twins(torch.float32)
    seen = spy(monkeypatch, layer)
    layer.divide_experts(2)
    x = torch.randn(5, 12, requires_grad=True)
    with torch.enable_grad():
        layer(x)[0].sum().backward()
        plain(x.detach())
    assert x.grad.abs().max() > 0
    assert seen == []
    layer.divided.manager.release_slices(0)
    layer.divided.manager.release_slices(4)
    layer(x)
    assert seen == []
    assert "not sliced: 4 released 4 slices" in layer.features["slices"].reason
    layer.divide_experts(2)
    layer.set_hbm_budget("50%")
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert "hbm_budget" in layer.features["slices"].reason


def test_features_say_what_is_divided_and_that_a_cpu_enforces_nothing():
    layer, _ = twins(torch.float32, allocation_policy=SliceAllocationPolicy.ADAPTIVE, total_slices=4)
    feature = layer.features["slices"]
    assert (feature.asked, feature.active) == (True, False)
    assert "layer.divide_experts(groups) divides the experts among slices by ADAPTIVE" in feature.reason
    layer.divide_experts(4)
    assert layer.divided.manager.policy is SliceAllocationPolicy.ADAPTIVE
    assert layer.divided.manager.total_slices == 4
    feature = layer.features["slices"]
    assert (feature.asked, feature.active) == (True, False)
    assert "9 of 9 experts in 4 slices of 33/33/33/33 SMs by cta, in turn: nothing is enforced on cpu" in feature.reason
    layer.divide_experts(None)
    assert layer.divided is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (1, "groups=1 must be from 2 to 8"),
        (9, "groups=9 must be from 2 to 8: total_slices=8, 9 experts"),
        ({9: (9,)}, "expert 9 holds a slice and the layer has 9 experts"),
    ],
)
def test_wrong_divisions_are_refused_and_change_nothing(groups, message):
    layer, _ = twins(torch.float32)
    layer.divide_experts(3)
    before = layer.divided
    with pytest.raises(SliceError, match=message):
        layer.divide_experts(groups if isinstance(groups, int) else manager_of(groups))
    assert layer.divided is before


def test_a_tenant_with_foreign_experts_is_refused_when_it_comes_later():
    layer, _ = twins(torch.float32)
    manager = manager_of({0: (0, 1)})
    layer.divide_experts(manager)
    manager.release_slices(0)
    manager.allocate_slices(40)
    with pytest.raises(SliceError, match="expert 40 holds a slice and the layer has 9 experts"):
        layer(torch.randn(2, 12))


def test_every_plan_has_a_graph_of_its_own():
    layer, plain = twins(torch.float64, use_cuda_graphs=CUDAGraphManager(2, (4,), capturer=StandIn()))
    manager = manager_of(SCATTERED)
    layer.divide_experts(manager)
    loads = {True: [9.0] * 4 + [1.0] * 5, False: [1.0] * 4 + [9.0] * 5}
    for number, load in enumerate((True, False, True, False)):
        manager.optimize_allocations(loads[load])
        for _ in range(4):
            x = torch.randn(4, 12, dtype=torch.float64)
            torch.testing.assert_close(layer(x)[0], plain(x)[0], rtol=1e-12, atol=1e-12)
        assert layer.graphs.get_stats()["captures"] == min(number + 1, 2)
    assert layer.graphs.get_stats()["hits"] == 2 + 2 + 4 + 4


def test_a_copy_stays_in_the_slices_and_a_pickle_does_not():
    layer, plain = twins(torch.float32)
    layer.divide_experts(3)
    x = torch.randn(5, 12)
    other = copy.deepcopy(layer)
    assert other.divided.manager is layer.divided.manager
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.divided is None
    for each in (other, loaded):
        assert torch.equal(each(x)[0], plain(x)[0])


def test_runs_of_neighbours():
    assert runs_of([]) == []
    assert runs_of((7, 3, 4, 5, 0)) == [(0, 1), (3, 6), (7, 8)]


class Event:
    """Stands in for a CUDA event that passed at a known time, or has not passed."""

    def __init__(self, at_ms: float, passed: bool = True) -> None:
        self.at_ms, self.passed = at_ms, passed

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


def test_what_a_timed_call_took_reaches_the_manager_once_it_has_passed():
    layer, _ = twins(torch.float32, allocation_policy=SliceAllocationPolicy.DYNAMIC)
    layer.divide_experts(2)
    manager, divided = layer.divided.manager, layer.divided
    recorded = []
    manager.record_time = recorded.append
    end = Event(4.0, passed=False)
    spans = {0: (Event(0.1), Event(3.9)), 4: (Event(0.2), Event(1.0)), 7: (Event(0.0), Event(4.0))}
    divided._timing = _Timing(manager.plan.sms, Event(0.0), spans, end)
    divided.report()
    assert recorded == []
    end.passed = True
    divided.report()
    assert recorded == [4.0]
    used = {item["tenant"]: item["utilization"] for item in manager.get_stats()["slices"]}
    assert used == {0: pytest.approx(0.95), 4: pytest.approx(0.2)}
    decision = manager.optimize_allocations([1.0] * 9)
    assert decision.changed, "DYNAMIC moves SMs from the idle tenant to the busy one"
    assert manager.plan.sms[0] > manager.plan.sms[1]
    divided._timing = _Timing((1, 2), Event(0.0), {}, Event(9.0))
    divided.report()
    assert recorded == [4.0], "a time of another plan says nothing of this one"
