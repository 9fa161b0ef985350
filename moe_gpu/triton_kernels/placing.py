"""From choices to rows sorted by expert, stable in the order of routes: by counts of blocks, without atomics in memory.

Two launches. Rank: a program takes a block of routes and writes each one's rank among the routes of its expert in the
block, and how many each expert has; `routing.py` does that for the choices that it makes itself. Place: a program sums
the counts of the blocks before its own and gives each route its row. Few routes are one block: one launch does both.

Rank sorts keys of (expert, place in the block) in registers. A matrix of routes by experts, as `routing.py` has one
anyway, takes fifteen times as many instructions for 128 experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.tuning import cdiv, next_power_of_2

SINGLE_LAUNCH_ROUTES = 1024
# Programs of a choosing or ranking launch: one an SM of the GPUs that matter, few counts for the placing launch to sum.
MAX_BLOCKS = 128
RANKED_AT_ONCE = PLACED_AT_ONCE = 1024  # routes of a step
MIN_BLOCK = 64  # routes: a warp sorts so many nearly as fast as fewer, and fewer blocks are fewer counts to sum
PDL_MAX_ROUTES = 2048  # beyond, as PDL_MAX_TOKENS of routing.py


@triton.jit
def place_block(
    ids_ptr,
    row_route_ptr,
    row_of_route_ptr,  # ranks in, rows out
    demand_ptr,
    offsets_ptr,
    demand,  # (BLOCK_E,) int32 routes of each expert, over all blocks
    before,  # (BLOCK_E,) int32 routes of each expert in the blocks before this one
    block,
    first,
    end,
    num_routes,
    E,
    capacity,
    CAPPED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROUTES: tl.constexpr,
):
    """Routes [first, end), those of one block: the expert's offset, plus the routes before in it; ROUTES a step."""
    e = tl.arange(0, BLOCK_E)
    valid_routes = tl.sum(demand, 0)
    kept = tl.minimum(demand, capacity) if CAPPED else demand
    used = tl.sum(kept, 0) if CAPPED else valid_routes
    offsets = tl.cumsum(kept, 0) - kept
    if block == 0:
        tl.store(demand_ptr + e, demand, mask=e < E)
        tl.store(demand_ptr + E, num_routes - valid_routes)
        tl.store(offsets_ptr + e, offsets, mask=e < E)
        tl.store(offsets_ptr + E, used)
    if CAPPED:
        overflow = demand - kept
        overflow_first = used + tl.cumsum(overflow, 0) - overflow
    invalid_first = valid_routes + first - tl.sum(before, 0)
    for start in range(first, end, ROUTES):
        i = start + tl.arange(0, ROUTES)
        own = i < end
        ids = tl.load(ids_ptr + i, mask=own, other=-1)
        rank = tl.load(row_of_route_ptr + i, mask=own, other=0)
        valid = (ids >= 0) & (ids < E)
        bins = tl.where(valid, ids, 0)
        if CAPPED:
            rank += tl.where(valid, tl.gather(before, bins, 0), 0)
            fits = valid & (rank < capacity)
            kept_row = tl.gather(offsets, bins, 0) + rank
            dropped_row = tl.gather(overflow_first, bins, 0) + rank - capacity
            row = tl.where(fits, kept_row, tl.where(valid, dropped_row, invalid_first + rank))
        else:
            fits = valid
            row = rank + tl.where(valid, tl.gather(offsets + before, bins, 0), invalid_first)
        tl.store(row_route_ptr + row, i, mask=own)
        tl.store(row_of_route_ptr + i, tl.where(fits, row, -1), mask=own)


