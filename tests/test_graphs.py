"""CUDAGraphManager's decisions, with a capturer that needs no GPU; `test_graph_layers.py` has the layer under them."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from moe_gpu.cuda_graph_manager import CaptureError, CUDAGraphManager
from moe_gpu.cuda_graph_manager.capture import first_rows, making_a_graph, map_tensors
from moe_gpu.cuda_graph_manager.manager import FAILED, TOO_FEW
from moe_gpu.cuda_graph_manager.packing import LARGEST_BYTES, pack
from tests.graph_cases import Doubling, StandIn, facts, no_gradients, rows  # noqa: F401 fixtures


@pytest.fixture
def stand_in():
    return StandIn()


@pytest.fixture
def manager(stand_in):
    return CUDAGraphManager(min_calls=2, buckets=(1, 4, 8), max_graphs=3, capturer=stand_in)


@pytest.fixture
def module():
    return Doubling().eval()


def call(served: Callable[[torch.Tensor], Any], count: int, times: int) -> None:
    for _ in range(times):
        x = rows(count)
        assert torch.equal(served(x), x * 2)


def test_a_shape_is_captured_once_min_calls_calls_were_made(module, stand_in):
    manager = CUDAGraphManager(capturer=stand_in)
    served = manager.wrap(module)
    call(served, 4, 9)
    assert facts(manager, "captures", "hits") == (0, 0)
    assert manager.get_stats()["eager_calls"] == {TOO_FEW: 9}
    call(served, 4, 1)
    assert facts(manager, "captures", "hits") == (1, 0)
    call(served, 4, 5)
    assert facts(manager, "captures", "hits", "graphs") == (1, 5, 1)


def test_fewer_rows_share_a_bucket_and_padding_is_nan_again_when_rows_shrink(module, manager):
    served = manager.wrap(module)
    call(served, 4, 2)
    for count in (3, 4, 2, 3, 2, 4):
        call(served, count, 1)
        static_x = module.seen[-1]
        assert static_x.shape == (4, 3)
        assert static_x[count:].isnan().all()
        assert not static_x[:count].isnan().any()
    assert facts(manager, "captures", "hits") == (1, 6)


@pytest.mark.parametrize("count", [2, 3])
def test_the_call_that_captures_is_served_with_padding(module, manager, count):
    call(manager.wrap(module), count, 5)
    assert facts(manager, "captures", "hits") == (1, 3)


def test_results_are_the_callers_to_keep_and_without_clone_they_are_not(module, stand_in):
    for clone in (True, False):
        served = CUDAGraphManager(1, (4,), capturer=stand_in, clone=clone).wrap(module)
        call(served, 4, 1)
        x = rows(4)
        kept = served(x)
        served(rows(4))
        assert torch.equal(kept, 2 * x) == clone


class Kinds(nn.Module):
    """Results of every size, dtype and layout that packing tells apart."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        wide = x.repeat(1, LARGEST_BYTES // 4)
        return {
            "odd": x[:, :1].contiguous(),
            "bytes": (x > 0).contiguous(),
            "half": [x.half(), x.bfloat16()],
            "double": (x.double(), x[:, 0].contiguous()),
            "large": wide,
            "strided": x.t().contiguous().t(),
            "complex": torch.complex(x, -x).conj(),
            "empty": x.new_empty(x.shape[0], 0),
            "count": 3,
        }


def test_results_of_any_kind_are_kept_and_aligned(stand_in):
    served = CUDAGraphManager(1, (5,), capturer=stand_in).wrap(Kinds().eval())
    served(rows(5))
    given = [rows(5) for _ in range(3)]
    kept = [served(x) for x in given]
    for x, results in zip(given, kept, strict=True):
        expected = Kinds()(x)
        assert torch.equal(results["large"], expected["large"])
        tensors: list[torch.Tensor] = []
        map_tensors(results, lambda tensor: tensors.append(tensor) or tensor)  # noqa: B023
        wanted: list[torch.Tensor] = []
        map_tensors(expected, lambda tensor: wanted.append(tensor) or tensor)  # noqa: B023
        for found, want in zip(tensors, wanted, strict=True):
            assert (found.dtype, found.stride()) == (want.dtype, want.stride())
            assert torch.equal(found, want)
            assert found.data_ptr() % 16 == 0
        assert results["count"] == 3


