"""Layers under a budget whose weights, dtype or budget change, and that are copied or pickled."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

from moe_gpu.expert_cache import ExpertCache, HbmBudgetError
from tests.cache_cases import (
    no_grad,  # noqa: F401 a fixture
    same_bits,
    spy_on_reads,
    twins,
    use_late_lane,
)

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("budget", [0.4, 1.0])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later_are_used(budget, assign):
    cached, plain = twins(budget)
    spy_on_reads(cached, use_late_lane(cached._hbm.cache))
    x = torch.randn(5, 12)
    same_bits(cached, plain, x)
    other = twins(budget, seed=1)[1]
    before = cached(x)[0]
    cached.load_state_dict(other.state_dict(), assign=assign)
    same_bits(cached, other, x)
    assert not torch.equal(cached(x)[0], before)


def test_weights_written_in_place_are_used():
    cached, plain = twins(0.4)
    x = torch.randn(5, 12)
    same_bits(cached, plain, x)
    for layer in (cached, plain):
        layer.down_proj[2].mul_(3.0)
        layer.gate_up_proj.add_(0.5)
    same_bits(cached, plain, x)


def test_the_layer_can_change_its_dtype():
    cached, plain = twins(0.4)
    x = torch.randn(5, 12)
    same_bits(cached, plain, x)
    size = cached._hbm.expert_bytes
    names = list(cached.state_dict())
    cached.bfloat16(), plain.bfloat16()
    assert cached._hbm.expert_bytes == size // 2
    same_bits(cached, plain, x.bfloat16())
    cached.double(), plain.double()
    same_bits(cached, plain, x.double())
    assert list(cached.state_dict()) == names
    assert cached.router_weight.dtype == cached.gate_up_proj.dtype == torch.float64


def test_a_dtype_too_wide_for_the_budget_changes_nothing():
    cached, plain = twins("100%")
    cached.set_hbm_budget(cached._hbm.expert_bytes)
    x = torch.randn(3, 12)
    with pytest.raises(HbmBudgetError, match="below one expert"):
        cached.double()
    assert cached.gate_up_proj.dtype == cached.router_weight.dtype == torch.float32
    same_bits(cached, plain, x)


def test_a_copied_layer_shares_the_budget_and_a_dropped_one_gives_its_share_back():
    cached, plain = twins(ExpertCache("50%"), num_experts=8)
    cache, x = cached._hbm.cache, torch.randn(4, 12)
    cache.budget = 4 * cached._hbm.expert_bytes
    twin = copy.deepcopy(cached)
    assert cache.stats().slots_by_layer == [2, 2]
    for layer in (cached, twin, cached):
        same_bits(layer, plain, x)
    del twin, layer
    gc.collect()
    assert cache.stats().slots_by_layer == [4]
    same_bits(cached, plain, x)


@pytest.mark.parametrize("budget", [0.4, "100%"])
def test_a_pickled_layer_has_no_budget(budget):
    cached, plain = twins(budget)
    x = torch.randn(6, 12)
    cached(x)
    loaded = pickle.loads(pickle.dumps(cached))
    assert loaded.expert_cache is None
    assert not loaded.features["expert_cache"].active
    loaded.set_hbm_budget(0.6)
    for layer in (loaded, cached):
        same_bits(layer, plain, x)


def test_a_budget_can_be_changed_and_taken_away():
    cached, plain = twins(0.2)
    x = torch.randn(6, 12)
    for budget in (0.6, "100%", None, 0.4):
        cached.set_hbm_budget(budget)
        same_bits(cached, plain, x)
        assert cached.features["expert_cache"].active == (budget is not None)
    assert not any(parameter.requires_grad for parameter in cached.parameters())
