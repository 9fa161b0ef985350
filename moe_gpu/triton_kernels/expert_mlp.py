"""The fused expert MLP for few tokens per expert: gate, up, activation and down in one launch.

The intermediate stays in registers. A program owns up to BLOCK_M rows of one expert and a slice of BLOCK_I columns of
the intermediate; it writes float32 partial sums of the output, one plane a slice, which the combine adds in a fixed
order. Every weight is read once; nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.accumulate import accumulate
from moe_gpu.triton_kernels.grouped_gemm import _tile_ends, _tile_rows, apply_function, dot_precision
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import MlpConfig, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["R"])
def _expert_mlp_kernel(
    x_ptr,  # (T, H)
    route_ptr,  # (R,) int32
    up_ptr,  # (E, I or 2I, H) by strides
    up_bias_ptr,  # (E, I or 2I); unused unless HAS_BIAS
    down_ptr,  # (E, O, I) by strides
    down_bias_ptr,  # (E, O); unused unless HAS_BIAS
    partial_ptr,  # (S, R, O) float32
    offsets_ptr,
    E,
    H,
    I,  # noqa: E741
    O,  # noqa: E741
    R,
    x_stride,
    up_stride_e,
    up_stride_n,
    up_stride_k,
    down_stride_e,
    down_stride_n,
    down_stride_k,
    TOP_K: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program: row tile `program_id(0)` (if there is one), slice `program_id(1)` of the intermediate."""
    tile_ends = _tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_M, 0, BLOCK_E)
    if tl.program_id(0) < tl.max(tile_ends, 0):
        expert, row, end = _tile_rows(tl.program_id(0), tile_ends, offsets_ptr, BLOCK_M, BLOCK_M)
        expert = expert.to(tl.int64)
        rows = row + tl.arange(0, BLOCK_M)
        token = tl.load(route_ptr + tl.minimum(rows, end - 1)) // TOP_K
        k = tl.arange(0, BLOCK_K)
        i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        i_safe = tl.minimum(i, I - 1).to(tl.int64)
        a_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :]
        up = up_ptr + expert * up_stride_e
        b_ptrs = up + k[:, None] * up_stride_k + i_safe[None, :] * up_stride_n
        b2_ptrs = b_ptrs
        if GATED:
            b2_ptrs = up + k[:, None] * up_stride_k + (i_safe + I)[None, :] * up_stride_n
        acc, acc2 = accumulate(
            a_ptrs,
            b_ptrs,
            b2_ptrs,
            i < I,
            BLOCK_K * up_stride_k,
            H,
            BLOCK_M,
            BLOCK_I,
            BLOCK_K,
            EVEN_H,
            False,
            GATED,
            PRECISION,
        )
        halves: tl.constexpr = 2 if GATED else 1
        if HAS_BIAS:
            up_bias = up_bias_ptr + expert * (I * halves) + i_safe
            acc += tl.load(up_bias).to(tl.float32)[None, :]
            if GATED:
                acc2 += tl.load(up_bias + I).to(tl.float32)[None, :]
        act = apply_function(acc, FUNCTION)
        if GATED:
            act = act * acc2
        act = tl.where((i < I)[None, :], act, 0.0).to(x_ptr.dtype.element_ty)
        down = down_ptr + expert * down_stride_e + i_safe[:, None] * down_stride_k
        out = partial_ptr + tl.program_id(1).to(tl.int64) * R * O + rows.to(tl.int64)[:, None] * O
        for start in range(0, O, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            o_safe = tl.minimum(o, O - 1).to(tl.int64)
            w = tl.load(down + o_safe[None, :] * down_stride_n)
            y = tl.dot(act, w, input_precision=PRECISION)
            if HAS_BIAS:
                if tl.program_id(1) == 0:
                    y += tl.load(down_bias_ptr + expert * O + o_safe).to(tl.float32)[None, :]
            tl.store(out + o[None, :], y, mask=(rows < end)[:, None] & (o < O)[None, :])


def expert_mlp_forward(
    x_TH: torch.Tensor,
    row_route_R: torch.Tensor,
    offsets_P: torch.Tensor,
    top_k: int,
    up_EGH: torch.Tensor,
    down_EOI: torch.Tensor,
    activation: str,
    config: MlpConfig,
    up_bias_EG: torch.Tensor | None = None,
    down_bias_EO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partial outputs (S, R, O) in float32; summed over S they are the experts' rows before the weighted combine."""
    if x_TH.stride(-1) != 1:
        x_TH = x_TH.contiguous()
    kind = ACTIVATIONS[activation]
    num_experts, output_dim, hidden_dim = down_EOI.shape
    num_rows, input_dim = row_route_R.shape[0], x_TH.shape[1]
    slices = cdiv(hidden_dim, config.block_i)
    partial = torch.empty(slices, num_rows, output_dim, dtype=torch.float32, device=x_TH.device)
    if num_rows == 0:
        return partial
    row_tiles = cdiv(num_rows, config.block_m) + min(num_experts, num_rows)
    launch(
        _expert_mlp_kernel,
        (row_tiles, slices),
        x_TH,
        row_route_R,
        up_EGH,
        None if up_bias_EG is None else up_bias_EG.contiguous(),
        down_EOI,
        None if down_bias_EO is None else down_bias_EO.contiguous(),
        partial,
        offsets_P,
        num_experts,
        input_dim,
        hidden_dim,
        output_dim,
        num_rows,
        x_TH.stride(0),
        *up_EGH.stride(),
        *down_EOI.stride(),
        TOP_K=top_k,
        FUNCTION=kind.function,
        GATED=kind.gated,
        HAS_BIAS=up_bias_EG is not None,
        PRECISION=dot_precision(x_TH.dtype),
        EVEN_H=input_dim % config.block_k == 0,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_M=config.block_m,
        BLOCK_I=config.block_i,
        BLOCK_K=config.block_k,
        BLOCK_O=config.block_o,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial
