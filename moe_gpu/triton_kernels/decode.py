"""Experts for few rows each, where time is the reading of weights: every weight streams once, in two launches.

Weights are the left side of the product and up to BLOCK_M rows of an expert the right one, so that tensor cores take 64
weight rows against 16 tokens. The down projection is launched while the up projection drains, and may ask for its first
weights before it waits for that one's results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.fp8 import as_dtype_of, load_scales, scale_bits, scale_block, scale_rows
from moe_gpu.triton_kernels.grouped_gemm import apply_function, row_contiguous, shared_bytes
from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.products import hopper_unavailable
from moe_gpu.triton_kernels.tuning import HOPPER_SHARED_BYTES, cdiv, next_power_of_2

MIN_CAPABILITY = (9, 0)
# Average rows an expert up to which these kernels serve. On an H200, in a graph, for Qwen3's experts (128, 8 a token,
# 2048 by 768, bfloat16), against the grouped products: one token 25.8 against 29.2 us, two 44.6 against 47.4, eight
# 123.7 against 125.3 (printed, not recorded).
DECODE_MAX_ROWS_PER_EXPERT = 1
HOPPER_DECODE_MAX_EXPERTS = 512  # each program holds where the rows of all of them lie
LINE_BITS = tl.constexpr(8 * 128)  # of a cache line


@triton.jit
def _prefetch_rows(rows, depth, LINES: tl.constexpr):
    """Ask for the first LINES cache lines of each contiguous row of weights; nothing is read."""
    weights: tl.constexpr = LINE_BITS // rows.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(tl.arange(0, LINES) * weights, depth - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [rows[:, None] + column[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _sorted_rows(offsets_ptr, tile, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert (-1 for none), rows and which of them are live, of a tile of BLOCK_M rows, in one round of loads."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    tile_ends = tl.cumsum(tiles, 0)
    mine = (tile_ends > tile) & (tile_ends - tiles <= tile)
    expert = tl.max(tl.where(mine, e, -1), 0)
    first = tl.sum(tl.where(mine, start + (tile - tile_ends + tiles) * BLOCK_M, 0), 0)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < tl.sum(tl.where(mine, end, 0), 0)
    return expert, tl.where(live, rows, first), live


@triton.jit
def _weights_by_rows(
    w_rows,  # (M,) pointers to the first k of each weight row
    x_ptrs,  # (BLOCK_M,) pointers to the first k of each activation row, contiguous
    inside,  # (M,) weight rows that exist
    depth,
    w_stride,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    s_rows,  # (M,) pointers to the first scale of each FP8 weight row
    SCALE_K: tl.constexpr,
):
    """(M, BLOCK_M) float32: weight rows times activation rows over k; FP8's scales as in `accumulate`."""
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_rows[:, None] + k.to(tl.int64)[None, :] * w_stride
    x_ptrs = x_ptrs[None, :] + k[:, None]
    acc = tl.zeros((M, BLOCK_M), tl.float32)
    if SCALE_K > 0:
        scale = load_scales(s_rows, 0, depth, SCALE_K)
    for start in range(0, depth, BLOCK_K):
        if SCALE_K > 0:
            next_scale = load_scales(s_rows, start + BLOCK_K, depth, SCALE_K)
        if EVEN_K and not BY_COLUMN:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=inside[:, None] & (k < depth - start)[None, :], other=0.0)
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=(k < depth - start)[:, None], other=0.0)
        if SCALE_K > 0:
            acc += tl.dot(as_dtype_of(x, w), x) * scale[:, None]
            scale = next_scale
        else:
            acc = tl.dot(w, x, acc)
        w_ptrs += BLOCK_K * w_stride
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def _decode_up_kernel(
    x_ptr,  # (T, H)
    route_ptr,  # (R,) int32
    offsets_ptr,  # (P,) int32
    w_ptr,  # (E, I or 2I, H) by strides
    scale_ptr,  # (E, blocks of I or 2I, blocks of H); unused unless SCALE_K
    bias_ptr,  # (E, I or 2I); unused unless HAS_BIAS
    a_ptr,  # (R, I)
    E,
    H,
    I,  # noqa: E741
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    TOP_K: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program BLOCK_N columns of the intermediate of row tile `program_id(1)`, if there is one."""
    wait_for_previous(PDL)
    expert, rows, live = _sorted_rows(offsets_ptr, tl.program_id(1), E, BLOCK_E, BLOCK_M)
    if expert >= 0:
        HALVES: tl.constexpr = 2 if GATED else 1
        M: tl.constexpr = BLOCK_N * HALVES
        m = tl.arange(0, M)
        n = tl.program_id(0) * BLOCK_N + m % BLOCK_N
        # Contiguous columns are masked: clamping would cost the 16-byte loads.
        row = (n if BY_COLUMN else tl.minimum(n, I - 1)) + m // BLOCK_N * I
        w_rows = w_ptr + expert.to(tl.int64) * w_stride_e + row.to(tl.int64) * w_stride_n
        routes = tl.load(route_ptr + rows, mask=live, other=0)
        x_rows = x_ptr + (routes // TOP_K).to(tl.int64) * x_stride
        s_rows = None
        if SCALE_K > 0:
            scaled = tl.minimum(n, I - 1) + m // BLOCK_N * I
            s_rows = scale_rows(scale_ptr, expert, scaled, I * HALVES, H, SCALE_N, SCALE_K)
        acc = _weights_by_rows(
            w_rows, x_rows, n < I, H, w_stride_k, M, BLOCK_M, BLOCK_K, EVEN_K, BY_COLUMN, s_rows, SCALE_K
        )
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * (I * HALVES) + row, mask=n < I, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
            act = apply_function(gate, FUNCTION) * up
        else:
            act = apply_function(acc, FUNCTION)
        out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        a_ptrs = a_ptr + rows.to(tl.int64)[None, :] * I + out[:, None]
        tl.store(a_ptrs, act.to(a_ptr.dtype.element_ty), mask=(out < I)[:, None] & live[None, :])


@triton.jit
def _decode_down_kernel(
    a_ptr,  # (R, I)
    offsets_ptr,  # (P,) int32
    w_ptr,  # (E, O, I) by strides
    scale_ptr,  # (E, blocks of O, blocks of I); unused unless SCALE_K
    bias_ptr,  # (E, O); unused unless HAS_BIAS
    y_ptr,  # (R, O) float32
    E,
    I,  # noqa: E741
    O,  # noqa: E741
    w_stride_e,
    w_stride_n,
    w_stride_k,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program BLOCK_N columns of the output of row tile `program_id(1)`, if there is one."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = (n if BY_COLUMN else tl.minimum(n, O - 1)).to(tl.int64)
    if PDL and PREFETCH:
        # A hint, so it need not wait: should the offsets read here be stale, some other weight is asked for.
        hint, _, _ = _sorted_rows(offsets_ptr, tl.program_id(1), E, BLOCK_E, BLOCK_M)
        if hint >= 0:
            _prefetch_rows(w_ptr + hint.to(tl.int64) * w_stride_e + safe * w_stride_n, I, PREFETCH)
    wait_for_previous(PDL)
    expert, rows, live = _sorted_rows(offsets_ptr, tl.program_id(1), E, BLOCK_E, BLOCK_M)
    if expert >= 0:
        w_rows = w_ptr + expert.to(tl.int64) * w_stride_e + safe * w_stride_n
        a_rows = a_ptr + rows.to(tl.int64) * I
        s_rows = None
        if SCALE_K > 0:
            s_rows = scale_rows(scale_ptr, expert, tl.minimum(n, O - 1), O, I, SCALE_N, SCALE_K)
        acc = _weights_by_rows(
            w_rows, a_rows, n < O, I, w_stride_k, BLOCK_N, BLOCK_M, BLOCK_K, EVEN_K, BY_COLUMN, s_rows, SCALE_K
        )
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * O + safe, mask=n < O, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        y_ptrs = y_ptr + rows.to(tl.int64)[None, :] * O + n[:, None]
        tl.store(y_ptrs, acc, mask=(n < O)[:, None] & live[None, :])


@dataclass(frozen=True)
class DecodeTile:
    """Tile of one of the two products: BLOCK_N weight rows (of each half when gated), BLOCK_K deep."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """How few rows are served: tiles of `block_m` rows of an expert.

    prefetch: cache lines of each weight row that the down projection asks for before the up projection has finished (a
    power of two; 0 for none).
    """

    up: DecodeTile
    down: DecodeTile
    block_m: int = 16
    prefetch: int = 0


def decode_config(num_rows: int) -> DecodeConfig:
    """The fastest of the tiles tried on an H200 for Qwen3's experts, by how many weights are on their way at once."""
    if num_rows <= 16:
        return DecodeConfig(DecodeTile(64, 64, 8, 6), DecodeTile(128, 128, 8, 4), prefetch=4)
    if num_rows <= 32:
        return DecodeConfig(DecodeTile(64, 64, 8, 6), DecodeTile(128, 128, 4, 3), prefetch=4)
    if num_rows <= 64:
        return DecodeConfig(DecodeTile(64, 64, 4, 5), DecodeTile(128, 128, 4, 3))
    return DecodeConfig(DecodeTile(64, 128, 4, 3), DecodeTile(64, 128, 4, 3))


def fp8_decode_config(up_step: int, down_step: int) -> DecodeConfig:
    """For FP8 weights, products that step so deep: rows enough to pay for converting a weight, and not more.

    With few rows the grouped products' tiles are faster there, unlike in bf16: the copies are half as wide.
    """
    return DecodeConfig(DecodeTile(64, up_step, 8, 5), DecodeTile(128, down_step, 8, 5), block_m=64)


def rows_dtype(dtype: torch.dtype, num_rows: int, num_experts: int) -> torch.dtype:
    """What decode kernels leave rows in: float32 where that costs next to nothing beside the weights."""
    return torch.float32 if num_rows <= DECODE_MAX_ROWS_PER_EXPERT * num_experts else dtype


def decode_unsupported(
    x_TH: torch.Tensor,
    num_rows: int,
    num_experts: int,
    depth: int,
    save: bool,
    sm_budget: int | None,
    max_rows_per_expert: int = DECODE_MAX_ROWS_PER_EXPERT,
) -> str | None:
    """Why the grouped products serve and not `decode_forward`, or None where it does."""
    if x_TH.dtype not in (torch.float16, torch.bfloat16):
        return f"decode kernels compute in float16 and bfloat16, not in {x_TH.dtype}"
    if save:
        return "decode kernels keep nothing for a gradient"
    if depth != 1:
        return f"decode kernels serve experts of depth 1, not {depth}"
    if sm_budget is not None:
        return "decode kernels take every SM"
    if num_rows > max_rows_per_expert * num_experts:
        return f"{num_rows} rows for {num_experts} experts are more than {max_rows_per_expert} an expert"
    device = x_TH.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"decode kernels were measured from compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} only"
    if shared_bytes(device) < HOPPER_SHARED_BYTES:
        return f"decode tiles are for {HOPPER_SHARED_BYTES} bytes of shared memory, {device} has {shared_bytes(device)}"
    return None


def hopper_decode_unfit(
    x_TH: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], num_experts: int, depth: int, save: bool
) -> str | None:
    """Why `decode_forward_hopper` cannot serve these operands, or None where it can.

    num_experts: that the rows are of, where the weights are only some of theirs.
    """
    if save:
        return "decode kernels keep nothing for a gradient"
    if depth != 1:
        return f"decode kernels serve experts of depth 1, not {depth}"
    if x_TH.dtype not in (torch.float16, torch.bfloat16):
        return f"decode kernels compute in float16 and bfloat16, not in {x_TH.dtype}"
    unavailable = hopper_unavailable(x_TH.device)
    if unavailable is not None:
        return unavailable
    if num_experts > HOPPER_DECODE_MAX_EXPERTS:
        return f"{num_experts} experts are more than {HOPPER_DECODE_MAX_EXPERTS}"
    up, down = weights
    if x_TH.stride(0) % 8 or up.shape[2] % 8 or down.shape[2] % 8:
        return "rows do not start on 16 bytes"
    if x_TH.data_ptr() % 16 or up.data_ptr() % 16 or down.data_ptr() % 16:
        return "an operand does not start on 16 bytes"
    if not (up.is_contiguous() and down.is_contiguous()):
        return "the weights are strided"
    return None


