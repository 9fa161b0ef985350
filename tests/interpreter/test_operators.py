"""Routing to the bit, registered operators and tracing on the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests import operator_cases as cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("router", cases.ROUTERS)
@pytest.mark.parametrize("shape", cases.ROUTE_SHAPES)
def test_route(shape, router, biased, dtype):
    cases.check_route(cases.ROUTE_SHAPES[shape], cases.ROUTERS[router], biased, dtype, "cpu")


@pytest.mark.parametrize("num_tokens", [1, 50, 400])
def test_given_ids(num_tokens):
    cases.check_given_ids(num_tokens, 11, 3, "cpu")


def test_row_operators():
    cases.check_public_row_operators("cpu")


def test_opcheck():
    cases.run_opcheck("cpu")


def test_whole_layer_traces_without_a_break():
    cases.check_fullgraph("cpu", torch.float32)
