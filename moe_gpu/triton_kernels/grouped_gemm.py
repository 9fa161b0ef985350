"""Grouped products over rows sorted by expert: forward, gradient of the rows and gradient of the weights.

Persistent: the grid is the number of programs the device (or a slice of it) runs at once, and each walks over tiles
`(row tile, column tile)`. Which expert a row tile belongs to is found from the offsets on the device, so nothing is read
back and no list of tiles is built. Rows past an expert's last are clamped on the way in and masked on the way out.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.tuning import GemmConfig

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def apply_function(x, FUNCTION: tl.constexpr):
    """silu, gelu, gelu_tanh or relu of float32 x."""
    if FUNCTION == "silu":
        return x / (1 + tl.exp(-x))
    elif FUNCTION == "gelu":
        return x * 0.5 * (1 + tl.erf(x * SQRT_HALF))
    elif FUNCTION == "gelu_tanh":
        inner = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        return x / (1 + tl.exp(-2 * inner))
    else:
        tl.static_assert(FUNCTION == "relu")
        return tl.where(x > 0, x, tl.where(x == x, 0.0, x))


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
def _tile_ends(offsets_ptr, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row tiles of the experts up to and including each, (BLOCK_E,)."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    return tl.cumsum(tl.cdiv(end - start, BLOCK_M), 0)


@triton.jit
def _tile_rows(tile_m, tile_ends, offsets_ptr, BLOCK_M: tl.constexpr):
    """Expert, first row and end row of row tile `tile_m`."""
    expert = tl.sum((tile_ends <= tile_m).to(tl.int32), 0)
    before = tl.max(tl.where(tile_ends <= tile_m, tile_ends, 0), 0)
    row = tl.load(offsets_ptr + expert) + (tile_m - before) * BLOCK_M
    return expert, row, tl.load(offsets_ptr + expert + 1)


@triton.jit
def _swizzle(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: groups of GROUP_M row tiles take all columns, so weights and rows stay in L2."""
    group = tile // (GROUP_M * num_n)
    within = tile % (GROUP_M * num_n)
    size = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit
def _source_rows(route_ptr, row, end, GATHER: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of A for a tile, clamped to its expert: the tokens of the routes if gathered, else the rows themselves."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
    if GATHER:
        rows = tl.load(route_ptr + rows) // TOP_K
    return rows.to(tl.int64)


@triton.jit
def _weight_columns(n, N, BY_COLUMN: tl.constexpr):
    """Columns to address: contiguous ones stay so and are masked (clamping would cost the 16-byte loads)."""
    return n.to(tl.int64) if BY_COLUMN else tl.minimum(n, N - 1).to(tl.int64)


@triton.jit
def _load_weights(ptrs, k_left, n_inside, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, BY_COLUMN: tl.constexpr):
    """A (BLOCK_K, BLOCK_N) tile of weights; BY_COLUMN: the columns are the contiguous axis."""
    if BY_COLUMN:
        inside = n_inside[None, :] if EVEN_K else n_inside[None, :] & (tl.arange(0, BLOCK_K) < k_left)[:, None]
        return tl.load(ptrs, mask=inside, other=0.0)
    elif EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(tl.arange(0, BLOCK_K) < k_left)[:, None], other=0.0)