def by_column(w_ENK: torch.Tensor) -> bool:
    """Whether the weights' rows, not their depth, are the contiguous axis."""
    return w_ENK.stride(1) == 1 and w_ENK.stride(2) != 1


def decode_forward(
    x_TH: torch.Tensor,
    row_route_R: torch.Tensor,
    offsets_P: torch.Tensor,
    top_k: int,
    up_EGH: torch.Tensor,
    down_EOI: torch.Tensor,
    activation: str,
    config: DecodeConfig,
    up_bias_EG: torch.Tensor | None = None,
    down_bias_EO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    up_scales_EBC: torch.Tensor | None = None,
    down_scales_EBC: torch.Tensor | None = None,
) -> torch.Tensor:
    """The experts' rows (R, O) in float32, before the weighted combine; rows past the last offset are not written.

    They go to `out` if it is given, else to new memory. The scales are those of FP8 weights (`fp8.py`).
    """
    x_TH = row_contiguous(x_TH)
    kind = ACTIVATIONS[activation]
    num_experts, output_dim, hidden_dim = down_EOI.shape
    num_rows, input_dim = row_route_R.shape[0], x_TH.shape[1]
    up, down = config.up, config.down
    a = torch.empty(num_rows, hidden_dim, dtype=x_TH.dtype, device=x_TH.device)
    y = torch.empty(num_rows, output_dim, dtype=torch.float32, device=x_TH.device) if out is None else out
    if num_rows == 0:
        return y
    up_block, down_block = scale_block(up_EGH, up_scales_EBC), scale_block(down_EOI, down_scales_EBC)
    row_tiles = min(num_rows, cdiv(num_rows, config.block_m) + min(num_experts, num_rows))
    shared = dict(BLOCK_E=next_power_of_2(num_experts), BLOCK_M=config.block_m, **pdl_options(x_TH.device))
    launch(
        _decode_up_kernel,
        (cdiv(hidden_dim, up.block_n), row_tiles),
        x_TH,
        row_route_R,
        offsets_P,
        up_EGH,
        scale_bits(up_scales_EBC),
        None if up_bias_EG is None else up_bias_EG.contiguous(),
        a,
        num_experts,
        input_dim,
        hidden_dim,
        x_TH.stride(0),
        *up_EGH.stride(),
        TOP_K=top_k,
        FUNCTION=kind.function,
        GATED=kind.gated,
        HAS_BIAS=up_bias_EG is not None,
        EVEN_K=input_dim % up.block_k == 0,
        BY_COLUMN=by_column(up_EGH),
        SCALE_N=up_block[0],
        SCALE_K=up_block[1],
        BLOCK_N=up.block_n,
        BLOCK_K=up.block_k,
        num_warps=up.num_warps,
        num_stages=up.num_stages,
        **shared,
    )
    launch(
        _decode_down_kernel,
        (cdiv(output_dim, down.block_n), row_tiles),
        a,
        offsets_P,
        down_EOI,
        scale_bits(down_scales_EBC),
        None if down_bias_EO is None else down_bias_EO.contiguous(),
        y,
        num_experts,
        hidden_dim,
        output_dim,
        *down_EOI.stride(),
        HAS_BIAS=down_bias_EO is not None,
        EVEN_K=hidden_dim % down.block_k == 0,
        BY_COLUMN=by_column(down_EOI),
        SCALE_N=down_block[0],
        SCALE_K=down_block[1],
        PREFETCH=config.prefetch if down_EOI.stride(2) == 1 else 0,
        BLOCK_N=down.block_n,
        BLOCK_K=down.block_k,
        num_warps=down.num_warps,
        num_stages=down.num_stages,
        **shared,
    )
    return y