def test_one_tensor_is_not_packed_and_several_small_ones_are():
    x = rows(4)
    alone, several = pack(x), pack((x, [x.half(), x.new_zeros(LARGEST_BYTES)], "a word"))
    assert alone.flat is None
    assert torch.equal(alone.copies(), x)
    assert several.flat.nbytes == 48 + 32
    assert len(several.others) == 1
    first, (second, third), word = several.copies()
    assert torch.equal(first, x)
    assert torch.equal(second, x.half())
    assert not third.any()
    assert word == "a word"


def test_every_kind_of_input_has_a_graph_of_its_own(module, manager, stand_in):
    served = manager.wrap(module)
    for x in (rows(4), rows(4, 5), rows(4).double(), rows(8)):
        for _ in range(3):
            assert torch.equal(served(x), 2 * x)
    assert facts(manager, "captures", "hits", "evictions", "graphs") == (4, 4, 1, 3)


def test_every_stream_and_so_every_slice_has_a_graph_of_its_own(module, manager, stand_in):
    served = manager.wrap(module)
    for stand_in.streams in (0, 7, 0, 7):
        call(served, 4, 3)
    assert facts(manager, "captures", "hits") == (2, 8)


def test_two_callables_share_a_manager_and_no_graph(manager):
    first, second = Doubling().eval(), Doubling().eval()
    second.weight.fill_(3)
    both = manager.wrap(first), manager.wrap(second)
    x = rows(4)
    for _ in range(4):
        assert torch.equal(both[0](x), 2 * x)
        assert torch.equal(both[1](x), 3 * x)
    assert facts(manager, "captures", "hits") == (2, 4)


def test_the_least_recently_used_graph_is_evicted(manager, module, stand_in):
    served = manager.wrap(module)
    for width in (1, 2, 3):
        for _ in range(2):
            served(rows(4, width))
    served(rows(4, 1))  # now 2 is the oldest
    for _ in range(2):
        served(rows(4, 9))
    assert facts(manager, "evictions", "graphs", "hits") == (1, 3, 1)
    assert stand_in.released == 1
    for width in (1, 3, 9):
        served(rows(4, width))
    assert facts(manager, "hits") == (4,)
    served(rows(4, 2))  # begins to count anew: no capture at once
    assert facts(manager, "captures", "hits") == (4, 4)


def test_a_bound_of_bytes_evicts_and_refuses_what_is_larger_alone(module, stand_in, caplog):
    manager = CUDAGraphManager(1, (4, 8), max_bytes=2100, capturer=stand_in)
    served = manager.wrap(module)
    for width in (1, 2, 3):
        served(rows(4, width))
    assert facts(manager, "evictions", "graphs", "captures") == (1, 2, 3)
    assert manager.memory_bytes == 2 * 1000 + (4 * 2 + 4 * 3) * 4
    stand_in.memory_bytes = 3000
    with caplog.at_level(logging.WARNING, logger="moe_gpu"):
        call(served, 8, 3)
    assert facts(manager, "graphs", "captures") == (2, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA graph of 8 rows not captured, calls of this shape stay eager: "
        "needs 3096 bytes and max_bytes is 2100: raise it"
    ]
    assert stand_in.released == 2


