"""One call's load of every expert, added to the profiler's counters in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_gpu.reference import PADDING_TILES, repeated_by_checkpointing
from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.tuning import next_power_of_2

_SMALLEST = PADDING_TILES[0]
assert tuple(_SMALLEST << power for power in range(len(PADDING_TILES))) == PADDING_TILES


@triton.jit
def _count_load_kernel(
    state_ptr,  # (E + 1 + E + TILES + 1,) int64: counts, peaks, padded rows of each tile, calls
    demand_ptr,  # (E + 1,) int32
    E,
    TILES: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1,): one program owns the whole state of a layer."""
    wait_for_previous(PDL)
    expert = tl.arange(0, BLOCK)
    demand = tl.load(demand_ptr + expert, mask=expert <= E, other=0).to(tl.int64)
    counts = tl.load(state_ptr + expert, mask=expert <= E, other=0)
    tl.store(state_ptr + expert, counts + demand, mask=expert <= E)
    rows = tl.where(expert < E, demand, 0)
    peak_ptr = state_ptr + E + 1
    peak = tl.load(peak_ptr + expert, mask=expert < E, other=0)
    tl.store(peak_ptr + expert, tl.maximum(peak, rows), mask=expert < E)
    padded_ptr = peak_ptr + E
    for power in tl.static_range(TILES):
        tile = SMALLEST << power
        padded = tl.sum((rows + tile - 1) // tile * tile)
        tl.store(padded_ptr + power, tl.load(padded_ptr + power) + padded)
    tl.store(padded_ptr + TILES, tl.load(padded_ptr + TILES) + 1)


def count_load(state_S: torch.Tensor, demand_P: torch.Tensor) -> None:
    """As `reference.count_load_reference`."""
    if repeated_by_checkpointing():  # here, where a compiled graph calls too
        return
    num_experts = demand_P.shape[0] - 1
    launch(
        _count_load_kernel,
        (1,),
        state_S,
        demand_P,
        num_experts,
        TILES=len(PADDING_TILES),
        SMALLEST=_SMALLEST,
        BLOCK=next_power_of_2(num_experts + 1),
        **pdl_options(state_S.device),
    )
