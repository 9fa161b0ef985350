"""Layers under a budget through the real kernels: waves over slots give the bits of all experts at once."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.expert_cache import ExpertCache
from tests.cache_cases import spy_on_reads, twins, use_late_lane


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("slots", "changes"),
    [
        (1, {}),
        (2, dict(bias=True, shared_hidden_dim=8)),
        (3, dict(activation="gelu", depth=2, bias=True)),
        (3, dict(num_experts=7, top_k=3, capacity_factor=0.7)),
        (5, {}),
    ],
    ids=["one slot", "biases", "depth 2", "capacity", "whole"],
)
def test_waves_through_the_kernels(slots, changes, dtype):
    cached, plain = twins("100%", dtype, **changes)
    cache = ExpertCache(slots * cached._hbm.expert_bytes)
    cached.set_hbm_budget(cache)
    spy_on_reads(cached, use_late_lane(cache))
    with torch.no_grad():
        for tokens in (1, 0, 9, 2, 1):
            x = torch.randn(tokens, 12).to(dtype)
            got, stats = cached(x)
            assert stats.backend == "triton"
            assert torch.equal(got, plain(x)[0])
            assert tokens == 0 or got.abs().max() > 0


def test_tiles_are_chosen_as_for_all_experts():
    """40 rows over 64 experts and over 1 take different tiles: bfloat16 sums would differ in the last bits."""
    from moe_gpu.triton_kernels.products import Products

    x, up = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 40], dtype=torch.int32)
    some = Products.of((x,), (up,), offsets, 40, tiled_experts=64).tile("up", up)
    all_experts = Products.of((x,), (up,), torch.zeros(65, dtype=torch.int32), 40).tile("up", up)
    assert some == all_experts
    assert some != Products.of((x,), (up,), offsets, 40).tile("up", up)
