"""What the Gluon kernels for Hopper (compute capability 9.0) share: warp-specialised, persistent, a program per SM.

Three groups of warps share a program: a producer brings tiles into a ring of shared-memory stages (weights and rows in
order by TMA, gathered rows by cp.async), and two consumers of one warpgroup each multiply their share of a tile on
wgmma and run their own epilogues, so that one's epilogue overlaps the other's products. Row tiles never straddle
experts: a list of them is built on the device, in granules of 64 rows. Programs take tiles in turn or, as tiles differ
in cost, claim them from a counter. Descriptors are "ragged" where rows end inside a tile: a leading dimension wraps the
address round 2^64, so that the hardware itself clips loads and stores at the expert's last row.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_gpu.triton_kernels.grouped_gemm import apply_function
from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.tuning import cdiv, next_power_of_2

# Triton 3.8 renamed these copies.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
copy_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

GRANULE, TILE_M, TILE_N, TILE_K = 64, 128, 256, 64
LIST_HEAD = gl.constexpr(2)  # before the list of row tiles: how many there are, and a counter of claims
RAGGED_END = gl.constexpr(1 << 30)  # where a ragged dimension ends


@triton.jit(do_not_specialize=["capacity"])
def _list_tiles_kernel(
    offsets_ptr,  # (P,) int32
    tiles_ptr,  # (2 + 3 * capacity,) int32: how many, claims so far, then expert, first row and rows of each
    E,
    capacity,
    GRANULES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program BLOCK entries of the list of row tiles; program 0 also writes its head.

    Tiles have GRANULES of 64 rows. Where an expert's do not come out even, the last tile has the rest, or, of three
    granules, the first two have two each: a tile of one granule reads as many weights as one of three, and a third
    granule costs less if it has few rows.
    """
    wait_for_previous(PDL)
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    granules = tl.cdiv(end - start, 64)
    tiles = tl.cdiv(granules, GRANULES)
    ends = tl.cumsum(tiles, 0)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((ends[None, :] <= i[:, None]).to(tl.int32), 1)
    before = tl.sum(tl.where(e[None, :] < expert[:, None], tiles[None, :], 0), 1)
    inside = i < tl.max(ends, 0)
    expert = tl.minimum(expert, E - 1)
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    granule = (i - before) * GRANULES
    size = GRANULES
    if GRANULES == 3:
        count = tl.cdiv(last - first, 64)
        short = tl.minimum(3 * tl.cdiv(count, 3) - count, tl.cdiv(count, 3))  # tiles of two, before those of three
        granule -= tl.minimum(i - before, short)
        size = tl.where(i - before < short, 2, 3)
    row = first + granule * 64
    entry = tiles_ptr + 2 + i
    tl.store(entry, expert, mask=inside)
    tl.store(entry + capacity, row, mask=inside)
    tl.store(entry + 2 * capacity, tl.minimum(last - row, size * 64), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, tl.max(ends, 0))
        tl.store(tiles_ptr + 1, 0)


@gluon.jit
def claim_tile(tiles_ptr, total, queue, published, taken, turn):
    """The producer's next tile, from the counter, told to the consumers; the last claim leaves the counter at 0."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    claims = gl.atomic_add(tiles_ptr + 1, 1, sem="relaxed")
    gl.store(tiles_ptr + 1, 0, mask=claims == total - 1)  # every tile makes one claim
    tile = gl.num_programs(0) + claims
    mbarrier.wait(taken.index(turn % 2), ((turn // 2) & 1) ^ 1)
    queue.index(turn % 2).store(gl.full([1], tile, gl.int32, layout=layout))
    mbarrier.arrive(published.index(turn % 2), count=1)
    return tile


@gluon.jit
def claimed_tile(queue, published, taken, turn):
    """The tile that the producer claimed in its turn, for a consumer."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(published.index(turn % 2), (turn // 2) & 1)
    tile = gl.max(queue.index(turn % 2).load(layout), 0)
    mbarrier.arrive(taken.index(turn % 2), count=1)
    return tile