@pytest.mark.parametrize("phase", ["fail_rehearsal", "fail_capture"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out"), RuntimeError("called a synchronizing operation")])
def test_what_cannot_be_captured_stays_eager_is_logged_once_and_not_tried_again(
    module, manager, stand_in, caplog, phase, error
):
    served = manager.wrap(module)
    setattr(stand_in, phase, error)
    with caplog.at_level(logging.WARNING, logger="moe_gpu"):
        call(served, 4, 3)
        setattr(stand_in, phase, None)
        call(served, 4, 5)
    assert len(caplog.records) == 1
    assert str(error) in caplog.records[0].getMessage()
    assert stand_in.freed == 1
    stats = manager.get_stats()
    assert (stats["captures"], stats["hits"], stats["eager_calls"][FAILED]) == (0, 0, 6)
    assert type(error).__name__ in stats["failures"][0]
    call(served, 8, 3)  # another shape is not hit by it
    assert facts(manager, "captures", "hits") == (1, 1)
    manager.clear()
    call(served, 4, 3)
    assert facts(manager, "captures", "hits") == (2, 2)


def test_an_exception_of_the_callable_itself_is_the_callers_and_harms_nothing(manager, module):
    broken = [True]

    def function(x: torch.Tensor) -> torch.Tensor:
        if broken[0]:
            raise ValueError("the callable's own")
        return module(x)

    served = manager.wrap(function)
    for _ in range(4):
        with pytest.raises(ValueError, match="the callable's own"):
            served(rows(4))
    assert not making_a_graph()
    broken[0] = False
    call(served, 4, 4)
    assert facts(manager, "captures", "failures") == (1, [])


def test_weights_changed_in_place_are_seen_and_moved_weights_begin_anew(module, manager):
    served = manager.wrap(module)
    call(served, 4, 3)
    module.weight.fill_(5)
    x = rows(4)
    assert torch.equal(served(x), 5 * x)
    assert facts(manager, "hits", "moved_weights") == (2, 0)
    old = module.weight
    module.weight = nn.Parameter(torch.tensor(7.0))
    assert torch.equal(served(x), 7 * x)
    assert facts(manager, "hits", "moved_weights", "graphs") == (2, 1, 0)
    for _ in range(2):
        assert torch.equal(served(x), 7 * x)
    assert facts(manager, "captures", "hits") == (2, 3)
    assert old is not module.weight


def test_a_replaced_submodule_is_noticed(manager):
    stack = nn.Sequential(Doubling(), Doubling()).eval()
    served = manager.wrap(stack)
    x = rows(4)
    for _ in range(3):
        assert torch.equal(served(x), 4 * x)
    stack[1] = nn.Identity().eval()
    assert torch.equal(served(x), 2 * x)
    assert facts(manager, "moved_weights") == (1,)


def test_a_replaced_submodule_without_weights_is_noticed(manager):
    stack = nn.Sequential(Doubling(), nn.ReLU()).eval()
    served = manager.wrap(stack)
    x = rows(4)
    for _ in range(3):
        served(x)
    stack[1] = nn.Tanh().eval()
    assert torch.equal(served(x), (2 * x).tanh())
    assert facts(manager, "hits", "moved_weights") == (1, 1)


@pytest.mark.parametrize("how", ["gradients", "training", "capture", "no rows", "too many", "vector", "autocast"])
def test_calls_that_are_left_alone_say_why(module, manager, stand_in, how):
    served = manager.wrap(module)
    x, reason = rows(4), ""
    if how == "gradients":
        reason = "gradients are enabled"
        torch.set_grad_enabled(True)
    elif how == "training":
        reason = "in training mode"
        module.train()
    elif how == "capture":
        reason = "inside another capture"
        stand_in.capturing = True
    elif how == "no rows":
        x, reason = rows(0), "no rows"
    elif how == "too many":
        x, reason = rows(9), "more rows than the largest bucket"
    elif how == "vector":
        x, reason = torch.randn(3), "no rows"
    else:
        reason = "under autocast"
    with torch.autocast("cpu", enabled=how == "autocast"):
        for _ in range(3):
            assert torch.equal(served(x), 2 * x)
    torch.set_grad_enabled(False)
    stats = manager.get_stats()
    assert (stats["captures"], stats["hits"]) == (0, 0)
    ((found, count),) = stats["eager_calls"].items()
    assert reason in found
    assert count == 3


def test_integers_replay_only_where_they_fill_the_bucket(manager):
    served = manager.wrap(lambda ids: ids * 2, watch=[])
    for count in (4, 3):
        for _ in range(3):
            ids = torch.arange(count * 2).view(count, 2)
            assert torch.equal(served(ids), 2 * ids)
    stats = manager.get_stats()
    assert (stats["captures"], stats["hits"]) == (1, 1)
    assert stats["eager_calls"]["rows of torch.int64 cannot be marked as padding"] == 3


@pytest.mark.parametrize("first", [4, 3])
def test_an_output_without_a_row_for_each_token_replays_only_where_rows_fill_the_bucket(manager, first):
    served = manager.wrap(lambda x: (x * 2, x.sum()), watch=[])
    for count in (first, 7 - first, first, 7 - first):
        for _ in range(3):
            x = rows(count)
            out, total = served(x)
            assert torch.equal(out, 2 * x)
            assert torch.equal(total, x.sum())
    stats = manager.get_stats()
    assert stats["captures"] == 1
    assert stats["hits"] == 4
    assert any("has not a row for each" in reason for reason in stats["eager_calls"])


def test_modules_are_found_in_callables_and_asked_for_where_there_is_none(module, manager, monkeypatch):
    monkeypatch.setitem(globals(), "GLOBAL", module)
    forms = (module, module.forward, lambda x: module(x), functools.partial(module), lambda x: GLOBAL(x))  # noqa: F821
    for function in forms:
        served = manager.wrap(function)
        call(served, 4, 3)
        module.weight.data = torch.tensor(3.0)
        x = rows(4)
        assert torch.equal(served(x), 3 * x)
        module.weight.data = torch.tensor(2.0)
    with pytest.raises(ValueError, match=r"no module found .*: pass watch="):
        manager.wrap(torch.neg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(min_calls=0), "min_calls=0"),
        (dict(max_graphs=0), "max_graphs=0"),
        (dict(max_bytes=0), "max_bytes=0"),
        (dict(buckets=()), r"buckets=\(\)"),
        (dict(buckets=(4, 0)), r"buckets=\(4, 0\)"),
    ],
)
def test_wrong_bounds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CUDAGraphManager(**changes)