@triton.jit(do_not_specialize=["num_routes", "block_routes", "capacity"])
def _rank_kernel(
    ids_ptr,  # (T, K) int32 or int64
    narrow_ptr,  # (T, K) int32: what ids as int32 are, written; None if they are
    counts_ptr,  # (blocks, E) int32; unused if SINGLE
    row_of_route_ptr,  # (T, K) int32: each route's rank among those of its expert in the block; its row if SINGLE
    demand_ptr,  # (P,) int32: written if SINGLE, as the two below
    offsets_ptr,  # (P,) int32
    row_route_ptr,  # (R,) int32
    num_routes,
    E,
    block_routes,
    capacity,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROUTES: tl.constexpr,
    CAPPED: tl.constexpr,
    SINGLE: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program block_routes routes, BLOCK a step; if SINGLE, one program all routes, placing them too.

    Ids out of range go to a bin after the experts', what lies past the end to one after that. WIDE: ids are int64;
    what int32 could not hold becomes -1 or E.
    """
    wait_for_previous(PDL)
    block = tl.program_id(0)
    first = block * block_routes
    end = tl.minimum(first + block_routes, num_routes)
    b = tl.arange(0, BINS)
    i = tl.arange(0, BLOCK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(first, end, BLOCK):
        inside = start + i < end
        ids = tl.load(ids_ptr + start + i, mask=inside, other=0)
        if WIDE:
            ids = tl.where(ids < 0, -1, tl.where(ids < E, ids, E)).to(tl.int32)
            tl.store(narrow_ptr + start + i, ids, mask=inside)
        bins = tl.where(inside, tl.where((ids >= 0) & (ids < E), ids, E), E + 1)
        key = tl.sort(bins * BLOCK + i)
        here = tl.histogram(bins, BINS)
        bins = key // BLOCK
        rank = i + tl.gather(counts - (tl.cumsum(here, 0) - here), bins, 0)
        tl.store(row_of_route_ptr + start + key % BLOCK, rank, mask=bins <= E)
        counts += here
    if SINGLE:
        tl.debug_barrier()  # placing reads what other threads wrote
        demand = tl.gather(counts, tl.arange(0, BLOCK_E), 0)
        demand = tl.where(tl.arange(0, BLOCK_E) < E, demand, 0)
        place_block(
            narrow_ptr if WIDE else ids_ptr,
            row_route_ptr,
            row_of_route_ptr,
            demand_ptr,
            offsets_ptr,
            demand,
            tl.zeros_like(demand),
            block,
            first,
            end,
            num_routes,
            E,
            capacity,
            CAPPED,
            BLOCK_E,
            ROUTES,
        )
    else:
        tl.store(counts_ptr + block.to(tl.int64) * E + b, counts, mask=b < E)


@triton.jit(do_not_specialize=["num_routes", "block_routes", "num_blocks", "capacity"])
def _place_kernel(
    ids_ptr,  # (T, K) int32
    counts_ptr,  # (blocks, E) int32
    row_of_route_ptr,  # (T, K) int32: ranks in, rows out
    demand_ptr,  # (P,) int32
    offsets_ptr,  # (P,) int32
    row_route_ptr,  # (R,) int32
    num_routes,
    E,
    block_routes,
    num_blocks,
    capacity,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROUTES: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program the block_routes routes of one block; program 0 also writes demand and offsets."""
    wait_for_previous(PDL)
    block = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    demand = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        address = counts_ptr + b.to(tl.int64)[:, None] * E + e[None, :]
        counts = tl.load(address, mask=(b < num_blocks)[:, None] & (e < E)[None, :], other=0)
        demand += tl.sum(counts, 0)
        before += tl.sum(tl.where((b < block)[:, None], counts, 0), 0)
    first = block * block_routes
    place_block(
        ids_ptr,
        row_route_ptr,
        row_of_route_ptr,
        demand_ptr,
        offsets_ptr,
        demand,
        before,
        block,
        first,
        tl.minimum(first + block_routes, num_routes),
        num_routes,
        E,
        capacity,
        CAPPED,
        BLOCK_E,
        ROUTES,
    )


class Rows(NamedTuple):
    """Where routes go, as in Routing; not yet written."""

    demand_P: torch.Tensor
    offsets_P: torch.Tensor
    row_route_R: torch.Tensor
    row_of_route_TK: torch.Tensor


def new_rows(ids_TK: torch.Tensor, num_experts: int) -> Rows:
    """Memory for the rows of choices; where there are none, they are placed."""
    demand_P, offsets_P = (
        torch.empty(num_experts + 1, dtype=torch.int32, device=ids_TK.device) for _ in ("demand", "offsets")
    )
    if ids_TK.shape[0] == 0:
        demand_P.zero_()
        offsets_P.zero_()
    row_of_route_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=ids_TK.device)
    return Rows(demand_P, offsets_P, row_of_route_TK.new_empty(ids_TK.numel()), row_of_route_TK)