@gluon.jit
def place_of(tile, num_m, num_n, GROUP_M: gl.constexpr):
    """Row tile and column tile: groups of GROUP_M row tiles take all columns, so weights and rows stay in L2."""
    group = tile // (GROUP_M * num_n)
    within = tile % (GROUP_M * num_n)
    size = gl.minimum(num_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@gluon.jit
def halves(x):
    """Left and right half of the columns; with the tensor cores' layout this moves nothing."""
    return gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def upper_lower(x):
    """The first and the last 64 of 128 rows; with the tensor cores' layout this moves nothing either."""
    return gl.split(gl.permute(gl.reshape(x, (2, 64, x.shape[1])), (1, 2, 0)))


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) by the two approximate instructions; a division would cost eight."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def activate(x, FUNCTION: gl.constexpr):
    return x * sigmoid(x) if FUNCTION == "silu" else apply_function(x, FUNCTION)


@gluon.jit
def put(
    desc, slots, SLOT: gl.constexpr, PENDING: gl.constexpr, value, row, column, rows, TRANSPOSED: gl.constexpr = False
):
    """Send a piece of 64 rows, of which `rows` exist, to global memory by TMA from a slot of shared memory.

    TRANSPOSED: the columns of `value`, fewer if no more exist, are the rows.
    """
    slot = slots.index(SLOT)
    tma.store_wait(PENDING)
    if TRANSPOSED:
        slot.slice(0, value.shape[1], dim=0).permute([1, 0]).store(value.to(slot.dtype))
    else:
        slot.store(value.to(slot.dtype))
    fence_async_shared()
    tma_store(desc, [RAGGED_END, row + rows, RAGGED_END - rows, column], slot.reshape([1, 1, 64, slot.shape[1]]))


@gluon.constexpr_function
def accumulator_layout(columns):
    """One warpgroup's 64 x columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def new_accumulator(COLUMNS: gl.constexpr, ROWS: gl.constexpr = 64):
    return warpgroup_mma_init(gl.zeros((ROWS, COLUMNS), gl.float32, layout=accumulator_layout(COLUMNS)))


@gluon.jit
def multiply(
    a_stages,
    b_stages,
    full,
    empty,
    step,
    depth,
    PART: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    A_BY_K: gl.constexpr,
    B_BY_K: gl.constexpr,
    FENCE: gl.constexpr,
    GRANULES: gl.constexpr = 2,
):
    """64 x BLOCK_N of A B over `depth` stages from number `step`: granule PART of A's rows, as it lies or transposed.

    A consumer frees a stage when its products are done; the other's keep the tensor cores busy meanwhile.
    """
    acc = new_accumulator(BLOCK_N)
    for _ in range(0, depth):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if FENCE:  # cp.async writes through the generic proxy, wgmma reads through the asynchronous one
            fence_async_shared()
        a = a_stages.index(GRANULES * stage + PART)
        b = b_stages.index(stage)
        if not A_BY_K:
            a = a.permute([1, 0])
        if B_BY_K:
            b = b.permute([1, 0])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=(acc,)))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,)), step


@gluon.jit
def multiply_three(
    a_stages,
    b_stages,
    full,
    empty,
    step,
    depth,
    PART: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    B_BY_K: gl.constexpr,
    FENCE: gl.constexpr,
    REST: gl.constexpr,
):
    """As `multiply`, of three granules: 64 x BLOCK_N of granule PART, and half PART of the columns of the third.

    REST: of the third its first REST rows, as the right side of the product: the columns of its sums, whose rows are
    half PART of the columns. 0 for all of it, as the left side.
    """
    HALF: gl.constexpr = BLOCK_N // 2
    acc = new_accumulator(BLOCK_N)
    if REST:
        third = new_accumulator(REST, HALF)
    else:
        third = new_accumulator(HALF)
    for _ in range(0, depth):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if FENCE:
            fence_async_shared()
        b = b_stages.index(stage)
        half = b.slice(PART * HALF, HALF, dim=0 if B_BY_K else 1)
        if B_BY_K:
            b = b.permute([1, 0])
        if (REST > 0) != B_BY_K:
            half = half.permute([1, 0])
        acc = warpgroup_mma(a_stages.index(3 * stage + PART), b, acc, is_async=True)
        last = a_stages.index(3 * stage + 2)
        if REST:
            third = warpgroup_mma(half, last.slice(0, REST, dim=0).permute([1, 0]), third, is_async=True)
        else:
            third = warpgroup_mma(last, half, third, is_async=True)
        acc, third = warpgroup_mma_wait(num_outstanding=0, deps=(acc, third))
        acc = warpgroup_mma_init(acc)
        third = warpgroup_mma_init(third)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    acc, third = warpgroup_mma_wait(num_outstanding=0, deps=(acc, third))
    return acc, third, step


@gluon.jit
def pass_over(full, empty, step, depth, STAGES: gl.constexpr):
    """A consumer without rows in this tile: keep the barriers' count."""
    for _ in range(0, depth):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.constexpr_function
