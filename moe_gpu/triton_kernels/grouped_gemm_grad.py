"""Gradients of the grouped products: through an activation, and of the weights.

The gradient of the rows is the forward product with the weights' axes exchanged (`grouped_gemm_forward`). Sums run in a
fixed order in one program, so no atomics and the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.accumulate import accumulate
from moe_gpu.triton_kernels.grouped_gemm import (
    INV_SQRT_2PI,
    SQRT_2_OVER_PI,
    SQRT_HALF,
    _source_rows,
    _swizzle,
    _tile_ends,
    _tile_rows,
    _weight_columns,
    apply_function,
    dot_precision,
    num_programs,
    row_contiguous,
    tile_bound,
)
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import GemmConfig, cdiv, next_power_of_2


@triton.jit
def function_gradient(x, FUNCTION: tl.constexpr):
    """Derivative of `apply_function` at float32 x."""
    if FUNCTION == "silu":
        s = 1 / (1 + tl.exp(-x))
        return s * (1 + x * (1 - s))
    elif FUNCTION == "gelu":
        return 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif FUNCTION == "gelu_tanh":
        inner = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        s = 1 / (1 + tl.exp(-2 * inner))
        return s + x * 2 * s * (1 - s) * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    else:
        tl.static_assert(FUNCTION == "relu")
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _grad_act_columns(
    acc,
    scale,
    h_row,
    grad_h_row,
    act_row,
    m,
    first_n,
    m_inside,
    N,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns from `first_n` of a tile: writes dH and the activation, returns <acc, activation> per row."""
    if COLUMNS > 32:
        # A whole tile's gate, up, gradient and activation do not fit in registers: take half the columns at a time.
        # With the tensor cores' layout this split moves nothing.
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        return _grad_act_columns(
            left, scale, h_row, grad_h_row, act_row, m, first_n, m_inside, N, FUNCTION, GATED, BLOCK_M, HALF
        ) + _grad_act_columns(
            right, scale, h_row, grad_h_row, act_row, m, first_n + HALF, m_inside, N, FUNCTION, GATED, BLOCK_M, HALF
        )
    else:
        n = first_n + tl.arange(0, COLUMNS)
        halves: tl.constexpr = 2 if GATED else 1
        inside = m_inside[:, None] & (n < N)[None, :]
        wide = m[:, None] * (N * halves) + n[None, :]
        gate = tl.load(h_row + wide, mask=inside, other=0.0).to(tl.float32)
        act = apply_function(gate, FUNCTION)
        grad_gate = acc * scale[:, None] * function_gradient(gate, FUNCTION)
        if GATED:
            up = tl.load(h_row + wide + N, mask=inside, other=0.0).to(tl.float32)
            grad_up = acc * scale[:, None] * act
            tl.store(grad_h_row + wide + N, grad_up.to(grad_h_row.dtype.element_ty), mask=inside)
            grad_gate = grad_gate * up
            act = act * up
        tl.store(grad_h_row + wide, grad_gate.to(grad_h_row.dtype.element_ty), mask=inside)
        out = act * scale[:, None]
        tl.store(act_row + (m[:, None] * N + n[None, :]), out.to(act_row.dtype.element_ty), mask=inside)
        return tl.sum(tl.where(inside, acc * act, 0.0), 1)


