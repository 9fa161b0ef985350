"""The gradient of the weights on Hopper, as `grouped_gemm_grad.py` computes it; `hopper_common.py` says how."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_gpu.triton_kernels.hopper_common import (
    RAGGED_END,
    TILE_K,
    TILE_N,
    copy_load,
    group_options,
    halves,
    multiply,
    new_barriers,
    pass_over,
    piece_layout,
    place_of,
    put,
    ragged,
    tma_load,
)
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import HopperConfig


@gluon.jit
def _gather_columns(
    source,  # (rows of the stage, 64) pointers to the first columns, one row a route
    column,
    columns,
    stage,
    left,
    layout: gl.constexpr,
):
    """Copy 64 columns of gathered rows into a stage: zeros past the `left` rows and past the last column."""
    c = column + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    m = gl.arange(0, source.shape[0], layout=gl.SliceLayout(1, layout))
    mask = gl.expand_dims(m < left, 1) & gl.expand_dims(c < columns, 0)
    copy_load(stage, source + gl.expand_dims(c, 0), mask=mask)


@gluon.jit
def _weights_producer(
    d,
    a_desc,
    route_ptr,
    offsets_ptr,
    d_stages,
    a_stages,
    full,
    empty,
    E,
    D,
    A,
    d_stride,
    BLOCK_A: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_D: gl.constexpr,
    TOP_K: gl.constexpr,
    GATHER: gl.constexpr,
):
    """Brings BLOCK_R rows a stage: 128 columns of D, by TMA or gathered by cp.async, and BLOCK_A of A by TMA."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    m = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, layout))
    num_d = gl.cdiv(D, 128)
    num_a = gl.cdiv(A, BLOCK_A)
    per_expert = num_d * num_a
    step = 0
    for tile in range(gl.program_id(0), E * per_expert, gl.num_programs(0)):
        expert = tile // per_expert
        tile_d, tile_a = place_of(tile % per_expert, num_d, num_a, GROUP_D)
        start = gl.load(offsets_ptr + expert)
        end = gl.load(offsets_ptr + expert + 1)
        column = tile_d * 128
        if GATHER:
            route = gl.load(route_ptr + gl.minimum(start + m, end - 1), mask=start + m < end, other=0)
        for row in range(start, end, BLOCK_R):
            stage = step % STAGES
            bar = full.index(stage)
            left = end - row
            if GATHER:
                source = d + gl.expand_dims((route // TOP_K).to(gl.int64) * d_stride, 1)
                route = gl.load(route_ptr + gl.minimum(row + BLOCK_R + m, end - 1))  # one stage ahead
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if GATHER:
                mbarrier.expect(bar, BLOCK_R * BLOCK_A * 2)
            else:
                mbarrier.expect(bar, BLOCK_R * (128 + BLOCK_A) * 2)
                for part in gl.static_range(2):
                    box = d_stages.index(2 * stage + part).reshape([1, 1, BLOCK_R, 64])
                    tma_load(d, [RAGGED_END, end, RAGGED_END - left, column + 64 * part], bar, box)
            box = a_stages.index(stage).reshape([1, 1, BLOCK_R, BLOCK_A])
            tma_load(a_desc, [RAGGED_END, end, RAGGED_END - left, tile_a * BLOCK_A], bar, box)
            if GATHER:
                for part in gl.static_range(2):
                    _gather_columns(source, column + 64 * part, D, d_stages.index(2 * stage + part), left, layout)
                async_copy.mbarrier_arrive(bar, increment_count=False)  # each thread's, once its copies have landed
            step += 1


@gluon.jit
def _put_weights(
    desc, slots, acc, expert, at_d, at_a, D, A, AT: gl.constexpr, TRANSPOSED: gl.constexpr, SLOTS: gl.constexpr
):
    """Store 64 rows of D x columns of A of one expert's gradient, in D x A or, TRANSPOSED, in A x D."""
    WIDTH: gl.constexpr = 64 if TRANSPOSED else slots.shape[2]
    if acc.shape[1] > WIDTH:
        HALF: gl.constexpr = acc.shape[1] // 2
        left, right = halves(acc)
        _put_weights(desc, slots, left, expert, at_d, at_a, D, A, AT, TRANSPOSED, SLOTS)
        _put_weights(desc, slots, right, expert, at_d, at_a + HALF, D, A, AT + HALF // WIDTH, TRANSPOSED, SLOTS)
    else:
        PENDING: gl.constexpr = 0 if AT == 0 else SLOTS - 1
        if TRANSPOSED:
            row = expert * A + at_a
            put(desc, slots, AT % SLOTS, PENDING, acc, row, at_d, gl.minimum(A - at_a, 64), True)
        else:
            put(desc, slots, AT % SLOTS, PENDING, acc, expert * D + at_d, at_a, 64)


@gluon.jit
def _weights_consumer(
    grad_w_desc,
    offsets_ptr,
    d_stages,
    a_stages,
    slots,
    full,
    empty,
    E,
    D,
    A,
    BLOCK_A: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_D: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SLOTS: gl.constexpr,
    PART: gl.constexpr,
):
    """Sums D^T A over an expert's rows for 64 columns of D; an expert without rows gets zeros."""
    num_d = gl.cdiv(D, 128)
    num_a = gl.cdiv(A, BLOCK_A)
    per_expert = num_d * num_a
    step = 0
    for tile in range(gl.program_id(0), E * per_expert, gl.num_programs(0)):
        expert = tile // per_expert
        tile_d, tile_a = place_of(tile % per_expert, num_d, num_a, GROUP_D)
        depth = gl.cdiv(gl.load(offsets_ptr + expert + 1) - gl.load(offsets_ptr + expert), BLOCK_R)
        at_d = tile_d * 128 + 64 * PART
        if at_d < D:
            acc, step = multiply(
                d_stages, a_stages, full, empty, step, depth, PART, BLOCK_A, STAGES, False, False, GATHER
            )
            _put_weights(
                grad_w_desc, slots, acc, expert, tile_d * 128 + 64 * PART, tile_a * BLOCK_A, D, A, 0, TRANSPOSED, SLOTS
            )
        else:
            step = pass_over(full, empty, step, depth, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["E"])
def _grouped_gemm_grad_w_hopper_kernel(
    d,  # (T, D) pointer if GATHER, else a ragged descriptor of (R, D)
    a_desc,  # ragged (R, A)
    route_ptr,  # (R,) int32; unused unless GATHER
    grad_w_desc,  # ragged (E * D, A), or (E * A, D) if TRANSPOSED
    offsets_ptr,
    E,
    D,
    A,
    d_stride,
    TOP_K: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BLOCK_A: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP_D: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """D_e^T A_e for every expert, D and A multiples of 64; one program owns a tile's sum, so no atomics."""
    dtype: gl.constexpr = grad_w_desc.dtype
    WIDTH: gl.constexpr = grad_w_desc.block_shape[3]
    slot_layout: gl.constexpr = piece_layout(WIDTH, dtype)
    d_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_R, 64], dtype)
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_R, BLOCK_A], dtype)
    d_stages = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_R, 64], d_layout)
    a_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_R, BLOCK_A], a_layout)
    slots0 = gl.allocate_shared_memory(dtype, [SLOTS, 64, WIDTH], slot_layout)
    slots1 = gl.allocate_shared_memory(dtype, [SLOTS, 64, WIDTH], slot_layout)
    full = new_barriers(STAGES, 1 + 32 * PRODUCER_WARPS if GATHER else 1)
    empty = new_barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_weights_consumer, (
                grad_w_desc, offsets_ptr, d_stages, a_stages, slots0, full, empty, E, D, A,
                BLOCK_A, BLOCK_R, STAGES, GROUP_D, GATHER, TRANSPOSED, SLOTS, 0,
            )),
            (_weights_consumer, (
                grad_w_desc, offsets_ptr, d_stages, a_stages, slots1, full, empty, E, D, A,
                BLOCK_A, BLOCK_R, STAGES, GROUP_D, GATHER, TRANSPOSED, SLOTS, 1,
            )),
            (_weights_producer, (
                d, a_desc, route_ptr, offsets_ptr, d_stages, a_stages, full, empty, E, D, A, d_stride,
                BLOCK_A, BLOCK_R, STAGES, GROUP_D, TOP_K, GATHER,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def grouped_gemm_grad_w_hopper(
    d: torch.Tensor,
    a: torch.Tensor,
    grad_w_ENK: torch.Tensor,
    offsets_P: torch.Tensor,
    config: HopperConfig,
    programs: int,
    *,
    route_R: torch.Tensor | None = None,
    top_k: int = 1,
    transposed: bool = False,
) -> torch.Tensor:
    """Write `D_e^T A_e`, or its transpose, for every expert into the contiguous `grad_w_ENK` and return it.

    d: (R, D), or (T, D) gathered by `route_R // top_k`; a: (R, A).
    """
    num_experts, columns, depth = grad_w_ENK.shape
    gather = route_R is not None
    # Transposed pieces are tiles of 64 x 64, whatever the table says: its tiles were tuned on gradients as they lie.
    width, slots = (64, min(2, config.width // 64 * config.slots)) if transposed else (config.width, config.slots)
    launch(
        _grouped_gemm_grad_w_hopper_kernel,
        (programs,),
        d if gather else ragged(d, 64, TILE_K),
        ragged(a, TILE_N, TILE_K),
        route_R,
        ragged(grad_w_ENK.view(num_experts * columns, depth), width),
        offsets_P,
        num_experts,
        d.shape[1],
        a.shape[1],
        d.stride(0),
        TOP_K=top_k,
        GATHER=gather,
        TRANSPOSED=transposed,
        BLOCK_A=TILE_N,
        BLOCK_R=TILE_K,
        STAGES=config.stages,
        SLOTS=slots,
        GROUP_D=config.group_m,
        num_warps=4,
        **group_options(gather),
    )
    return grad_w_ENK
