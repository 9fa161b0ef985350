"""The gradient through the activation on Hopper, as `grouped_gemm_grad.py` computes it; `hopper_common.py` says how."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.grouped_gemm import apply_function
from moe_gpu.triton_kernels.grouped_gemm_grad import function_gradient
from moe_gpu.triton_kernels.hopper import rows_producer
from moe_gpu.triton_kernels.hopper_common import (
    LIST_HEAD,
    RAGGED_END,
    TILE_K,
    TILE_N,
    RowTiles,
    accumulator_layout,
    group_options,
    halves,
    matrix,
    multiply,
    new_barriers,
    pass_over,
    piece_layout,
    place_of,
    ragged,
    sigmoid,
    stacked_weights,
    tma_load,
    tma_store,
)
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import HopperConfig, cdiv


@gluon.jit
def _activate_with_gradient(x, FUNCTION: gl.constexpr):
    """The activation of x and its derivative there."""
    if FUNCTION == "silu":
        s = sigmoid(x)
        act = x * s
        return act, s + act * (1 - s)
    else:
        return apply_function(x, FUNCTION), function_gradient(x, FUNCTION)


@gluon.jit
def _fetch_h(h_desc, h2_desc, slots, bar, PAIR: gl.constexpr, row, column, GATED: gl.constexpr):
    """Start loading a 64 x 64 piece of the saved pre-activations (gate and up) into pair PAIR of the slots."""
    if GATED:
        mbarrier.expect(bar.index(PAIR), 2 * 64 * 64 * 2)
        tma_load(h2_desc, [row, column], bar.index(PAIR), slots.index(2 * PAIR + 1))
    else:
        mbarrier.expect(bar.index(PAIR), 64 * 64 * 2)
    tma_load(h_desc, [row, column], bar.index(PAIR), slots.index(2 * PAIR))


@gluon.jit
def _emit_gradient(
    grad_desc,
    grad2_desc,
    act_desc,
    slots,
    bar,
    PAIR: gl.constexpr,
    phase,
    acc,
    scale,
    row,
    column,
    rows,
    FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
):
    """One 64 x 64 piece: dH over the saved H in its slots, the activation beside it; returns <acc, activation>."""
    layout: gl.constexpr = acc.type.layout
    mbarrier.wait(bar.index(PAIR), phase)
    gate = slots.index(2 * PAIR).load(layout).to(gl.float32)
    scale_rows = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, layout)), 1)
    act, slope = _activate_with_gradient(gate, FUNCTION)
    grad = acc * scale_rows
    grad_gate = grad * slope
    if GATED:
        up = slots.index(2 * PAIR + 1).load(layout).to(gl.float32)
        slots.index(2 * PAIR + 1).store((grad * act).to(slots.dtype))
        grad_gate = grad_gate * up
        act = act * up
    slots.index(2 * PAIR).store(grad_gate.to(slots.dtype))
    tma.store_wait(2 if GATED else 1)  # the activation before this one has left its slot
    slots.index(4).store((act * scale_rows).to(slots.dtype))
    fence_async_shared()
    place = [RAGGED_END, row + rows, RAGGED_END - rows, column]
    tma_store(act_desc, place, slots.index(4).reshape([1, 1, 64, 64]))
    tma_store(grad_desc, place, slots.index(2 * PAIR).reshape([1, 1, 64, 64]))
    if GATED:
        tma_store(grad2_desc, place, slots.index(2 * PAIR + 1).reshape([1, 1, 64, 64]))
    return gl.sum(acc * act, 1)


@gluon.jit
def _grad_act_consumer(
    grad_desc,
    grad2_desc,
    act_desc,
    h_desc,
    h2_desc,
    route_ptr,
    route_weight_ptr,
    grad_weight_ptr,
    tiles_ptr,
    a_stages,
    b_stages,
    slots,
    loaded,
    full,
    empty,
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
    B_BY_K: gl.constexpr,
    PART: gl.constexpr,
):
    """Multiplies rows 64 PART and on of each tile; the saved H comes in while it does, two pieces ahead."""
    STORES: gl.constexpr = 3 if GATED else 2
    rows_layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_N))
    num_m = gl.load(tiles_ptr)
    num_n = gl.cdiv(N, BLOCK_N)
    depth = gl.cdiv(K, BLOCK_K)
    step = 0
    done = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = place_of(tile, num_m, num_n, GROUP_M)
        row = gl.load(tiles_ptr + LIST_HEAD + capacity + tile_m) + 64 * PART
        rows = gl.load(tiles_ptr + LIST_HEAD + 2 * capacity + tile_m) - 64 * PART
        if rows > 0:
            column = tile_n * BLOCK_N
            tma.store_wait(0)
            _fetch_h(h_desc, h2_desc, slots, loaded, 0, row, column, GATED)
            _fetch_h(h_desc, h2_desc, slots, loaded, 1, row, column + 64, GATED)
            scale = gl.full([64], 1.0, gl.float32, layout=rows_layout)
            if GATHER:
                m = gl.arange(0, 64, layout=rows_layout)
                route = gl.load(route_ptr + row + m, mask=m < rows, other=0)
                scale = gl.load(route_weight_ptr + route, mask=m < rows, other=0.0)
            acc, step = multiply(
                a_stages, b_stages, full, empty, step, depth, PART, BLOCK_N, STAGES, True, B_BY_K, GATHER
            )
            left, right = halves(acc)
            acc0, acc1 = halves(left)
            acc2, acc3 = halves(right)
            total = _emit_gradient(
                grad_desc, grad2_desc, act_desc, slots, loaded, 0, done & 1, acc0, scale, row, column, rows,
                FUNCTION, GATED,
            )  # fmt: skip
            total += _emit_gradient(
                grad_desc, grad2_desc, act_desc, slots, loaded, 1, done & 1, acc1, scale, row, column + 64, rows,
                FUNCTION, GATED,
            )  # fmt: skip
            tma.store_wait(STORES)
            _fetch_h(h_desc, h2_desc, slots, loaded, 0, row, column + 128, GATED)
            tma.store_wait(0)
            _fetch_h(h_desc, h2_desc, slots, loaded, 1, row, column + 192, GATED)
            total += _emit_gradient(
                grad_desc, grad2_desc, act_desc, slots, loaded, 0, (done & 1) ^ 1, acc2, scale, row, column + 128, rows,
                FUNCTION, GATED,
            )  # fmt: skip
            total += _emit_gradient(
                grad_desc, grad2_desc, act_desc, slots, loaded, 1, (done & 1) ^ 1, acc3, scale, row, column + 192, rows,
                FUNCTION, GATED,
            )  # fmt: skip
            if GATHER:
                m_total = gl.arange(0, 64, layout=total.type.layout)
                place = (row + m_total).to(gl.int64) * num_n + tile_n
                gl.store(grad_weight_ptr + place, total, mask=m_total < rows)
        else:
            step = pass_over(full, empty, step, depth, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["capacity", "num_rows"])
def _grouped_gemm_grad_act_hopper_kernel(
    a,  # (T, K) pointer to the gradient of the layer's output if GATHER, else a descriptor of (R, K)
    route_ptr,  # (R,) int32; unused unless GATHER
    route_weight_ptr,  # (T * TOP_K,) float32; unused unless GATHER
    w_desc,
    h_desc,  # (R, N) saved pre-activations, gate half
    h2_desc,  # (R, N), up half; unused unless GATED
    grad_desc,  # ragged (R, N) gradient of the gate half
    grad2_desc,  # ragged (R, N), of the up half; unused unless GATED
    act_desc,  # ragged (R, N)
    grad_weight_ptr,  # (R, tiles of N) float32; unused unless GATHER
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
    B_BY_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """G = A W^T, then dH from G and the saved H, in one pass, as `_grouped_gemm_grad_act_kernel`."""
    dtype: gl.constexpr = w_desc.dtype
    a_stages = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, BLOCK_K], piece_layout(BLOCK_K, dtype))
    b_shape: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if B_BY_K else [STAGES, BLOCK_K, BLOCK_N]
    b_stages = gl.allocate_shared_memory(dtype, b_shape, w_desc.layout)
    slots0 = gl.allocate_shared_memory(dtype, [5, 64, 64], piece_layout(64, dtype))
    slots1 = gl.allocate_shared_memory(dtype, [5, 64, 64], piece_layout(64, dtype))
    full = new_barriers(STAGES, 1 + 32 * PRODUCER_WARPS if GATHER else 1)
    empty = new_barriers(STAGES, 2)
    loaded0 = new_barriers(2, 1)
    loaded1 = new_barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_grad_act_consumer, (
                grad_desc, grad2_desc, act_desc, h_desc, h2_desc, route_ptr, route_weight_ptr, grad_weight_ptr,
                tiles_ptr, a_stages, b_stages, slots0, loaded0, full, empty, capacity, N, K,
                BLOCK_N, BLOCK_K, STAGES, GROUP_M, GATHER, FUNCTION, GATED, B_BY_K, 0,
            )),
            (_grad_act_consumer, (
                grad_desc, grad2_desc, act_desc, h_desc, h2_desc, route_ptr, route_weight_ptr, grad_weight_ptr,
                tiles_ptr, a_stages, b_stages, slots1, loaded1, full, empty, capacity, N, K,
                BLOCK_N, BLOCK_K, STAGES, GROUP_M, GATHER, FUNCTION, GATED, B_BY_K, 1,
            )),
            (rows_producer, (
                a, route_ptr, w_desc, tiles_ptr, a_stages, b_stages, full, empty, full, full, full,
                capacity, num_rows, N, K, a_stride,
                BLOCK_N, BLOCK_K, STAGES, GROUP_M, TOP_K, GATHER, WIDE, False, B_BY_K, 2, False,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def grouped_gemm_grad_act_hopper(
    grad: torch.Tensor,
    w_ENK: torch.Tensor,
    h: torch.Tensor,
    activation: str,
    row_tiles: RowTiles,
    config: HopperConfig,
    programs: int,
    *,
    route_R: torch.Tensor | None = None,
    route_weight_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `grouped_gemm_grad_act`."""
    _, columns, depth = w_ENK.shape
    num_rows, gather = row_tiles.num_rows, route_R is not None
    kind = ACTIVATIONS[activation]
    grad_h = torch.empty_like(h)
    act = torch.empty(num_rows, columns, dtype=h.dtype, device=h.device)
    partials = None
    if gather:
        partials = torch.empty(num_rows, cdiv(columns, TILE_N), dtype=torch.float32, device=h.device)
    w_desc, by_k = stacked_weights(w_ENK, TILE_N)
    launch(
        _grouped_gemm_grad_act_hopper_kernel,
        (programs,),
        grad if gather else matrix(grad, 64, TILE_K),
        route_R,
        route_weight_TK,
        w_desc,
        matrix(h[:, :columns], 64, 64),
        matrix(h[:, columns:], 64, 64) if kind.gated else None,
        ragged(grad_h[:, :columns]),
        ragged(grad_h[:, columns:]) if kind.gated else None,
        ragged(act),
        partials,
        row_tiles.tiles,
        row_tiles.capacity,
        num_rows,
        columns,
        depth,
        grad.stride(0),
        TOP_K=1 if route_weight_TK is None else route_weight_TK.shape[1],
        GATHER=gather,
        WIDE=grad.shape[0] * grad.stride(0) >= 1 << 31,
        FUNCTION=kind.function,
        GATED=kind.gated,
        B_BY_K=by_k,
        BLOCK_N=TILE_N,
        BLOCK_K=TILE_K,
        STAGES=config.stages,
        GROUP_M=config.group_m,
        num_warps=4,
        **group_options(gather, 232),
    )
    return grad_h, act, partials
