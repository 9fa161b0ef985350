"""Routing to the bit, registered operators and tracing on the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_gpu.triton_kernels.dispatch import is_heard
from moe_gpu.triton_kernels.ops import TritonExpertOps
from tests import operator_cases as cases


def route_cases():
    """Every router at every shape, and at one of them with and without bias in either type."""
    for shape in cases.ROUTE_SHAPES:
        pairs = [(False, torch.float32), (True, torch.bfloat16)]
        if shape == "several blocks":
            pairs += [(True, torch.float32), (False, torch.bfloat16)]
        for router in cases.ROUTERS:
            for biased, dtype in pairs:
                name = f"{shape}-{router}-{'biased' if biased else 'unbiased'}-{dtype}"
                yield pytest.param(shape, router, biased, dtype, id=name)


@pytest.mark.parametrize(("shape", "router", "biased", "dtype"), list(route_cases()))
def test_route(shape, router, biased, dtype):
    cases.check_route(cases.ROUTE_SHAPES[shape], cases.ROUTERS[router], biased, dtype, "cpu")


@pytest.mark.parametrize("num_tokens", [1, 50, 400])
def test_given_ids(num_tokens):
    cases.check_given_ids(num_tokens, 11, 3, "cpu")


def test_row_operators():
    cases.check_public_row_operators("cpu")


def test_kept_rows_go_with_their_graph():
    cases.check_kept_rows_go_with_their_graph("cpu")


def test_opcheck():
    cases.run_opcheck("cpu")


def test_whole_layer_traces_without_a_break():
    cases.check_fullgraph("cpu", torch.float32)


class _Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(func.name())
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


@torch.no_grad()
def test_an_operator_passes_the_dispatcher_by_only_where_nothing_listens():
    ops, ids, scores = TritonExpertOps("cpu"), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    sort = functools.partial(ops.sort_routes, ids, scores, 4)
    silent = sort()
    assert not is_heard((ids, 4, None))
    with _Listener() as mode:
        listened = sort()
    assert "moe_gpu::sort_routes" in mode.heard
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sort()
    assert "moe_gpu::sort_routes" in {event.key for event in profile.key_averages()}
    assert all(torch.equal(a, b) for a, b in zip(vars(silent).values(), vars(listened).values(), strict=True))
    for heard in (ids.as_subclass(_Subclass), FakeTensorMode().from_tensor(ids), ids.to("meta")):
        assert is_heard((heard, 4, None))
    with torch.autograd.forward_ad.dual_level():
        assert is_heard((ids,))
    with torch.enable_grad():
        assert is_heard((ids,))
    inside = []
    torch.func.vmap(lambda x: inside.append(is_heard((ids,))) or x)(scores)
    torch.jit.trace(lambda x: inside.append(is_heard((ids,))) or x, scores, check_trace=False)
    assert inside == [True, True]