def piece_layout(columns, dtype):
    return gl.NVMMASharedLayout.get_default_for([64, columns], dtype)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def new_queue(CLAIMED: gl.constexpr, unused):
    """Two places for claimed tiles, and the barriers of a claim told and taken; nothing if none is claimed."""
    if CLAIMED:
        queue = gl.allocate_shared_memory(gl.int32, [2, 1], mbarrier.MBarrierLayout())
        published = new_barriers(2, 1)
        taken = new_barriers(2, 2)
    else:
        queue = unused
        published = unused
        taken = unused
    return queue, published, taken


@dataclass(frozen=True)
class RowTiles:
    """The row tiles of one routing, listed on the device, shared by every product over its rows."""

    tiles: torch.Tensor  # (2 + 3 * capacity,) int32
    capacity: int
    num_rows: int


def list_row_tiles(offsets_P: torch.Tensor, num_rows: int, tile_rows: int = TILE_M) -> RowTiles:
    """List the row tiles of a routing, of 128 or 192 rows; `num_rows` bounds their number without reading offsets."""
    num_experts = offsets_P.shape[0] - 1
    capacity = cdiv(num_rows, TILE_M) + min(num_experts, num_rows)
    tiles = torch.empty(2 + 3 * capacity, dtype=torch.int32, device=offsets_P.device)
    launch(
        _list_tiles_kernel,
        (cdiv(capacity, 64),),
        offsets_P,
        tiles,
        num_experts,
        capacity,
        GRANULES=tile_rows // GRANULE,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK=64,
        **pdl_options(offsets_P.device),
    )
    return RowTiles(tiles, capacity, num_rows)


_NUMBERS = itertools.count()


@functools.cache
def _box(dtype: torch.dtype, *block: int) -> dict[str, Any]:
    """What all descriptors of one box have in common, from one that has checked itself; `box` numbers it."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.float16 if dtype == torch.float16 else gl.bfloat16)
    rank = len(block)
    sample = TensorDescriptor(torch.empty(8, dtype=dtype), [1] * rank, [8] * (rank - 1) + [1], list(block), layout)
    return {**vars(sample), "box": next(_NUMBERS)}


def _describe(tensor: torch.Tensor, shape: list[int], strides: list[int], *block: int) -> TensorDescriptor:
    """A descriptor without its own checks, which cost as much as a launch: products.py has asked `hopper_unfit`."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {**_box(tensor.dtype, *block), "base": tensor, "shape": shape, "strides": strides}
    return descriptor


def matrix(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of a 2-D tensor in boxes of (rows, columns); outside it loads give zeros."""
    return _describe(tensor, list(tensor.shape), list(tensor.stride()), rows, columns)


def ragged(tensor: torch.Tensor, columns: int = 64, rows: int = 64) -> TensorDescriptor:
    """A descriptor of boxes that end at any row, at coordinates [RAGGED_END, row + left, RAGGED_END - left, column].

    The first dimension's stride times 2^30 is 2^64 elements less 2^30 rows, so the sum is the row's address, and the
    third coordinate passes 2^30, the size of its dimension, where the `left` rows end.
    """
    stride = tensor.stride(0)
    most = 0x7FFF0000
    shape = [most, most, 1 << 30, tensor.shape[1]]
    return _describe(tensor, shape, [(1 << 34) - stride, stride, stride, 1], 1, 1, rows, columns)


def stacked_weights(w_ENK: torch.Tensor, box: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of stacked weights as one matrix, and whether their K is the contiguous axis."""
    by_k = w_ENK.stride(2) == 1
    rows = w_ENK if by_k else w_ENK.transpose(1, 2)
    flat = rows.reshape(-1, rows.shape[2])
    return (matrix(flat, box, TILE_K) if by_k else matrix(flat, TILE_K, box)), by_k


def group_options(gather: bool, consumer_registers: int = 216) -> dict[str, int]:
    """Warps and registers a thread of the groups: a gather needs a warpgroup, TMA alone one warp.

    Three warpgroups of 65536 registers: what the two consumers do not take, less what a launch rounds off.
    """
    if gather:
        producer = 504 - 2 * consumer_registers
        return {"PRODUCER_WARPS": 4, "CONSUMER_REGISTERS": consumer_registers, "PRODUCER_REGISTERS": producer}
    return {"PRODUCER_WARPS": 1, "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}
