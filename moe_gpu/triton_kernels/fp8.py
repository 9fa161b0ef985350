"""FP8 weights with a scale for each block: what kernels need to read them, and a kernel that dequantises them.

A weight is its float8_e4m3fn value times the scale of its block. Kernels that read FP8 take the values into the
activations' dtype, which holds each exactly, and multiply the sums of a step over k by the step's scales, in float32:
no weight is ever rounded. Scales are float32 or float8_e8m0fnu, whose bytes are exponents.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from moe_gpu.reference import dequantise_reference
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.tuning import cdiv

FP8 = torch.float8_e4m3fn
MIN_CAPABILITY = (8, 9)  # below, Triton does not convert float8_e4m3fn
LEAST_STEP, DEEPEST_STEP = 32, 128  # of products over k: a step lies within one block of scales
DEQUANTISED_ROWS = 32  # of a program of the dequantising kernel


@triton.jit
def scale_rows(scale_ptr, expert, n, ROWS, K, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr):
    """Pointers to the scales of weight rows n at k = 0; each block is SCALE_N of the ROWS rows times SCALE_K of K."""
    across = tl.cdiv(K, SCALE_K)
    return scale_ptr + (expert * tl.cdiv(ROWS, SCALE_N) + n // SCALE_N).to(tl.int64) * across


@triton.jit
def load_scales(rows, k, K, SCALE_K: tl.constexpr):
    """Float32 scales at depth k of the rows of `scale_rows`, or at the last if k lies beyond; bytes are exponents."""
    scale = tl.load(rows + tl.minimum(k, K - 1) // SCALE_K)
    if rows.dtype.element_ty == tl.uint8:
        bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale.to(tl.int32) << 23))
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def as_dtype_of(x, w):
    """FP8 values in the dtype of x, exactly; by float32, since Triton's way to bfloat16 does not compile for sm_89."""
    if x.dtype == tl.bfloat16:
        return w.to(tl.float32).to(tl.bfloat16)
    else:
        return w.to(x.dtype)


@triton.jit
def _dequantise_kernel(
    values_ptr,  # (E, N, K) float8_e4m3fn, contiguous
    scale_ptr,  # (E, blocks of N, blocks of K)
    out_ptr,  # (E, N, K)
    N,
    K,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program BLOCK_N weight rows of expert `program_id(1)`, BLOCK_K deep, within one block of scales."""
    across = tl.cdiv(K, BLOCK_K)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % across * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    expert = tl.program_id(1)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = (expert.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    rows = scale_rows(scale_ptr, expert, tl.minimum(n, N - 1), N, K, SCALE_N, SCALE_K)
    scale = load_scales(rows, first, K, SCALE_K)
    w = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def fp8_unavailable(device: torch.device) -> str | None:
    """Why kernels cannot read FP8 weights on this device, or None where they can (on the interpreter too)."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return f"kernels read FP8 from compute capability 8.9 on, this GPU has {major}.{minor}"
    return None


def fp8_unfit(values_ENK: torch.Tensor, scales_EBC: torch.Tensor) -> str | None:
    """Why kernels cannot read these weights as FP8, by their layout, or None."""
    if not values_ENK.is_contiguous():
        return "kernels read FP8 weights that are contiguous"
    if step_depth(values_ENK, scales_EBC) < LEAST_STEP:
        depth = scale_block(values_ENK, scales_EBC)[1]
        return f"kernels read FP8 in steps of {LEAST_STEP} within one block of scales, and a block is {depth} deep"
    return None


def step_depth(values_ENK: torch.Tensor, scales_EBC: torch.Tensor) -> int:
    """The deepest step over k, a power of two, that never leaves a block of scales."""
    depth = scale_block(values_ENK, scales_EBC)[1]
    return DEEPEST_STEP if scales_EBC.shape[2] == 1 else min(DEEPEST_STEP, depth & -depth)


def scale_block(w_ENK: torch.Tensor, scales_EBC: torch.Tensor | None) -> tuple[int, int]:
    """Rows and columns of the weights that a scale is of; zeros for weights without scales."""
    if scales_EBC is None:
        return 0, 0
    return cdiv(w_ENK.shape[1], scales_EBC.shape[1]), cdiv(w_ENK.shape[2], scales_EBC.shape[2])


def scale_bits(scales_EBC: torch.Tensor | None) -> torch.Tensor | None:
    """The scales as kernels take them: contiguous, exponents as bytes."""
    if scales_EBC is None:
        return None
    scales_EBC = scales_EBC.contiguous()
    return scales_EBC if scales_EBC.dtype == torch.float32 else scales_EBC.view(torch.uint8)


def dequantise(values_ENK: torch.Tensor, scales_EBC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantise_reference`, in one pass where the kernel can: three bytes a 16-bit weight instead of seven."""
    if fp8_unavailable(values_ENK.device) or fp8_unfit(values_ENK, scales_EBC) or dtype == torch.float64:
        return dequantise_reference(values_ENK, scales_EBC, dtype)
    out = torch.empty_like(values_ENK, dtype=dtype)
    num_experts, rows, depth = values_ENK.shape
    scale_n, scale_k = scale_block(values_ENK, scales_EBC)
    step = step_depth(values_ENK, scales_EBC)
    launch(
        _dequantise_kernel,
        (cdiv(rows, DEQUANTISED_ROWS) * cdiv(depth, step), num_experts),
        values_ENK,
        scale_bits(scales_EBC),
        out,
        rows,
        depth,
        SCALE_N=scale_n,
        SCALE_K=scale_k,
        BLOCK_N=DEQUANTISED_ROWS,
        BLOCK_K=step,
    )
    return out