def place(
    ids_TK: torch.Tensor,
    counts: torch.Tensor,
    rows: Rows,
    block_routes: int,
    limit: int,
    routes: int,
    pdl: dict[str, bool],
) -> None:
    """Ranks in `rows` to rows, by `counts` (blocks, E) of blocks of `block_routes` routes, `routes` of them a step."""
    blocks, num_experts = counts.shape
    num_routes = ids_TK.numel()
    block_e = next_power_of_2(num_experts)
    launch(
        _place_kernel,
        (blocks,),
        ids_TK,
        counts,
        rows.row_of_route_TK,
        rows.demand_P,
        rows.offsets_P,
        rows.row_route_R,
        num_routes,
        num_experts,
        block_routes,
        blocks,
        limit,
        BLOCK_E=block_e,
        BLOCK_B=max(1, min(64, 8192 // block_e)),  # blocks whose counts are loaded at once: 32 numbers a thread
        ROUTES=routes,
        CAPPED=limit < num_routes,
        num_warps=8,
        **pdl,
    )


@dataclass(frozen=True)
class RankBlocks:
    """How so many routes are divided: `count` programs of `routes` routes, `step` of them at once."""

    count: int
    routes: int
    step: int
    bins: int
    block_e: int

    @property
    def num_warps(self) -> int:
        """Two keys a thread."""
        return max(1, min(16, self.step // 64))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def choose(cls, num_routes: int, num_experts: int) -> RankBlocks:
        single = num_routes <= SINGLE_LAUNCH_ROUTES
        routes = num_routes if single else max(MIN_BLOCK, cdiv(num_routes, MAX_BLOCKS))
        step = min(RANKED_AT_ONCE, max(16, next_power_of_2(routes)))
        bins, block_e = next_power_of_2(num_experts + 2), next_power_of_2(num_experts)
        return cls(cdiv(num_routes, routes), routes, step, bins, block_e)


def sort_routes(
    topk_ids_TK: torch.Tensor, num_experts: int, capacity: int | None = None, narrow_TK: torch.Tensor | None = None
) -> Rows:
    """The rows of choices made elsewhere; ids outside [0, E) are dropped.

    ids are int32; or int64, and are written as int32 into `narrow_TK`, those that it cannot hold as -1 or E.
    """
    ids_TK = topk_ids_TK.contiguous()
    rows = new_rows(ids_TK, num_experts)
    num_routes = ids_TK.numel()
    if num_routes == 0:
        return rows
    blocks = RankBlocks.choose(num_routes, num_experts)
    limit = num_routes if capacity is None else min(capacity, num_routes)
    single = blocks.count == 1
    counts = rows.demand_P.new_empty(0 if single else blocks.count, num_experts)
    pdl = pdl_options(ids_TK.device, pays=num_routes <= PDL_MAX_ROUTES)
    launch(
        _rank_kernel,
        (blocks.count,),
        ids_TK,
        narrow_TK,
        counts,
        rows.row_of_route_TK,
        rows.demand_P,
        rows.offsets_P,
        rows.row_route_R,
        num_routes,
        num_experts,
        blocks.routes,
        limit,
        BLOCK=blocks.step,
        BINS=blocks.bins,
        BLOCK_E=blocks.block_e,
        ROUTES=blocks.step,
        CAPPED=limit < num_routes,
        SINGLE=single,
        WIDE=narrow_TK is not None,
        num_warps=blocks.num_warps,
        **pdl,
    )
    if not single:
        place(ids_TK if narrow_TK is None else narrow_TK, counts, rows, blocks.routes, limit, blocks.step, pdl)
    return rows
