"""Sums over k of a tile, for every grouped product on plain Triton; weights as they are, or FP8 with scales."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_gpu.triton_kernels.fp8 import as_dtype_of, load_scales


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
def _accumulate_range(
    a_ptrs,
    b_ptrs,
    b2_ptrs,
    n_inside,
    b_step,
    first,
    last,
    K,
    acc,
    acc2,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    s_rows=None,
    s2_rows=None,
    SCALE_K: tl.constexpr = 0,
):
    """acc += A B (and acc2 += A B2) over k from first to last; the pointers stand at `first`.

    Of FP8 weights each step's sums are multiplied by their scales, which are loaded a step ahead: nothing else hides
    how long that takes.
    """
    k = tl.arange(0, BLOCK_K)
    if SCALE_K > 0:
        scale = load_scales(s_rows, first, K, SCALE_K)
        if TWO:
            scale2 = load_scales(s2_rows, first, K, SCALE_K)
    for start in range(first, last, BLOCK_K):
        if SCALE_K > 0:
            next_scale = load_scales(s_rows, start + BLOCK_K, K, SCALE_K)
            if TWO:
                next_scale2 = load_scales(s2_rows, start + BLOCK_K, K, SCALE_K)
        a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=(k < K - start)[None, :], other=0.0)
        b = _load_weights(b_ptrs, K - start, n_inside, BLOCK_K, EVEN_K, BY_COLUMN)
        if SCALE_K > 0:
            acc += tl.dot(a, as_dtype_of(a, b)) * scale[None, :]
            scale = next_scale
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if TWO:
            b2 = _load_weights(b2_ptrs, K - start, n_inside, BLOCK_K, EVEN_K, BY_COLUMN)
            if SCALE_K > 0:
                acc2 += tl.dot(a, as_dtype_of(a, b2)) * scale2[None, :]
                scale2 = next_scale2
            else:
                acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
            b2_ptrs += b_step
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    return acc, acc2


@triton.jit
def accumulate(
    a_ptrs,
    b_ptrs,
    b2_ptrs,
    n_inside,
    b_step,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    s_rows=None,
    s2_rows=None,
    SCALE_K: tl.constexpr = 0,
):
    """A B, and A B2 if TWO: pointers to the first (BLOCK_M, BLOCK_K) and (BLOCK_K, BLOCK_N) tiles.

    s_rows, s2_rows: of FP8 weights, where the scales of B's and of B2's columns begin (`fp8.scale_rows`).
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = acc
    if a_ptrs.dtype.element_ty == tl.float32:
        # One long chain of float32 additions would lose more than PyTorch does: sum in two levels.
        CHAIN: tl.constexpr = 4 * BLOCK_K
        for first in range(0, K, CHAIN):
            last = tl.minimum(first + CHAIN, K)
            at = first // BLOCK_K
            zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            part, part2 = _accumulate_range(
                a_ptrs + first,
                b_ptrs + at * b_step,
                b2_ptrs + at * b_step,
                n_inside,
                b_step,
                first,
                last,
                K,
                zero,
                zero,
                BLOCK_K,
                EVEN_K,
                BY_COLUMN,
                TWO,
                PRECISION,
            )
            acc += part
            acc2 += part2
        return acc, acc2
    else:
        return _accumulate_range(
            a_ptrs, b_ptrs, b2_ptrs, n_inside, b_step, 0, K, K, acc, acc2, BLOCK_K, EVEN_K, BY_COLUMN, TWO, PRECISION,
            s_rows, s2_rows, SCALE_K,
        )  # fmt: skip