@triton.jit
def _grouped_gemm_grad_act_kernel(
    a_ptr,  # (T, K) gradient of the layer's output gathered by route, or (R, K)
    route_ptr,  # (R,) int32; unused unless GATHER
    route_weight_ptr,  # (T * TOP_K,) float32; unused unless GATHER
    w_ptr,  # (E, N, K) by strides
    h_ptr,  # (R, N or 2N) saved pre-activations
    grad_h_ptr,  # (R, N or 2N)
    act_ptr,  # (R, N) activations, times the route's weight if GATHER
    grad_weight_ptr,  # (R, tiles of N) float32 partial <gradient, activation>; unused unless GATHER
    offsets_ptr,
    E,
    N,
    K,
    a_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Gradient through a product and the activation before it: G = A W^T, then dH from G and H, in one pass.

    The activation is computed again from H instead of being kept; SonicMoE (arXiv 2512.14080) arranges the backward so.
    """
    tile_ends = _tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_M, 0, BLOCK_E)
    num_m = tl.max(tile_ends, 0)
    num_n = tl.cdiv(N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = _swizzle(tile, num_m, num_n, GROUP_M)
        expert, row, end = _tile_rows(tile_m, tile_ends, offsets_ptr, BLOCK_M, BLOCK_M)
        source = _source_rows(route_ptr, row, end, GATHER, TOP_K, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_safe = _weight_columns(n, N, BY_COLUMN)
        a_ptrs = a_ptr + source[:, None] * a_stride + k[None, :]
        w_expert = w_ptr + expert.to(tl.int64) * w_stride_e
        b_ptrs = w_expert + k[:, None] * w_stride_k + n_safe[None, :] * w_stride_n
        acc, _ = accumulate(
            a_ptrs,
            b_ptrs,
            b_ptrs,
            n < N,
            BLOCK_K * w_stride_k,
            K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            BY_COLUMN,
            False,
            PRECISION,
        )
        m = tl.arange(0, BLOCK_M)
        rows = row + m
        m_inside = rows < end
        halves: tl.constexpr = 2 if GATED else 1
        scale = tl.full((BLOCK_M,), 1.0, tl.float32)
        if GATHER:
            route = tl.load(route_ptr + rows, mask=m_inside, other=0)
            scale = tl.load(route_weight_ptr + route, mask=m_inside, other=0.0)
        h_row = h_ptr + row.to(tl.int64) * (N * halves)
        grad_h_row = grad_h_ptr + row.to(tl.int64) * (N * halves)
        act_row = act_ptr + row.to(tl.int64) * N
        n = tile_n * BLOCK_N
        partial = _grad_act_columns(
            acc, scale, h_row, grad_h_row, act_row, m, n, m_inside, N, FUNCTION, GATED, BLOCK_M, BLOCK_N
        )
        if GATHER:
            tl.store(grad_weight_ptr + rows.to(tl.int64) * num_n + tile_n, partial, mask=m_inside)


@triton.jit
def _grad_w_rows(
    d_ptr,
    a_ptr,
    route_ptr,
    d_stride,
    a_stride,
    n,
    k,
    N,
    K,
    first,
    last,
    end,
    acc,
    TOP_K: tl.constexpr,
    GATHER_D: tl.constexpr,
    GATHER_A: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """acc += D^T A over blocks of rows from first to last; WHOLE blocks need no mask on their rows."""
    m = tl.arange(0, BLOCK_M)
    for start in range(first, last, BLOCK_M):
        rows = start + m
        inside = rows < end
        token = rows
        if GATHER_D or GATHER_A:
            route = tl.load(route_ptr + rows) if WHOLE else tl.load(route_ptr + rows, mask=inside, other=0)
            token = route // TOP_K
        d_tile = d_ptr + (token if GATHER_D else rows).to(tl.int64)[:, None] * d_stride + n[None, :]
        a_tile = a_ptr + (token if GATHER_A else rows).to(tl.int64)[:, None] * a_stride + k[None, :]
        if WHOLE and EVEN:
            d = tl.load(d_tile)
            a = tl.load(a_tile)
        elif WHOLE:
            d = tl.load(d_tile, mask=(n < N)[None, :], other=0.0)
            a = tl.load(a_tile, mask=(k < K)[None, :], other=0.0)
        else:
            d = tl.load(d_tile, mask=inside[:, None] & (n < N)[None, :], other=0.0)
            a = tl.load(a_tile, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(d), a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _grouped_gemm_grad_w_kernel(
    d_ptr,  # (R, N), or (T, N) gathered by route if GATHER_D
    a_ptr,  # (R, K), or (T, K) gathered by route if GATHER_A
    route_ptr,  # (R,) int32; unused unless something is gathered
    grad_w_ptr,  # (E, N, K) by strides
    offsets_ptr,
    E,
    N,
    K,
    d_stride,
    a_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    TOP_K: tl.constexpr,
    GATHER_D: tl.constexpr,
    GATHER_A: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """grad_w[e] = D_e^T A_e, summed over the expert's rows; an expert without rows gets zeros."""
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    per_expert = num_n * num_k
    # float32 sums in two levels, as in `accumulate`; tensor cores sum a whole expert in one chain.
    CHAIN: tl.constexpr = 4 * BLOCK_M
    for tile in range(tl.program_id(0), E * per_expert, tl.num_programs(0)):
        expert = tile // per_expert
        tile_n, tile_k = _swizzle(tile % per_expert, num_n, num_k, GROUP_N)
        start = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        whole_end = start + (end - start) // BLOCK_M * BLOCK_M
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if a_ptr.dtype.element_ty == tl.float32:
            for first in range(start, whole_end, CHAIN):
                acc += _grad_w_rows(
                    d_ptr,
                    a_ptr,
                    route_ptr,
                    d_stride,
                    a_stride,
                    n,
                    k,
                    N,
                    K,
                    first,
                    tl.minimum(first + CHAIN, whole_end),
                    end,
                    tl.zeros((BLOCK_N, BLOCK_K), tl.float32),
                    TOP_K,
                    GATHER_D,
                    GATHER_A,
                    PRECISION,
                    EVEN,
                    True,
                    BLOCK_M,
                )
        else:
            acc = _grad_w_rows(
                d_ptr,
                a_ptr,
                route_ptr,
                d_stride,
                a_stride,
                n,
                k,
                N,
                K,
                start,
                whole_end,
                end,
                acc,
                TOP_K,
                GATHER_D,
                GATHER_A,
                PRECISION,
                EVEN,
                True,
                BLOCK_M,
            )
        acc = _grad_w_rows(
            d_ptr,
            a_ptr,
            route_ptr,
            d_stride,
            a_stride,
            n,
            k,
            N,
            K,
            whole_end,
            end,
            end,
            acc,
            TOP_K,
            GATHER_D,
            GATHER_A,
            PRECISION,
            EVEN,
            False,
            BLOCK_M,
        )
        w_expert = grad_w_ptr + expert.to(tl.int64) * w_stride_e
        w_tile = w_expert + n.to(tl.int64)[:, None] * w_stride_n + k.to(tl.int64)[None, :] * w_stride_k
        tl.store(w_tile, acc.to(grad_w_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def grouped_gemm_grad_act(
    grad: torch.Tensor,
    w_ENK: torch.Tensor,
    h: torch.Tensor,
    activation: str,
    offsets_P: torch.Tensor,
    config: GemmConfig,
    *,
    route_R: torch.Tensor | None = None,
    route_weight_TK: torch.Tensor | None = None,
    sm_budget: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradient through `y = activation(h) W'^T`; `w_ENK` is W' with N the activation's columns, K those of `grad`.

    Returns the gradient of h, the activation (times the route's weight if gathered), and per route row the partial sums
    of <gradient, activation> over column tiles (None unless gathered): summed, they are the gradient of the weight.
    """
    grad = row_contiguous(grad)
    num_experts, columns, depth = w_ENK.shape
    num_rows = h.shape[0]
    kind = ACTIVATIONS[activation]
    gather = route_R is not None
    grad_h = torch.empty_like(h)
    act = torch.empty(num_rows, columns, dtype=h.dtype, device=h.device)
    partials = None
    if gather:
        tiles = cdiv(columns, config.block_n)
        partials = torch.empty(num_rows, tiles, dtype=torch.float32, device=h.device)
    if num_rows == 0:
        return grad_h, act, partials
    programs = num_programs(h.device, config, tile_bound(num_rows, num_experts, columns, config), sm_budget)
    launch(
        _grouped_gemm_grad_act_kernel,
        (programs,),
        grad,
        route_R,
        route_weight_TK,
        w_ENK,
        h,
        grad_h,
        act,
        partials,
        offsets_P,
        num_experts,
        columns,
        depth,
        grad.stride(0),
        *w_ENK.stride(),
        TOP_K=1 if route_weight_TK is None else route_weight_TK.shape[1],
        GATHER=gather,
        FUNCTION=kind.function,
        GATED=kind.gated,
        PRECISION=dot_precision(h.dtype),
        EVEN_K=depth % config.block_k == 0,
        BY_COLUMN=w_ENK.stride(1) == 1 and w_ENK.stride(2) != 1,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grad_h, act, partials


def grouped_gemm_grad_w(
    d: torch.Tensor,
    a: torch.Tensor,
    grad_w_ENK: torch.Tensor,
    offsets_P: torch.Tensor,
    config: GemmConfig,
    *,
    route_R: torch.Tensor | None = None,
    top_k: int = 1,
    gather_d: bool = False,
    gather_a: bool = False,
    sm_budget: int | None = None,
) -> torch.Tensor:
    """Write `D_e^T A_e` for every expert into `grad_w_ENK` (any strides) and return it."""
    d, a = row_contiguous(d), row_contiguous(a)
    num_experts, columns, depth = grad_w_ENK.shape
    tiles = num_experts * cdiv(columns, config.block_n) * cdiv(depth, config.block_k)
    launch(
        _grouped_gemm_grad_w_kernel,
        (num_programs(d.device, config, tiles, sm_budget),),
        d,
        a,
        route_R,
        grad_w_ENK,
        offsets_P,
        num_experts,
        columns,
        depth,
        d.stride(0),
        a.stride(0),
        *grad_w_ENK.stride(),
        TOP_K=top_k,
        GATHER_D=gather_d,
        GATHER_A=gather_a,
        PRECISION=dot_precision(a.dtype),
        EVEN=columns % config.block_n == 0 and depth % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_N=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grad_w_ENK
