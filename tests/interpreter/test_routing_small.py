"""Edges of the routing kernels and of combine that the general cases do not name."""

from __future__ import annotations

import pytest
import torch

from moe_gpu import reference
from moe_gpu.config import RouterConfig
from moe_gpu.triton_kernels import gather_scatter, placing, routing
from tests.kernel_cases import ROUTERS, check_close, check_routing


def check(logits, top_k, router=ROUTERS["softmax_renormalised"], bias=None, capacity=None):
    """The routing, equal to the reference's."""
    got = reference.Routing(*routing.route_forward(logits, bias, top_k, router, capacity))
    check_routing(got, reference.route_reference(logits, top_k, router, bias, capacity))
    return got


def random_logits(num_tokens, num_experts, dtype=torch.float32, seed=0):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zeros_of_both_signs_tie(dtype):
    logits = torch.zeros(3, 9, dtype=dtype)
    logits[0, ::2] = -0.0
    logits[1, 3:] = -0.0
    assert check(logits, 4).topk_ids_TK.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_experts_are_chosen_last_and_in_order(dtype):
    logits = torch.full((2, 40), -float("inf"), dtype=dtype)
    logits[0, 39] = -3e38
    logits[1, 33] = 3e38
    ids = check(logits, 4, RouterConfig(norm_topk_prob=False)).topk_ids_TK
    assert ids.tolist() == [[39, 0, 1, 2], [33, 0, 1, 2]]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_tokens", [5, 70])
def test_tokens_without_a_choice(num_tokens, router):
    """All tokens invalid, then all but one: their routes fill the tail in order."""
    logits = torch.full((num_tokens, 16), float("nan"))
    assert check(logits, 3, ROUTERS[router]).num_invalid == num_tokens * 3
    logits[num_tokens // 2] = 0.5
    assert check(logits, 3, ROUTERS[router], capacity=1).num_dropped == 0


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_logits_of_any_strides(num_tokens):
    logits = random_logits(40, 4 * num_tokens).T.reshape(2, 2 * num_tokens, 40)[0]
    for view in (logits[::2], logits.T.contiguous().T[::2], logits[:1].expand(5, -1)):
        check(view, 6)
        check(view[:, ::3], 6)


@pytest.mark.parametrize(("num_experts", "n_group"), [(18, 3), (33, 11), (96, 2), (160, 8)])
def test_groups_of_sizes_that_are_no_power_of_two(num_experts, n_group):
    router = RouterConfig("sigmoid", n_group=n_group, topk_group=2)
    check(random_logits(20, num_experts), 4, router, bias=random_logits(1, num_experts, seed=1)[0])


def test_groups_tie():
    router = RouterConfig("sigmoid", n_group=4, topk_group=2)
    assert check(torch.zeros(2, 16), 5, router).topk_ids_TK.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(64, 128, 8), (64, 256, 8), (1, 1024, 4), (63, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_launch_in_steps(num_tokens, num_experts, top_k, dtype):
    assert routing._Blocks.choose(num_tokens, num_experts, top_k, 1).single
    logits = random_logits(num_tokens, num_experts, dtype)
    logits[:, 1] = 9  # every token, so that ranks cross steps
    logits[2::7] = float("nan")
    check(logits, top_k, capacity=num_tokens // 2 + 1)


def test_blocks_of_several_steps():
    """Ranks cross steps and blocks, and the last step, block and token are cut short."""
    blocks = routing._Blocks.choose(4100, 256, 1, 1)
    assert blocks.count > 1
    assert blocks.tokens > blocks.rows
    assert 4100 % blocks.tokens
    logits = random_logits(4100, 256, torch.bfloat16)
    logits[:, 7] = 3
    logits[5::11] = float("nan")
    check(logits, 1, capacity=2000)


def check_sorted(ids, num_experts, capacity=None):
    got = placing.sort_routes(ids, num_experts, capacity)
    for value, truth in zip(got, reference.sort_routes_reference(ids, num_experts, capacity), strict=True):
        assert torch.equal(value, truth)


def test_an_expert_twice_in_a_token():
    ids = torch.tensor([[1, 1, 1], [0, 1, 0], [-1, 1, 7], [1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    for repeats in (1, 90):
        for capacity in (None, 2, 5):
            check_sorted(ids.repeat(repeats, 1), 2, capacity)


@pytest.mark.parametrize("num_experts", [1, 5, 62, 63, 128, 257])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 512])
def test_given_choices_are_sorted(num_tokens, num_experts):
    """The widths around those at which the bins of wild ids need the next power of two."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(-1, num_experts + 1, (num_tokens, 2), generator=generator, dtype=torch.int32)
    for capacity in (None, 40):
        check_sorted(ids, num_experts, capacity)
    check_sorted(torch.full_like(ids, num_experts - 1), num_experts, 1)
    check_sorted(torch.full_like(ids, -1), num_experts)


@pytest.mark.parametrize("num_experts", [5, 63])
@pytest.mark.parametrize("capacity", [None, 40])
def test_blocks_of_given_choices(num_experts, capacity):
    """The last block is cut short."""
    assert placing.RankBlocks.choose(1111, num_experts).count > 1
    ids = torch.randint(-1, num_experts + 1, (1111, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check_sorted(ids, num_experts, capacity)


def test_blocks_of_given_choices_take_several_steps(monkeypatch):
    monkeypatch.setattr(placing, "RANKED_AT_ONCE", 32)
    placing.RankBlocks.choose.cache_clear()
    blocks = placing.RankBlocks.choose(1030, 9)
    assert (blocks.count, blocks.routes, blocks.step) == (17, 64, 32)
    ids = torch.randint(-1, 10, (1030, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check_sorted(ids, 9, 100)
    placing.RankBlocks.choose.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("columns", [7, 264])
def test_combine(columns, top_k, splits, dtype):
    """Dropped routes, odd widths, more rows than one step takes, and partial sums."""
    generator = torch.Generator().manual_seed(columns + top_k)
    ids = torch.randint(-1, 24, (5, top_k), generator=generator, dtype=torch.int32)
    rows = reference.sort_routes_reference(ids, 24, 2)
    weights = torch.rand(5, top_k, generator=generator) + 0.5
    truth_y = torch.randn(splits, 5 * top_k, columns, generator=generator, dtype=torch.float64)
    y = truth_y.to(torch.float32 if splits > 1 else dtype)
    truth_y = y.double()
    y[:, rows[1][-1] :] = float("nan")  # no expert wrote these rows
    truth_y[:, rows[1][-1] :] = 0
    routing_of = reference.Routing(ids, weights, *rows)
    truth = reference.combine_reference(truth_y.sum(0), routing_of)
    same = reference.combine_reference(truth_y.sum(0).to(dtype), routing_of)
    got = gather_scatter.combine_forward(y if splits > 1 else y[0], rows[3], weights, dtype)
    check_close("combine", got, same, truth, dtype)
