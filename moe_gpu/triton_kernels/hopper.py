"""The grouped product for Hopper: what `grouped_gemm.py` computes, warp-specialised; `hopper_common.py` says how.

A tile is 128 rows by 256 columns, 64 rows a consumer; or 192 rows, the last 64 shared by columns, which reads a fifth
less from the L2 for the same work and needs fewer tiles of few rows. Of those last 64, no more than 32 change sides: as
the left side of a product wgmma multiplies 64 whatever there is. Gated weights lie in a stage as boxes of gate
columns, each followed by its up columns, so that a pair meets in one thread.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.hopper_common import (
    GRANULE,
    LIST_HEAD,
    TILE_K,
    TILE_M,
    TILE_N,
    RowTiles,
    activate,
    claim_tile,
    claimed_tile,
    copy_load,
    group_options,
    halves,
    matrix,
    multiply,
    multiply_three,
    new_barriers,
    new_queue,
    pass_over,
    piece_layout,
    place_of,
    put,
    ragged,
    stacked_weights,
    tma_load,
    upper_lower,
)
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import HopperConfig

REST = gl.constexpr(32)  # rows of a third granule up to which they are the right side


@gluon.jit
def _add_bias(x, bias_ptr, column, N, TRANSPOSED: gl.constexpr):
    """x plus biases from `column` on; columns past N are not stored, so what they hold does not matter."""
    AXIS: gl.constexpr = 0 if TRANSPOSED else 1
    n = column + gl.arange(0, x.shape[AXIS], layout=gl.SliceLayout(1 - AXIS, x.type.layout))
    bias = gl.load(bias_ptr + gl.minimum(n, N - 1)).to(gl.float32)
    return x + gl.expand_dims(bias, 1 - AXIS)


@gluon.jit
def _column_halves(x, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        return upper_lower(x)
    else:
        return halves(x)


@gluon.jit
def _emit(
    out_desc,
    h_desc,
    h2_desc,
    bias_ptr,
    slots,
    acc,
    row,
    column,
    rows,
    N,
    AT: gl.constexpr,
    FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SAVE_H: gl.constexpr,
    SLOTS: gl.constexpr,
    TRANSPOSED: gl.constexpr = False,
):
    """Finish 64 rows in pieces as wide as a slot, the tile's piece AT first: bias, H if saved, activation, store.

    TRANSPOSED: the columns of `acc`, fewer, are the rows, as for `put`.
    """
    WIDTH: gl.constexpr = slots.shape[2]
    EACH: gl.constexpr = 2 if GATED else 1
    STORES: gl.constexpr = 1 + EACH * SAVE_H
    COLUMNS: gl.constexpr = acc.shape[0 if TRANSPOSED else 1]
    if COLUMNS > WIDTH * EACH:
        HALF: gl.constexpr = COLUMNS // (2 * EACH)
        left, right = _column_halves(acc, TRANSPOSED)
        _emit(
            out_desc, h_desc, h2_desc, bias_ptr, slots, left, row, column, rows, N,
            AT, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS, TRANSPOSED,
        )  # fmt: skip
        _emit(
            out_desc, h_desc, h2_desc, bias_ptr, slots, right, row, column + HALF, rows, N,
            AT + HALF // WIDTH * STORES, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS, TRANSPOSED,
        )  # fmt: skip
    else:
        # All of the tile before has left its slots; within a tile the oldest piece makes room.
        PENDING: gl.constexpr = 0 if AT == 0 else SLOTS - 1
        up = acc
        if GATED:
            acc, up = _column_halves(acc, TRANSPOSED)
        if HAS_BIAS:
            acc = _add_bias(acc, bias_ptr, column, N, TRANSPOSED)
            if GATED:
                up = _add_bias(up, bias_ptr + N, column, N, TRANSPOSED)
        if SAVE_H:
            put(h_desc, slots, AT % SLOTS, PENDING, acc, row, column, rows, TRANSPOSED)
            if GATED:
                put(h2_desc, slots, (AT + 1) % SLOTS, SLOTS - 1, up, row, column, rows, TRANSPOSED)
        if FUNCTION != "none":
            acc = activate(acc, FUNCTION)
        if GATED:
            acc = acc * up
        LAST: gl.constexpr = (AT + STORES - 1) % SLOTS
        put(out_desc, slots, LAST, SLOTS - 1 if SAVE_H else PENDING, acc, row, column, rows, TRANSPOSED)


@gluon.jit
def rows_producer(
    a,
    route_ptr,
    w_desc,
    tiles_ptr,
    a_stages,
    b_stages,
    full,
    empty,
    queue,
    published,
    taken,
    capacity,
    num_rows,
    N,
    K,
    a_stride,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    TOP_K: gl.constexpr,
    GATHER: gl.constexpr,
    WIDE: gl.constexpr,
    GATED: gl.constexpr,
    B_BY_K: gl.constexpr,
    GRANULES: gl.constexpr,
    CLAIMED: gl.constexpr,
):
    """Brings the stages: rows of A by TMA or gathered by cp.async, B by TMA, gate and up in turns if gated."""
    COLUMNS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    BOX: gl.constexpr = w_desc.block_shape[0] if B_BY_K else w_desc.block_shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BLOCK_K // 8), BLOCK_K // 8], [gl.num_warps(), 1], [1, 0])
    num_m = gl.load(tiles_ptr)
    num_n = gl.cdiv(N, COLUMNS)
    total = num_m * num_n
    step = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < total:
        if CLAIMED:
            following = claim_tile(tiles_ptr, total, queue, published, taken, turn)
        else:
            following = tile + gl.num_programs(0)
        turn += 1
        tile_m, tile_n = place_of(tile, num_m, num_n, GROUP_M)
        expert = gl.load(tiles_ptr + LIST_HEAD + tile_m)
        row = gl.load(tiles_ptr + LIST_HEAD + capacity + tile_m)
        rows = gl.load(tiles_ptr + LIST_HEAD + 2 * capacity + tile_m)
        first = tile_n * COLUMNS
        if B_BY_K:
            w_row = expert * (2 * N if GATED else N)
        else:
            w_row = expert * K
        if GATHER:
            m = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
            k = gl.expand_dims(gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout)), 0)
            source0 = _token_offsets(route_ptr, m, num_rows, a_stride, TOP_K, WIDE) + k
            source1 = _token_offsets(route_ptr, m + 64, num_rows, a_stride, TOP_K, WIDE) + k
            if GRANULES == 3:
                source2 = _token_offsets(route_ptr, m + 128, num_rows, a_stride, TOP_K, WIDE) + k
        for start in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if GATHER:
                mbarrier.expect(bar, BLOCK_N * BLOCK_K * 2)
            else:
                if GRANULES == 3 and rows > 128:
                    mbarrier.expect(bar, (BLOCK_N + 192) * BLOCK_K * 2)
                    tma_load(a, [row + 64, start], bar, a_stages.index(GRANULES * stage + 1))
                    tma_load(a, [row + 128, start], bar, a_stages.index(GRANULES * stage + GRANULES - 1))
                elif rows > 64:
                    mbarrier.expect(bar, (BLOCK_N + 128) * BLOCK_K * 2)
                    tma_load(a, [row + 64, start], bar, a_stages.index(GRANULES * stage + 1))
                else:
                    mbarrier.expect(bar, (BLOCK_N + 64) * BLOCK_K * 2)
                tma_load(a, [row, start], bar, a_stages.index(GRANULES * stage))
            for box in gl.static_range(BLOCK_N // BOX):
                # Gated: a box of gate columns, then the box of up columns that go with them.
                at = first + (box // 2 * BOX + box % 2 * N if GATED else box * BOX)
                if B_BY_K:
                    tma_load(w_desc, [w_row + at, start], bar, b_stages.index(stage).slice(box * BOX, BOX, dim=0))
                else:
                    tma_load(w_desc, [w_row + start, at], bar, b_stages.index(stage).slice(box * BOX, BOX, dim=1))
            if GATHER:
                copy_load(a_stages.index(GRANULES * stage), a + start + source0)
                if rows > 64:
                    copy_load(a_stages.index(GRANULES * stage + 1), a + start + source1)
                if GRANULES == 3:
                    if rows > 128:
                        copy_load(a_stages.index(GRANULES * stage + 2), a + start + source2)
                async_copy.mbarrier_arrive(bar, increment_count=False)  # each thread's, once its copies have landed
            step += 1
        tile = following


@gluon.jit
def _token_offsets(route_ptr, m, num_rows, a_stride, TOP_K: gl.constexpr, WIDE: gl.constexpr):
    """Where the rows of A for routed rows m begin, as a column; int64 only where the matrix is that large."""
    token = gl.load(route_ptr + gl.minimum(m, num_rows - 1)) // TOP_K
    if WIDE:
        token = token.to(gl.int64)
    return gl.expand_dims(token * a_stride, 1)


@gluon.jit
def _rows_consumer(
    out_desc,
    h_desc,
    h2_desc,
    bias_ptr,
    tiles_ptr,
    a_stages,
    b_stages,
    slots,
    full,
    empty,
    queue,
    published,
    taken,
    capacity,
    N,
    K,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    GATHER: gl.constexpr,
    FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SAVE_H: gl.constexpr,
    B_BY_K: gl.constexpr,
    SLOTS: gl.constexpr,
    GRANULES: gl.constexpr,
    CLAIMED: gl.constexpr,
    PART: gl.constexpr,
):
    """Multiplies and finishes granule PART of each tile, and half PART of the columns of the third."""
    COLUMNS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    num_m = gl.load(tiles_ptr)
    num_n = gl.cdiv(N, COLUMNS)
    depth = gl.cdiv(K, BLOCK_K)
    # Stores of half the third granule, which goes first: its sums make room.
    PIECES: gl.constexpr = COLUMNS // 2 // slots.shape[2] * (1 + SAVE_H * (2 if GATED else 1))
    step = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < num_m * num_n:
        tile_m, tile_n = place_of(tile, num_m, num_n, GROUP_M)
        row = gl.load(tiles_ptr + LIST_HEAD + capacity + tile_m)
        rows = gl.load(tiles_ptr + LIST_HEAD + 2 * capacity + tile_m)
        column = tile_n * COLUMNS
        bias = bias_ptr
        if HAS_BIAS:
            bias = bias_ptr + gl.load(tiles_ptr + LIST_HEAD + tile_m) * (2 * N if GATED else N)
        if GRANULES == 3 and rows > 128 + REST:
            acc, third, step = multiply_three(
                a_stages, b_stages, full, empty, step, depth, PART, BLOCK_N, STAGES, B_BY_K, GATHER, 0
            )
            _emit(
                out_desc, h_desc, h2_desc, bias, slots, third, row + 128, column + PART * (COLUMNS // 2), rows - 128,
                N, 0, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS,
            )  # fmt: skip
            _emit(
                out_desc, h_desc, h2_desc, bias, slots, acc, row + 64 * PART, column, 64,
                N, PIECES, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS,
            )  # fmt: skip
        elif GRANULES == 3 and rows > 128:
            acc, rest, step = multiply_three(
                a_stages, b_stages, full, empty, step, depth, PART, BLOCK_N, STAGES, B_BY_K, GATHER, REST
            )
            _emit(
                out_desc, h_desc, h2_desc, bias, slots, rest, row + 128, column + PART * (COLUMNS // 2), rows - 128,
                N, 0, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS, True,
            )  # fmt: skip
            _emit(
                out_desc, h_desc, h2_desc, bias, slots, acc, row + 64 * PART, column, 64,
                N, PIECES, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS,
            )  # fmt: skip
        elif rows > 64 * PART:
            acc, step = multiply(
                a_stages, b_stages, full, empty, step, depth, PART, BLOCK_N, STAGES, True, B_BY_K, GATHER, GRANULES
            )
            _emit(
                out_desc, h_desc, h2_desc, bias, slots, acc, row + 64 * PART, column, gl.minimum(rows - 64 * PART, 64),
                N, 0, FUNCTION, GATED, HAS_BIAS, SAVE_H, SLOTS,
            )  # fmt: skip
        else:
            step = pass_over(full, empty, step, depth, STAGES)
        if CLAIMED:
            tile = claimed_tile(queue, published, taken, turn)
        else:
            tile += gl.num_programs(0)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["capacity", "num_rows"])
def _grouped_gemm_hopper_kernel(
    a,  # (T, K) pointer if GATHER, else a descriptor of (R, K)
    route_ptr,  # (R,) int32; unused unless GATHER
    w_desc,  # (E * rows, columns)
    bias_ptr,  # (E, N or 2N); unused unless HAS_BIAS
    out_desc,  # ragged (R, N)
    h_desc,  # ragged (R, N) pre-activations, gate half; unused unless SAVE_H
    h2_desc,  # ragged (R, N), up half; unused unless SAVE_H and GATED
    tiles_ptr,
    capacity,
    num_rows,
    N,
    K,
    a_stride,
    TOP_K: gl.constexpr,
    GATHER: gl.constexpr,
    WIDE: gl.constexpr,
    FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SAVE_H: gl.constexpr,
    B_BY_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr,
    GRANULES: gl.constexpr,
    CLAIMED: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """out = f(A W^T + bias) per expert, as `_grouped_gemm_fwd_kernel`."""
    dtype: gl.constexpr = w_desc.dtype
    slot_layout: gl.constexpr = piece_layout(out_desc.block_shape[3], dtype)
    a_stages = gl.allocate_shared_memory(dtype, [GRANULES * STAGES, 64, BLOCK_K], piece_layout(BLOCK_K, dtype))
    b_shape: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if B_BY_K else [STAGES, BLOCK_K, BLOCK_N]
    b_stages = gl.allocate_shared_memory(dtype, b_shape, w_desc.layout)
    slots0 = gl.allocate_shared_memory(dtype, [SLOTS, 64, out_desc.block_shape[3]], slot_layout)
    slots1 = gl.allocate_shared_memory(dtype, [SLOTS, 64, out_desc.block_shape[3]], slot_layout)
    full = new_barriers(STAGES, 1 + 32 * PRODUCER_WARPS if GATHER else 1)
    empty = new_barriers(STAGES, 2)
    queue, published, taken = new_queue(CLAIMED, full)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_rows_consumer, (
                out_desc, h_desc, h2_desc, bias_ptr, tiles_ptr, a_stages, b_stages, slots0, full, empty,
                queue, published, taken, capacity, N, K,
                BLOCK_N, BLOCK_K, STAGES, GROUP_M, GATHER, FUNCTION, GATED, HAS_BIAS, SAVE_H, B_BY_K,
                SLOTS, GRANULES, CLAIMED, 0,
            )),
            (_rows_consumer, (
                out_desc, h_desc, h2_desc, bias_ptr, tiles_ptr, a_stages, b_stages, slots1, full, empty,
                queue, published, taken, capacity, N, K,
                BLOCK_N, BLOCK_K, STAGES, GROUP_M, GATHER, FUNCTION, GATED, HAS_BIAS, SAVE_H, B_BY_K,
                SLOTS, GRANULES, CLAIMED, 1,
            )),
            (rows_producer, (
                a, route_ptr, w_desc, tiles_ptr, a_stages, b_stages, full, empty, queue, published, taken,
                capacity, num_rows, N, K, a_stride,
                BLOCK_N, BLOCK_K, STAGES, GROUP_M, TOP_K, GATHER, WIDE, GATED, B_BY_K, GRANULES, CLAIMED,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def grouped_gemm_hopper(
    a: torch.Tensor,
    w_ENK: torch.Tensor,
    row_tiles: RowTiles,
    config: HopperConfig,
    programs: int,
    *,
    route_R: torch.Tensor | None = None,
    top_k: int = 1,
    activation: str | None = None,
    bias_EN: torch.Tensor | None = None,
    save_h: bool = False,
    zero_tail: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `grouped_gemm_forward`: (R, N), half of w's N when gated, and the pre-activations (R, w's N) or None."""
    _, w_rows, depth = w_ENK.shape
    kind = ACTIVATIONS[activation] if activation else None
    gated = kind is not None and kind.gated
    columns = w_rows // 2 if gated else w_rows
    num_rows, gather = row_tiles.num_rows, route_R is not None
    new = torch.zeros if zero_tail else torch.empty
    out = new(num_rows, columns, dtype=a.dtype, device=a.device) if out is None else out
    h = torch.empty(num_rows, w_rows, dtype=a.dtype, device=a.device) if save_h else None
    width = config.store_width(gated)
    w_desc, by_k = stacked_weights(w_ENK, width if gated else TILE_N)
    launch(
        _grouped_gemm_hopper_kernel,
        (programs,),
        a if gather else matrix(a, 64, TILE_K),
        route_R,
        w_desc,
        None if bias_EN is None else bias_EN.contiguous(),
        ragged(out, width),
        None if h is None else ragged(h[:, :columns], width),
        ragged(h[:, columns:], width) if h is not None and gated else None,
        row_tiles.tiles,
        row_tiles.capacity,
        num_rows,
        columns,
        depth,
        a.stride(0),
        TOP_K=top_k,
        GATHER=gather,
        WIDE=a.shape[0] * a.stride(0) >= 1 << 31,
        FUNCTION=kind.function if kind else "none",
        GATED=gated,
        HAS_BIAS=bias_EN is not None,
        SAVE_H=save_h,
        B_BY_K=by_k,
        BLOCK_N=TILE_N,
        BLOCK_K=TILE_K,
        STAGES=config.stages,
        SLOTS=config.slots,
        GROUP_M=config.group_m,
        GRANULES=config.rows // GRANULE,
        CLAIMED=config.claimed,
        num_warps=4,
        **group_options(gather, 216 if config.rows == TILE_M else 224),
    )
    return out, h
