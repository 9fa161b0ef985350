"""Divided experts through the real kernels: budgets change who computes a tile, and no bit of it."""

from __future__ import annotations

import pytest
import torch

from tests.divided_cases import SCATTERED, manager_of, twins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, dict(bias=True, shared_hidden_dim=8), dict(activation="gelu", depth=2)])
def test_groups_through_the_kernels_give_the_bits_of_the_undivided_layer(changes, dtype):
    layer, plain = twins(dtype, **changes)
    layer.divide_experts(manager_of(SCATTERED))
    with torch.no_grad():
        for tokens in (1, 0, 11):
            x = torch.randn(tokens, 12).to(dtype)
            got, stats = layer(x)
            assert stats.backend == "triton"
            assert torch.equal(got, plain(x)[0])
            assert tokens == 0 or got.abs().max() > 0
