"""CUDAGraphManager with several inputs, and with objects that speak for modules."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.cuda_graph_manager import CUDAGraphManager
from tests.graph_cases import Doubling, StandIn, facts, no_gradients, rows  # noqa: F401 fixtures


@pytest.fixture
def manager():
    return CUDAGraphManager(min_calls=2, buckets=(1, 4, 8), max_graphs=3, capturer=StandIn())


@pytest.fixture
def module():
    return Doubling().eval()


class Sums:
    """A callable of rows, ids and weights, as experts are: ids outside [0, 5) count nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.seen.append((x, ids, weights))
        kept = torch.where((ids >= 0) & (ids < 5), weights, 0)
        return x * kept.sum(1, keepdim=True)


def routed(count: int) -> tuple[torch.Tensor, ...]:
    return rows(count), torch.randint(0, 6, (count, 2)), torch.rand(count, 2)


def test_several_inputs_are_padded_by_nan_and_by_ids_of_no_expert(manager):
    function, owner = Sums(), manager.new_owner()
    for count in (4, 4, 4, 3, 1, 2, 4):
        inputs = routed(count)
        assert torch.equal(manager.call(function, inputs, [], owner), Sums()(*inputs))
        x, ids, weights = function.seen[-1]
        if count < 4 and count > 1:
            assert x.shape[0] == 4
            assert x[count:].isnan().all()
            assert weights[count:].isnan().all()
            assert (ids[count:] == -1).all()
    assert facts(manager, "captures", "hits", "failures") == (1, 4, [])
    assert sum(manager.get_stats()["eager_calls"].values()) == 2  # the first call, and one of another bucket


def test_inputs_are_told_apart_by_every_shape_and_dtype(manager):
    function, owner = Sums(), manager.new_owner()
    x, ids, weights = routed(4)
    for inputs in ((x, ids, weights), (x, ids.int(), weights), (x, ids[:, :1], weights[:, :1])):
        for _ in range(3):
            assert torch.equal(manager.call(function, inputs, [], owner), Sums()(*inputs))
    assert facts(manager, "captures", "hits") == (3, 3)


def test_inputs_of_unlike_rows_are_left_to_the_callable(manager):
    function, owner = Sums(), manager.new_owner()
    x, ids, weights = routed(4)
    for _ in range(3):  # one row of ids would broadcast into the static input and never be noticed again
        manager.call(function, (x, ids[:1], weights), [], owner)
    assert manager.get_stats()["eager_calls"] == {"inputs of unlike rows or devices": 3}


def test_what_speaks_for_modules_need_not_be_one(module, manager):
    class Spokesman:
        budget = None

        def graph_facts(self):
            return (self.budget,)

        def graph_conflict(self):
            return "closed" if self.budget == 0 else None

        def padding_conflict(self):
            return None

    spokesman, owner = Spokesman(), manager.new_owner()
    for spokesman.budget in (None, 7, 0):
        for _ in range(3):
            x = rows(4)
            assert torch.equal(manager.call(module, x, (module, spokesman), owner), 2 * x)
    assert facts(manager, "captures", "hits") == (2, 2)
    assert manager.get_stats()["eager_calls"]["closed"] == 3


def test_an_owner_that_calls_no_more_gives_its_graphs_back(module, manager):
    owners = manager.new_owner(), manager.new_owner()
    for owner in owners:
        for _ in range(3):
            manager.call(module, rows(4), (module,), owner)
    manager.call(module, rows(8), (module,), owners[0])  # a count alone
    manager.forget(owners[0])
    assert (facts(manager, "graphs"), manager._capturer.released) == ((1,), 1)
    assert {key.owner for key in [*manager._graphs, *manager._calls]} == {owners[1]}
    manager.call(module, rows(4), (module,), owners[1])
    assert facts(manager, "hits") == (3,)
