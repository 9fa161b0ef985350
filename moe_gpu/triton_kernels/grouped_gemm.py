"""Grouped products over rows sorted by expert, and the parts that every kernel on such rows shares.

Persistent: the grid is the number of programs the device runs at once, and each walks over tiles of (rows, columns).
Which expert a row tile belongs to is found from the offsets on the device: nothing is read back, no list of tiles
is built. Rows past an expert's last are clamped on the way in and masked on the way out.

Load-aware tiles: one launch may hold several classes of row tiles, each a product of its own shape. An expert's rows go
in tiles of the largest class and what is left in one of the smallest class that holds it, so that an expert of many
rows reads its weights seldom and one of few pads little. All tiles of a class come before those of the next smaller
one and programs take them in turn, the longest first; the second half of the programs runs its own in the opposite
order, so that tiles bound by arithmetic and tiles bound by weights run side by side.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.accumulate import accumulate
from moe_gpu.triton_kernels.fp8 import scale_bits, scale_block, scale_rows
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import HOPPER_SHARED_BYTES, ROW_CLASSES, GemmConfig, cdiv, next_power_of_2

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
# The classes of row tiles are powers of two: as many as there are, from the largest down.
LARGEST_ROW_TILE = tl.constexpr(ROW_CLASSES[-1])
NUM_ROW_CLASSES = tl.constexpr(len(ROW_CLASSES))


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
def _tile_ends(offsets_ptr, E, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, SMALLER: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row tiles of class SIZE of the experts up to and including each, (BLOCK_E,).

    The classes are BLOCK_M, the largest, and the powers of two that add up to SMALLER.
    """
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    if SMALLER == 0:
        return tl.cumsum(tl.cdiv(end - start, BLOCK_M), 0)
    else:
        rest = (end - start) % BLOCK_M
        size = tl.full((BLOCK_E,), BLOCK_M, tl.int32)  # of the tile that takes the rest
        for step in tl.static_range(NUM_ROW_CLASSES):
            if (LARGEST_ROW_TILE >> step) & SMALLER:
                size = tl.where(rest <= (LARGEST_ROW_TILE >> step), LARGEST_ROW_TILE >> step, size)
        tiles = ((rest > 0) & (size == SIZE)).to(tl.int32)
        if SIZE == BLOCK_M:
            tiles += (end - start) // BLOCK_M
        return tl.cumsum(tiles, 0)