@triton.jit
def _accumulate(
    a_ptrs,
    b_ptrs,
    b2_ptrs,
    n_inside,
    b_step,
    K,
    acc,
    acc2,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc += A B (and acc2 += A B2): pointers to (BLOCK_M, BLOCK_K) and (BLOCK_K, BLOCK_N) tiles."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=(k < K - start)[None, :], other=0.0)
        b = _load_weights(b_ptrs, K - start, n_inside, BLOCK_K, EVEN_K, BY_COLUMN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if TWO:
            b2 = _load_weights(b2_ptrs, K - start, n_inside, BLOCK_K, EVEN_K, BY_COLUMN)
            acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
            b2_ptrs += b_step
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    return acc, acc2


@triton.jit
def _grouped_gemm_fwd_kernel(
    a_ptr,  # (T, K) gathered by route, or (R, K)
    route_ptr,  # (R,) int32; unused unless GATHER
    w_ptr,  # (E, N or 2N, K) by strides
    bias_ptr,  # (E, N or 2N); unused unless HAS_BIAS
    out_ptr,  # (R, N)
    h_ptr,  # (R, N or 2N) pre-activations; unused unless SAVE_H
    offsets_ptr,  # (P,) int32
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
    HAS_BIAS: tl.constexpr,
    SAVE_H: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = f(A W^T + bias) per expert; gated: f(A Wg^T) * (A Wu^T), the N gate rows of W before the N up rows."""
    tile_ends = _tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_E)
    num_m = tl.max(tile_ends, 0)
    num_n = tl.cdiv(N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = _swizzle(tile, num_m, num_n, GROUP_M)
        expert, row, end = _tile_rows(tile_m, tile_ends, offsets_ptr, BLOCK_M)
        source = _source_rows(route_ptr, row, end, GATHER, TOP_K, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_safe = _weight_columns(n, N, BY_COLUMN)
        a_ptrs = a_ptr + source[:, None] * a_stride + k[None, :]
        w_expert = w_ptr + expert.to(tl.int64) * w_stride_e
        b_ptrs = w_expert + k[:, None] * w_stride_k + n_safe[None, :] * w_stride_n
        b2_ptrs = b_ptrs
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = acc
        if GATED:
            b2_ptrs = w_expert + k[:, None] * w_stride_k + (n_safe + N)[None, :] * w_stride_n
        acc, acc2 = _accumulate(
            a_ptrs,
            b_ptrs,
            b2_ptrs,
            n < N,
            BLOCK_K * w_stride_k,
            K,
            acc,
            acc2,
            BLOCK_K,
            EVEN_K,
            BY_COLUMN,
            GATED,
            PRECISION,
        )
        m = tl.arange(0, BLOCK_M)
        inside = (row + m < end)[:, None] & (n < N)[None, :]
        halves: tl.constexpr = 2 if GATED else 1
        if HAS_BIAS:
            bias_row = bias_ptr + expert.to(tl.int64) * (N * halves) + tl.minimum(n, N - 1)
            acc += tl.load(bias_row).to(tl.float32)[None, :]
            if GATED:
                acc2 += tl.load(bias_row + N).to(tl.float32)[None, :]
        if SAVE_H:
            h_tile = h_ptr + row.to(tl.int64) * (N * halves) + (m[:, None] * (N * halves) + n[None, :])
            tl.store(h_tile, acc.to(h_ptr.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(h_tile + N, acc2.to(h_ptr.dtype.element_ty), mask=inside)
        if FUNCTION != "none":
            acc = apply_function(acc, FUNCTION)
        if GATED:
            acc = acc * acc2
        out_tile = out_ptr + row.to(tl.int64) * N + (m[:, None] * N + n[None, :])
        tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_act_columns(
    acc, scale, h_row, grad_h_row, act_row, m, n, m_inside, N, FUNCTION: tl.constexpr, GATED: tl.constexpr
):
    """The part of a tile in columns n: writes dH and the activation, returns <acc, activation> per row."""
    halves: tl.constexpr = 2 if GATED else 1
    inside = m_inside[:, None] & (n < N)[None, :]
    wide = m[:, None] * (N * halves) + n[None, :]
    gate = tl.load(h_row + wide, mask=inside, other=0.0).to(tl.float32)
    act = apply_function(gate, FUNCTION)
    grad_gate = acc * scale[:, None] * function_gradient(gate, FUNCTION)
    if GATED:
        up = tl.load(h_row + wide + N, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_h_row + wide + N, (acc * scale[:, None] * act).to(grad_h_row.dtype.element_ty), mask=inside)
        grad_gate = grad_gate * up
        act = act * up
    tl.store(grad_h_row + wide, grad_gate.to(grad_h_row.dtype.element_ty), mask=inside)
    out = act * scale[:, None]
    tl.store(act_row + (m[:, None] * N + n[None, :]), out.to(act_row.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, acc * act, 0.0), 1)


@triton.jit
def _halve(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns; with the tensor cores' layout nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


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
    tile_ends = _tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_E)
    num_m = tl.max(tile_ends, 0)
    num_n = tl.cdiv(N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = _swizzle(tile, num_m, num_n, GROUP_M)
        expert, row, end = _tile_rows(tile_m, tile_ends, offsets_ptr, BLOCK_M)
        source = _source_rows(route_ptr, row, end, GATHER, TOP_K, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_safe = _weight_columns(n, N, BY_COLUMN)
        a_ptrs = a_ptr + source[:, None] * a_stride + k[None, :]
        w_expert = w_ptr + expert.to(tl.int64) * w_stride_e
        b_ptrs = w_expert + k[:, None] * w_stride_k + n_safe[None, :] * w_stride_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        w_step = BLOCK_K * w_stride_k
        acc, _ = _accumulate(
            a_ptrs, b_ptrs, b_ptrs, n < N, w_step, K, acc, acc, BLOCK_K, EVEN_K, BY_COLUMN, False, PRECISION
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
        # Half the columns at a time: the whole tile's gate, up, gradient and activation do not fit in registers.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halve(acc, BLOCK_M, BLOCK_N)
        n_left = tile_n * BLOCK_N + tl.arange(0, HALF)
        partial = _grad_act_columns(left, scale, h_row, grad_h_row, act_row, m, n_left, m_inside, N, FUNCTION, GATED)
        partial += _grad_act_columns(
            right, scale, h_row, grad_h_row, act_row, m, n_left + HALF, m_inside, N, FUNCTION, GATED
        )
        if GATHER:
            tl.store(grad_weight_ptr + rows.to(tl.int64) * num_n + tile_n, partial, mask=m_inside)


@triton.jit
def _grouped_gemm_grad_w_kernel(
    d_ptr,  # (R, N), or (T, N) gathered by route if GATHER_D
    a_ptr,  # (R, K), or (T, K) gathered by route if GATHER_A
    route_ptr,  # (R,) int32
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """grad_w[e] = D_e^T A_e, summed over the expert's rows; an expert without rows gets zeros."""
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    per_expert = num_n * num_k
    m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), E * per_expert, tl.num_programs(0)):
        expert = tile // per_expert
        tile_n, tile_k = _swizzle(tile % per_expert, num_n, num_k, GROUP_N)
        start = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(start, end, BLOCK_M):
            rows = first + m
            used = rows < end
            token = rows
            if GATHER_D or GATHER_A:
                token = tl.load(route_ptr + rows, mask=used, other=0) // TOP_K
            d_rows = (token if GATHER_D else rows).to(tl.int64)
            a_rows = (token if GATHER_A else rows).to(tl.int64)
            d_tile = d_ptr + d_rows[:, None] * d_stride + n[None, :]
            a_tile = a_ptr + a_rows[:, None] * a_stride + k[None, :]
            d = tl.load(d_tile, mask=used[:, None] & (n < N)[None, :], other=0.0)
            a = tl.load(a_tile, mask=used[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(tl.trans(d), a, acc, input_precision=PRECISION)
        w_expert = grad_w_ptr + expert.to(tl.int64) * w_stride_e
        w_tile = w_expert + n.to(tl.int64)[:, None] * w_stride_n + k.to(tl.int64)[None, :] * w_stride_k
        tl.store(w_tile, acc.to(grad_w_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _grad_bias_kernel(
    d_ptr,  # (R, N), or (T, N) gathered by route and weighted if GATHER
    route_ptr,
    route_weight_ptr,
    grad_bias_ptr,  # (E, N)
    offsets_ptr,
    N,
    d_stride,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program one expert and BLOCK_N columns: the sum of its rows."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = (rows < end)[:, None] & (n < N)[None, :]
        if GATHER:
            route = tl.load(route_ptr + rows, mask=rows < end, other=0)
            weight = tl.load(route_weight_ptr + route, mask=rows < end, other=0.0)
            address = (route // TOP_K).to(tl.int64)[:, None] * d_stride + n[None, :]
            d = tl.load(d_ptr + address, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
        else:
            address = rows.to(tl.int64)[:, None] * d_stride + n[None, :]
            d = tl.load(d_ptr + address, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(d, 0)
    out = grad_bias_ptr + expert.to(tl.int64) * N + n
    tl.store(out, total.to(grad_bias_ptr.dtype.element_ty), mask=n < N)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 2 for the interpreter, so that programs take several tiles there too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """`ieee` for float32 unless PyTorch itself is allowed TF32 (torch.set_float32_matmul_precision)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _programs(device: torch.device, config: GemmConfig, num_tiles: int) -> int:
    return max(1, min(num_tiles, num_sms(device) * config.programs_per_sm))


def _tile_bound(num_rows: int, num_experts: int, num_columns: int, config: GemmConfig) -> int:
    """Most tiles that any routing of `num_rows` rows can need: known on the host without reading the offsets."""
    row_tiles = triton.cdiv(num_rows, config.block_m) + min(num_experts, num_rows)
    return row_tiles * triton.cdiv(num_columns, config.block_n)


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def grouped_gemm_forward(
    a: torch.Tensor,
    w_ENK: torch.Tensor,
    offsets_P: torch.Tensor,
    num_rows: int,
    config: GemmConfig,
    *,
    route_R: torch.Tensor | None = None,
    top_k: int = 1,
    activation: str | None = None,
    bias_EN: torch.Tensor | None = None,
    save_h: bool = False,
    zero_tail: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`f(a W[e]^T + bias[e])` over the rows of each expert, and the pre-activations if asked for.

    a: (R, K), or (T, K) gathered by `route_R // top_k`. w_ENK may have any strides. Returns (R, N) (half of w's N when
    gated) and h or None. Rows past the last offset are zero if `zero_tail`, else left unwritten.
    """
    a = _row_contiguous(a)
    num_experts, w_rows, depth = w_ENK.shape
    kind = ACTIVATIONS[activation] if activation else None
    gated = kind is not None and kind.gated
    columns = w_rows // 2 if gated else w_rows
    new = torch.zeros if zero_tail else torch.empty
    out = new(num_rows, columns, dtype=a.dtype, device=a.device)
    h = torch.empty(num_rows, w_rows, dtype=a.dtype, device=a.device) if save_h else None
    if num_rows == 0:
        return out, h
    programs = _programs(a.device, config, _tile_bound(num_rows, num_experts, columns, config))
    _grouped_gemm_fwd_kernel[(programs,)](
        a,
        route_R,
        w_ENK,
        None if bias_EN is None else bias_EN.contiguous(),
        out,
        h,
        offsets_P,
        num_experts,
        columns,
        depth,
        a.stride(0),
        *w_ENK.stride(),
        TOP_K=top_k,
        GATHER=route_R is not None,
        FUNCTION=kind.function if kind else "none",
        GATED=gated,
        HAS_BIAS=bias_EN is not None,
        SAVE_H=save_h,
        PRECISION=dot_precision(a.dtype),
        EVEN_K=depth % config.block_k == 0,
        BY_COLUMN=w_ENK.stride(1) == 1 and w_ENK.stride(2) != 1,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, h


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradient through `y = activation(h) W'^T`, given W with its axes as (E, columns of the activation, grad's columns).

    Returns the gradient of h, the activation (times the route's weight if gathered), and per route row the partial sums
    of <gradient, activation> over column tiles (None unless gathered): summed, they are the gradient of the weight.
    """
    grad = _row_contiguous(grad)
    num_experts, columns, depth = w_ENK.shape
    num_rows = h.shape[0]
    kind = ACTIVATIONS[activation]
    gather = route_R is not None
    grad_h = torch.empty_like(h)
    act = torch.empty(num_rows, columns, dtype=h.dtype, device=h.device)
    partials = None
    if gather:
        tiles = triton.cdiv(columns, config.block_n)
        partials = torch.empty(num_rows, tiles, dtype=torch.float32, device=h.device)
    if num_rows == 0:
        return grad_h, act, partials
    programs = _programs(h.device, config, _tile_bound(num_rows, num_experts, columns, config))
    _grouped_gemm_grad_act_kernel[(programs,)](
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
        BLOCK_E=triton.next_power_of_2(num_experts),
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
) -> torch.Tensor:
    """Write `D_e^T A_e` for every expert into `grad_w_ENK` (any strides) and return it."""
    d, a = _row_contiguous(d), _row_contiguous(a)
    num_experts, columns, depth = grad_w_ENK.shape
    tiles = num_experts * triton.cdiv(columns, config.block_n) * triton.cdiv(depth, config.block_k)
    _grouped_gemm_grad_w_kernel[(_programs(d.device, config, tiles),)](
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_N=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grad_w_ENK


def grad_bias(
    d: torch.Tensor,
    bias_EN: torch.Tensor,
    offsets_P: torch.Tensor,
    *,
    route_R: torch.Tensor | None = None,
    route_weight_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of a bias, (E, N): the sum of each expert's rows of d, gathered and weighted by route if given."""
    d = _row_contiguous(d)
    num_experts, columns = bias_EN.shape
    out = torch.empty(num_experts, columns, dtype=bias_EN.dtype, device=bias_EN.device)
    block_n = 64
    _grad_bias_kernel[(num_experts, triton.cdiv(columns, block_n))](
        d,
        route_R,
        route_weight_TK,
        out,
        offsets_P,
        columns,
        d.stride(0),
        TOP_K=1 if route_weight_TK is None else route_weight_TK.shape[1],
        GATHER=route_R is not None,
        BLOCK_M=64,
        BLOCK_N=block_n,
    )
    return out
