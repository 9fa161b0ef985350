"""The problem that all providers get, and the check of their outputs against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_gpu.benchmark.check import CHECKED_TOKENS, Checker, WrongOutputError
from moe_gpu.benchmark.problem import make_problem, sample_choices
from moe_gpu.benchmark.providers import PROVIDERS
from moe_gpu.config import MoEConfig
from moe_gpu.moe_layer import MoELayer
from moe_gpu.reference import topk_reference
from tests.benchmark_cases import CONFIGS, DTYPES, SMALL, provider_gradients, sets, trace_of

# Routing that a problem imposes


@pytest.mark.parametrize("routing", ["uniform", "zipf-1.2", "one-expert", "trace"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_impose_the_sampled_choices(routing, name, dtype):
    config = CONFIGS[name]
    trace = None
    if routing == "trace":
        ids = sample_choices(config, 11, "uniform", torch.Generator().manual_seed(3))
        trace = trace_of(ids.tolist(), config.num_experts)
    problem = make_problem(config, 50, routing, dtype, trace=trace)
    ids_TK, _ = topk_reference(problem.logits().detach(), config.top_k, config.router, problem.selection_bias_E)
    if routing == "one-expert" and config.router.n_group > 1:
        return  # experts 0, 1, 2 may lie in groups that the limit allows or not; the router decides
    assert torch.equal(sets(ids_TK), sets(problem.topk_ids_TK))
    assert problem.router_weight_EH.count_nonzero() > 0


def test_choices_of_a_token_are_distinct_and_follow_their_distribution():
    config = MoEConfig(8, 8, 8, 16, 4)
    counts = {}
    for routing in ("uniform", "zipf-0.5", "zipf-2"):
        ids = sample_choices(config, 4000, routing, torch.Generator().manual_seed(0))
        assert all(len(set(row)) == 4 for row in ids.tolist())
        counts[routing] = torch.bincount(ids.flatten(), minlength=16)
    assert counts["uniform"].min() > 900
    assert counts["uniform"].max() < 1100
    assert counts["uniform"].max() < counts["zipf-0.5"].max() < counts["zipf-2"].max()
    assert counts["zipf-2"].max() <= 4000  # without replacement


def test_zipf_popularity_of_a_single_choice():
    config = MoEConfig(8, 8, 8, 4, 1)
    ids = sample_choices(config, 40000, "zipf-1", torch.Generator().manual_seed(1))
    share = torch.bincount(ids.flatten(), minlength=4).sort(descending=True).values / 40000
    expected = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    assert torch.allclose(share, expected, atol=0.01)


def test_a_trace_is_replayed_and_its_dropped_routes_impose_nothing():
    problem = make_problem(SMALL, 5, "trace", trace=trace_of([[3, 1], [0, -1]], 8))
    assert problem.topk_ids_TK.tolist() == [[3, 1], [0, -1], [3, 1], [0, -1], [3, 1]]
    logits = problem.logits().detach()
    assert ((logits > 3).sum(1) == torch.tensor([2, 1, 2, 1, 2])).all()
    assert problem.rows_E().sum() == 8


def test_a_seed_gives_the_same_problem_and_another_seed_another():
    first, same, other = (make_problem(SMALL, 6, "zipf-1.2", seed=seed) for seed in (1, 1, 2))
    for name, tensor in first.leaves.items():
        assert torch.equal(tensor, same.leaves[name])
        assert not torch.equal(tensor, other.leaves[name])
    assert torch.equal(first.logit_offset_TE, same.logit_offset_TE)


def test_work_and_bytes_of_a_pass():
    problem = make_problem(SMALL, 10, "one-expert")
    parameters, router = 3 * 24 * 32, 8 * 24
    assert problem.flops("forward") == 2 * 20 * parameters + 2 * 10 * router
    assert problem.flops("forward+backward") == problem.flops("forward") + problem.flops("backward")
    assert problem.flops("backward") == 2 * problem.flops("forward")
    assert problem.min_bytes("forward") == 4 * (2 * parameters + router + 10 * 48)  # two experts are hit
    capped = replace(problem, config=SMALL.with_(capacity_factor=1.0))
    assert capped.rows_E().tolist() == [3, 3] + [0] * 6


# The check against float64


@pytest.mark.parametrize("name", [*CONFIGS, "capacity"])
def test_the_truth_is_the_layer_in_float64(name):
    config = SMALL.with_(capacity_factor=0.6) if name == "capacity" else CONFIGS[name]
    problem = make_problem(config, 90, "zipf-1.2", torch.float32)
    checker = Checker(problem, gradients=True)
    assert checker.token_N.numel() == CHECKED_TOKENS
    assert checker.token_N[0] == 0
    assert checker.token_N[-1] == 89
    layer = MoELayer(problem.config).double()
    names = {"router_weight": "router_weight", "gate_up_proj": "up", "down_proj": "down", "mid_proj": "mid"}
    names |= {"gate_up_bias": "up_bias", "mid_bias": "mid_bias", "down_bias": "down_bias"}
    with torch.no_grad():
        for attribute, leaf in names.items():
            if leaf in problem.leaves:
                getattr(layer, attribute).copy_(problem.leaves[leaf])
        if problem.selection_bias_E is not None:
            layer.selection_bias_E.copy_(problem.selection_bias_E)
    x = problem.x_TH.detach().double().requires_grad_()
    product = x @ layer.router_weight.t()
    out = layer(x, problem.logits().detach().double() + product - product.detach())
    out.backward(checker.grad_out().double())
    assert torch.allclose(checker.truth.out_NO, out.detach()[checker.token_N], atol=1e-12)
    expected = {"x": x.grad[checker.token_N], "router_weight": layer.router_weight.grad}
    for attribute, leaf in names.items():
        if leaf in problem.leaves and leaf != "router_weight":
            expected[leaf] = getattr(layer, attribute).grad[checker.expert]
    assert set(expected) == set(checker.truth.gradients)
    for leaf, gradient in expected.items():
        assert torch.allclose(checker.truth.gradients[leaf], gradient, atol=1e-12), leaf


def refused(checker: Checker, out_TO: torch.Tensor) -> bool:
    try:
        checker.check_output(out_TO)
    except WrongOutputError:
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wrong_outputs_are_refused(dtype):
    problem = make_problem(SMALL, 70, "uniform", dtype)
    checker = Checker(problem)
    out = PROVIDERS["torch_loop"].build(problem).run().detach()
    assert checker.check_output(out).sensitive
    nan_at_the_end = out.clone()
    nan_at_the_end[-1, -1] = torch.nan
    wrong = {
        "zeros": torch.zeros_like(out),
        "one unwritten row": torch.cat([out[:-1], torch.zeros_like(out[:1])]),
        "NaN": nan_at_the_end,
        "shifted tokens": out.roll(1, 0),
        "too large by a tenth": out * 1.1,
        "another dtype": out.double(),
        "another shape": out[:-1],
    }
    for name, tensor in wrong.items():
        assert refused(checker, tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_gradients_are_refused(dtype):
    problem = make_problem(SMALL.with_(num_experts=64), 4, "uniform", dtype)
    checker = Checker(problem, gradients=True)
    gradients = provider_gradients(problem, checker, PROVIDERS["torch_loop"].build(problem).run())
    assert all(result.sensitive for result in checker.check_gradients(gradients).values())
    for name, gradient in gradients.items():
        for bad in (torch.zeros_like(gradient), gradient * 1.2, gradient * torch.nan):
            with pytest.raises(WrongOutputError, match=name):
                checker.check_gradients({**gradients, name: bad})
    unwritten = gradients["up"].clone()
    unwritten[checker.idle_expert, 0, 0] = 1
    with pytest.raises(WrongOutputError, match="expert without rows"):
        checker.check_gradients({**gradients, "up": unwritten})


def test_tokens_whose_choice_hangs_on_rounding_are_not_checked():
    problem = make_problem(SMALL, 8, "uniform", torch.bfloat16)
    tied = problem.logit_offset_TE.clone()
    tied[2] = 1.0
    checker = Checker(replace(problem, logit_offset_TE=tied))
    assert 2 not in checker.token_N.tolist()
    assert checker.token_N.numel() == 7
    nothing = torch.nn.Parameter(torch.zeros_like(problem.router_weight_EH))
    with pytest.raises(ValueError, match="clear choice"):
        Checker(replace(problem, logit_offset_TE=torch.ones_like(tied), router_weight_EH=nothing))
