"""The layer under graphs, with a capturer that needs no GPU: output, statistics, counts, copies and what it says."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.cuda_graph_manager.capture import Captured
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.profiler import ExpertProfiler
from tests.graph_cases import StandIn, no_gradients, rows  # noqa: F401 fixtures

SIZES = dict(input_dim=12, expert_dim=12, hidden_dim=8, num_experts=5, top_k=2)


@pytest.fixture
def stand_in():
    return StandIn()


def layer_with(stand_in: StandIn, **options: Any) -> tuple[AdvancedMoELayer, AdvancedMoELayer]:
    """A layer under graphs and the same layer without."""
    torch.manual_seed(0)
    manager = CUDAGraphManager(2, (1, 4, 8), capturer=stand_in)
    layer = AdvancedMoELayer(**SIZES, use_cuda_graphs=manager, **options).double().eval()
    plain = AdvancedMoELayer(**SIZES, use_cuda_graphs=False, **{**options, "profiler": None}).double().eval()
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("count", [4, 8, 1, 3, 5, 7])
def test_a_replayed_layer_gives_output_and_statistics_of_its_real_tokens(stand_in, count):
    layer, plain = layer_with(stand_in, shared_hidden_dim=6)
    kept = []
    for _ in range(4):
        x = torch.randn(count, 12, dtype=torch.float64)
        x[0, 3] = float("nan") if count == 7 else 0.0  # a token of the caller's own NaN is counted as invalid
        out, stats = layer(x)
        expected, expected_stats = plain(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        for name in ("topk_ids_TK", "demand_P", "offsets_P", "row_of_route_TK", "row_route_R"):
            assert torch.equal(getattr(stats.routing, name), getattr(expected_stats.routing, name)), name
        torch.testing.assert_close(stats.router_logits_TE, expected_stats.router_logits_TE, equal_nan=True)
        assert int(stats.invalid_routes) == (2 if count == 7 else 0)
        kept.append((stats, expected_stats))
    assert layer.graphs.get_stats()["hits"] == 2
    for stats, expected_stats in kept:
        assert torch.equal(stats.counts_E, expected_stats.counts_E), "later replays leave them alone"


def test_statistics_of_a_replay_are_put_together_when_they_are_looked_at(stand_in):
    layer = AdvancedMoELayer(**SIZES, use_cuda_graphs=CUDAGraphManager(1, (4,), capturer=stand_in)).eval()
    x = rows(3, 12)
    layer(x)
    stats = [layer(x)[1] for _ in range(5)]
    assert all("routing" not in vars(each) for each in stats)
    layer(rows(4, 12))
    expected = layer._compute(x, None)[1]
    assert torch.equal(stats[0].counts_E, expected.counts_E)
    assert set(vars(stats[0])) == {"routing", "router_logits_TE", "backend"}
    changed = replace(stats[1], backend="another")
    assert torch.equal(changed.routing.topk_ids_TK, expected.routing.topk_ids_TK)
    for other in (copy.copy(stats[2]), copy.deepcopy(stats[3]), pickle.loads(pickle.dumps(stats[4]))):
        assert torch.equal(other.router_logits_TE, expected.router_logits_TE)
        assert other.backend == expected.backend
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stats[0].nothing


def test_the_profiler_counts_replays_and_no_padding(stand_in):
    profiler = ExpertProfiler(5, copy_interval_s=0.0)
    profiler.attach("cpu")
    stand_in.untouched = [profiler.state_LS]
    layer, plain = layer_with(stand_in, profiler=profiler)
    expected = torch.zeros(6, dtype=torch.int64)
    for count in (3, 4, 3, 3, 2, 4):
        x = torch.randn(count, 12, dtype=torch.float64)
        layer(x)
        expected += plain(x)[1].routing.demand_P
    assert layer.graphs.get_stats()["hits"] == 4
    assert torch.equal(profiler.state_LS[0, :6], expected)
    assert profiler.snapshot().invalid_routes == 0


def test_the_profilers_copies_go_on_while_graphs_are_replayed(stand_in):
    profiler = ExpertProfiler(5, copy_interval_s=0.0)
    layer, _ = layer_with(stand_in, profiler=profiler)
    stand_in.capture = lambda run, device: Captured(lambda: None, lambda: None, run(), 1)  # as a graph: runs no Python
    for _ in range(3):
        layer(torch.randn(4, 12, dtype=torch.float64))
    before = profiler._last_copy
    layer(torch.randn(4, 12, dtype=torch.float64))
    assert layer.graphs.get_stats()["hits"] == 2
    assert profiler._last_copy > before


def test_a_stack_of_layers_is_one_graph_in_which_its_layers_stand_back(stand_in):
    manager = CUDAGraphManager(2, (4,), capturer=stand_in)
    layer, plain = layer_with(stand_in)
    served = manager.wrap(lambda x: layer(x + layer(x)[0])[0])
    for _ in range(4):
        x = torch.randn(3, 12, dtype=torch.float64)
        torch.testing.assert_close(served(x), plain(x + plain(x)[0])[0])
    assert manager.get_stats()["hits"] == 2
    assert "part of another graph" in layer.graphs.get_stats()["eager_calls"]


def test_a_capacity_is_replayed_only_without_padding(stand_in):
    layer, plain = layer_with(stand_in, capacity_factor=0.5)
    for count in (4, 3):
        for _ in range(3):
            x = torch.randn(count, 12, dtype=torch.float64)
            torch.testing.assert_close(layer(x)[0], plain(x)[0])
    stats = layer.graphs.get_stats()
    assert stats["hits"] == 1
    assert stats["eager_calls"]["capacity_factor=0.5 drops routes by the number of tokens"] == 3


def test_a_budget_another_profiler_and_debug_make_other_graphs_or_none(stand_in):
    layer, _ = layer_with(stand_in)
    x = torch.randn(4, 12, dtype=torch.float64)
    for _ in range(2):
        layer(x)
    layer.profiler = ExpertProfiler(5)
    for _ in range(2):
        layer(x)
    assert layer.graphs.get_stats()["captures"] == 2
    layer.debug = True
    layer(x)
    assert layer.graphs.get_stats()["eager_calls"]["debug=True reads the routing on the host"] == 1


def test_a_copied_or_pickled_layer_has_its_own_manager_without_graphs(stand_in):
    layer, _ = layer_with(stand_in)
    x = torch.randn(4, 12, dtype=torch.float64)
    for _ in range(3):
        layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.graphs.get_stats()["graphs"] == other.graphs.get_stats()["hits"] == 0
        assert other.graphs.buckets == (1, 4, 8)
        other.down_proj.zero_()
        assert not torch.equal(other(x)[0], layer(x)[0])


def test_a_layer_is_not_kept_alive_by_its_manager(stand_in):
    layer, _ = layer_with(stand_in)
    stand_in.capture = lambda run, device: Captured(
        lambda: None, lambda: None, run(), 1
    )  # as a graph: keeps no callable
    for _ in range(3):
        layer(torch.randn(4, 12, dtype=torch.float64))
    manager, gone = layer.graphs, weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()
    assert manager.get_stats()["graphs"] == 1


def test_the_layer_says_what_its_flag_came_to():
    layer = AdvancedMoELayer(**SIZES)
    assert not layer.features["cuda_graphs"].active
    assert layer.features["cuda_graphs"].reason == "CUDA graphs need an NVIDIA GPU, and the layer is on cpu"
    assert AdvancedMoELayer(**SIZES, use_cuda_graphs=False).features["cuda_graphs"].reason == "use_cuda_graphs=False"
    layer.eval()(torch.randn(4, 12))
    stats = layer.get_performance_stats()["cuda_graphs"]
    assert stats["eager_calls"] == {"CUDA graphs need an NVIDIA GPU, and the tensors are on cpu": 1}