@triton.jit
def _tile_rows(tile_m, tile_ends, offsets_ptr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, first row and end row of row tile `tile_m` of class SIZE."""
    expert = tl.sum((tile_ends <= tile_m).to(tl.int32), 0)
    first = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    if SIZE == BLOCK_M:
        before = tl.max(tl.where(tile_ends <= tile_m, tile_ends, 0), 0)
        row = first + (tile_m - before) * BLOCK_M
    else:
        row = end - (end - first) % BLOCK_M
    return expert, row, end


@triton.jit
def _class_in_turn(turn):
    """Rows of the class that this program takes in its turn: the largest first, or in its second half the smallest."""
    backwards = 2 * tl.program_id(0) >= tl.num_programs(0)
    return tl.where(backwards, (LARGEST_ROW_TILE >> (NUM_ROW_CLASSES - 1)) << turn, LARGEST_ROW_TILE >> turn)


@triton.jit
def _first_tile(offsets_ptr, E, size, num_n, BLOCK_M: tl.constexpr, SMALLER: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's first tile of the class of `size` rows: it takes every so many-th, counted over all classes."""
    larger = 0
    for step in tl.static_range(NUM_ROW_CLASSES):
        if (LARGEST_ROW_TILE >> step) & (BLOCK_M | SMALLER):
            ends = _tile_ends(offsets_ptr, E, LARGEST_ROW_TILE >> step, BLOCK_M, SMALLER, BLOCK_E)
            larger += tl.where(size < (LARGEST_ROW_TILE >> step), tl.max(ends, 0), 0)
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - larger * num_n % programs) % programs


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
def _forward_tiles(
    a_ptr,
    route_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    h_ptr,
    offsets_ptr,
    first,
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
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SMALLER: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A program's tiles of class SIZE, from the one numbered `first` on."""
    tile_ends = _tile_ends(offsets_ptr, E, SIZE, BLOCK_M, SMALLER, BLOCK_E)
    num_m = tl.max(tile_ends, 0)
    num_n = tl.cdiv(N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in range(first, num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = _swizzle(tile, num_m, num_n, GROUP_M)
        expert, row, end = _tile_rows(tile_m, tile_ends, offsets_ptr, SIZE, BLOCK_M)
        source = _source_rows(route_ptr, row, end, GATHER, TOP_K, SIZE)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_safe = _weight_columns(n, N, BY_COLUMN)
        a_ptrs = a_ptr + source[:, None] * a_stride + k[None, :]
        w_expert = w_ptr + expert.to(tl.int64) * w_stride_e
        b_ptrs = w_expert + k[:, None] * w_stride_k + n_safe[None, :] * w_stride_n
        b2_ptrs = b_ptrs
        if GATED:
            b2_ptrs = w_expert + k[:, None] * w_stride_k + (n_safe + N)[None, :] * w_stride_n
        halves: tl.constexpr = 2 if GATED else 1
        s_rows = None
        s2_rows = None
        if SCALE_K > 0:
            s_rows = scale_rows(scale_ptr, expert, tl.minimum(n, N - 1), N * halves, K, SCALE_N, SCALE_K)
            if GATED:
                s2_rows = scale_rows(scale_ptr, expert, tl.minimum(n, N - 1) + N, N * halves, K, SCALE_N, SCALE_K)
        acc, acc2 = accumulate(
            a_ptrs,
            b_ptrs,
            b2_ptrs,
            n < N,
            BLOCK_K * w_stride_k,
            K,
            SIZE,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            BY_COLUMN,
            GATED,
            PRECISION,
            s_rows,
            s2_rows,
            SCALE_K,
        )
        m = tl.arange(0, SIZE)
        inside = (row + m < end)[:, None] & (n < N)[None, :]
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
def _grouped_gemm_fwd_kernel(
    a_ptr,  # (T, K) gathered by route, or (R, K)
    route_ptr,  # (R,) int32; unused unless GATHER
    w_ptr,  # (E, N or 2N, K) by strides
    scale_ptr,  # (E, blocks of N or 2N, blocks of K) float32, or exponents; unused unless SCALE_K
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
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SMALLER: tl.constexpr,
):
    """out = f(A W^T + bias) per expert; gated: f(A Wg^T) * (A Wu^T), the N gate rows of W before the N up rows.

    SCALE_N x SCALE_K: what each scale of FP8 weights is of; SCALE_K is 0 for weights of A's dtype.
    """
    if SMALLER == 0:
        _forward_tiles(
            a_ptr, route_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, h_ptr, offsets_ptr, tl.program_id(0), E, N, K,
            a_stride, w_stride_e, w_stride_n, w_stride_k,
            TOP_K, GATHER, FUNCTION, GATED, HAS_BIAS, SAVE_H, PRECISION, EVEN_K, BY_COLUMN,
            SCALE_N, SCALE_K, BLOCK_E, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SMALLER, BLOCK_M,
        )  # fmt: skip
    else:
        for turn in range(NUM_ROW_CLASSES):
            size = _class_in_turn(turn)
            first = _first_tile(offsets_ptr, E, size, tl.cdiv(N, BLOCK_N), BLOCK_M, SMALLER, BLOCK_E)
            for step in tl.static_range(NUM_ROW_CLASSES):
                if (LARGEST_ROW_TILE >> step) & (BLOCK_M | SMALLER):
                    if size == (LARGEST_ROW_TILE >> step):
                        _forward_tiles(
                            a_ptr, route_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, h_ptr, offsets_ptr, first, E, N, K,
                            a_stride, w_stride_e, w_stride_n, w_stride_k,
                            TOP_K, GATHER, FUNCTION, GATED, HAS_BIAS, SAVE_H, PRECISION, EVEN_K, BY_COLUMN,
                            SCALE_N, SCALE_K, BLOCK_E, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SMALLER,
                            LARGEST_ROW_TILE >> step,
                        )  # fmt: skip


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 2 for the interpreter, so that programs take several tiles there too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may use; Hopper's for the interpreter, so that it runs Hopper's tiles."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def dot_precision(dtype: torch.dtype) -> str:
    """`ieee` for float32 unless PyTorch itself is allowed TF32 (torch.set_float32_matmul_precision)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def usable_sms(device: torch.device, sm_budget: int | None) -> int:
    return num_sms(device) if sm_budget is None else min(num_sms(device), sm_budget)


def num_programs(device: torch.device, config: GemmConfig, num_tiles: int, sm_budget: int | None = None) -> int:
    """Programs to launch: no more than there are tiles, and none beyond the SMs (or `sm_budget` of them)."""
    return max(1, min(num_tiles, usable_sms(device, sm_budget) * config.programs_per_sm))


def tile_bound(num_rows: int, num_experts: int, num_columns: int, config: GemmConfig) -> int:
    """Most tiles that any routing of `num_rows` rows can need: known on the host without reading the offsets."""
    row_tiles = cdiv(num_rows, config.block_m) + min(num_experts, num_rows)
    return row_tiles * cdiv(num_columns, config.block_n)


def row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
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
    scales_EBC: torch.Tensor | None = None,
    bias_EN: torch.Tensor | None = None,
    save_h: bool = False,
    zero_tail: bool = False,
    sm_budget: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`f(a W[e]^T + bias[e])` over the rows of each expert, and the pre-activations if asked for.

    a: (R, K), or (T, K) gathered by `route_R // top_k`. w_ENK may have any strides. Returns (R, N) (half of w's N when
    gated) and h or None. Rows past the last offset are zero if `zero_tail`, else left unwritten. `out` is written into
    if given, instead of new memory. scales_EBC: the scales of FP8 weights, as in `reference.QuantisedStack`.
    """
    a = row_contiguous(a)
    num_experts, w_rows, depth = w_ENK.shape
    kind = ACTIVATIONS[activation] if activation else None
    gated = kind is not None and kind.gated
    columns = w_rows // 2 if gated else w_rows
    new = torch.zeros if zero_tail else torch.empty
    out = new(num_rows, columns, dtype=a.dtype, device=a.device) if out is None else out
    h = torch.empty(num_rows, w_rows, dtype=a.dtype, device=a.device) if save_h else None
    if num_rows == 0:
        return out, h
    programs = num_programs(a.device, config, tile_bound(num_rows, num_experts, columns, config), sm_budget)
    scale_n, scale_k = scale_block(w_ENK, scales_EBC)
    launch(
        _grouped_gemm_fwd_kernel,
        (programs,),
        a,
        route_R,
        w_ENK,
        scale_bits(scales_EBC),
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
        SCALE_N=scale_n,
        SCALE_K=scale_k,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        SMALLER=sum(config.smaller_ms),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, h
