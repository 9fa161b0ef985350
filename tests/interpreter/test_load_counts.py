"""The profiler's kernel counts as the reference does, over several calls, at sizes around powers of two."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_gpu.model import AdvancedMoELayer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.reference import count_load_reference, load_state_size


@pytest.mark.parametrize("num_experts", [1, 3, 8, 15, 16, 127, 128])
def test_counts_are_the_references(num_experts):
    generator = torch.Generator().manual_seed(num_experts)
    profiler = ExpertProfiler(num_experts, num_layers=2, copy_interval_s=1e9)
    expected = torch.zeros(2, load_state_size(num_experts), dtype=torch.int64)
    profiler.attach("cpu")
    assert profiler._by_triton
    for call in range(6):
        demand = torch.randint(0, 300, (num_experts + 1,), generator=generator, dtype=torch.int32)
        demand[call % num_experts] = 0
        profiler.record(demand, call % 2)
        count_load_reference(expected[call % 2], demand)
    assert torch.equal(profiler._state_LS, expected)


def test_counts_go_beyond_32_bits():
    profiler = ExpertProfiler(2, copy_interval_s=1e9)
    demand = torch.tensor([2**31 - 1, 5, 0], dtype=torch.int32)
    for _ in range(3):
        profiler.record(demand)
    profiler.flush()
    assert profiler.counts_LE().tolist() == [[3 * (2**31 - 1), 15]]
    assert profiler.snapshot().peak_rows == 2**31 - 1


@pytest.mark.parametrize(("outside", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_checkpointing_does_not_count_twice_where_it_is_compiled(outside, backend):
    profiler = ExpertProfiler(4)
    profiler.attach("cpu")
    layer = AdvancedMoELayer(8, 8, 16, 4, top_k=2, profiler=profiler)

    inner = layer if outside else torch.compile(layer, backend=backend)

    def run(x):
        return checkpoint(lambda x: inner(x)[0], x, use_reentrant=False)

    run = torch.compile(run, backend=backend) if outside else run
    x = torch.randn(3, 8, requires_grad=True)
    for _ in range(2):
        run(x).square().sum().backward()
    profiler.flush()
    assert int(profiler.counts_LE().sum()) == 2 * 3 * 2
    torch._dynamo.reset()