def test_close_gives_everything_back_and_the_manager_begins_anew(module, manager, stand_in):
    served = manager.wrap(module)
    call(served, 4, 3)
    call(served, 8, 3)
    manager.close()
    assert stand_in.released == 2
    assert facts(manager, "graphs", "memory_bytes") == (0, 0)
    call(served, 4, 3)
    assert facts(manager, "graphs") == (1,)


def test_threads_share_a_manager(module, manager):
    served = manager.wrap(module)
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for index in range(50):
                x = rows(1 + index % 8)
                if not torch.equal(served(x), 2 * x):
                    wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert facts(manager, "hits")[0] > 100


# Outputs


class Pair(NamedTuple):
    left: torch.Tensor
    right: list[torch.Tensor]


@dataclass(frozen=True)
class Opaque:
    tensor: torch.Tensor


def test_outputs_of_every_shape_are_cut_and_copied():
    x = rows(4)
    value = {"pair": Pair(x, [x, x + 1]), "name": "x", "none": None}
    cut = first_rows(value, 4, 2)
    assert isinstance(cut["pair"], Pair)
    assert torch.equal(cut["pair"].right[1], x[:2] + 1)
    assert cut["name"] == "x"
    copied = map_tensors(Opaque(x), torch.clone)
    assert copied.tensor is not x
    assert torch.equal(copied.tensor, x)
    for wrong in (x.sum(), rows(3), Opaque(x), {"a": [object()]}):
        with pytest.raises(CaptureError):
            first_rows(wrong, 4, 2)
