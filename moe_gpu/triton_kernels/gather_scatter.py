"""Rows to experts and back: permute, weighted combine, sums per expert, and their gradients; float32, fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.tuning import cdiv, next_power_of_2


@triton.jit
def _combine_kernel(
    y_ptr,  # (SPLITS, R, O)
    row_of_route_ptr,  # (T, K) int32, negative where dropped
    weight_ptr,  # (T, K) float32; unused unless WEIGHTED
    out_ptr,  # (T, O)
    O,  # noqa: E741
    split_stride,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program one token and BLOCK_O columns: the weighted sum over its routes and their splits, k ascending.

    All BLOCK_J rows are on their way at once; a thread sums its own columns, so that the order is that of the rows.
    """
    wait_for_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for first in range(0, TOP_K * SPLITS, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        route = t * TOP_K + j // SPLITS
        row = tl.load(row_of_route_ptr + route, mask=j < TOP_K * SPLITS, other=-1).to(tl.int64)
        address = y_ptr + ((j % SPLITS).to(tl.int64) * split_stride + row * O)[:, None] + o[None, :]
        y = tl.load(address, mask=(row >= 0)[:, None] & (o < O)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + route, mask=row >= 0, other=0.0)
            y = tl.where((row >= 0)[:, None], y * weight[:, None], 0.0)
        total += tl.sum(y, 0)
    tl.store(out_ptr + t * O + o, total.to(out_ptr.dtype.element_ty), mask=o < O)


@triton.jit
def _permute_kernel(
    x_ptr,  # (T, H)
    route_ptr,  # (R,) int32
    weight_ptr,  # (T, K) float32; unused unless WEIGHTED
    used_ptr,  # () int32: rows in use
    out_ptr,  # (R, H)
    H,
    x_stride,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program one row and BLOCK_H columns: its token's row, or zeros past the rows in use."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    route = tl.load(route_ptr + row)
    used = row < tl.load(used_ptr)
    x = tl.load(x_ptr + (route // TOP_K).to(tl.int64) * x_stride + h, mask=(h < H) & used, other=0.0)
    if WEIGHTED:
        x = x.to(tl.float32) * tl.load(weight_ptr + route)
        x = tl.where(used, x, 0.0)
    tl.store(out_ptr + row * H + h, x.to(out_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def _weight_grad_kernel(
    partial_ptr,  # (R, TILES) float32
    row_of_route_ptr,  # (T, K) int32
    ids_ptr,  # (T, K) int32; unused unless HAS_BIAS
    grad_out_ptr,  # (T, O); unused unless HAS_BIAS
    bias_ptr,  # (E, O); unused unless HAS_BIAS
    grad_weight_ptr,  # (T, K) float32
    num_routes,
    O,  # noqa: E741
    grad_stride,
    TOP_K: tl.constexpr,
    TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program BLOCK routes: the sum of the row's partials, and <gradient, bias of its expert>."""
    route = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_route_ptr + route, mask=route < num_routes, other=-1)
    kept = row >= 0
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        total += tl.load(partial_ptr + row.to(tl.int64) * TILES + tile, mask=kept, other=0.0)
    if HAS_BIAS:
        expert = tl.load(ids_ptr + route, mask=kept, other=0).to(tl.int64)
        token = (route // TOP_K).to(tl.int64)
        for start in range(0, O, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            inside = kept[:, None] & (o < O)[None, :]
            grad = tl.load(grad_out_ptr + token[:, None] * grad_stride + o[None, :], mask=inside, other=0.0)
            bias = tl.load(bias_ptr + expert[:, None] * O + o[None, :], mask=inside, other=0.0)
            total += tl.sum(grad.to(tl.float32) * bias.to(tl.float32), 1)
    tl.store(grad_weight_ptr + route, total, mask=route < num_routes)


@triton.jit
def _route_dot_kernel(
    y_ptr,  # (R, O)
    grad_out_ptr,  # (T, O)
    row_of_route_ptr,  # (T, K) int32
    dot_ptr,  # (T, K) float32
    O,  # noqa: E741
    grad_stride,
    TOP_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program one route: <gradient of its token, its row>; 0 where dropped."""
    route = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_route_ptr + route).to(tl.int64)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, O, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        inside = (o < O) & (row >= 0)
        grad = tl.load(grad_out_ptr + route // TOP_K * grad_stride + o, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(y_ptr + row * O + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(dot_ptr + route, tl.sum(total, 0))


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


def _block(columns: int, num_rows: int = 1 << 30) -> int:
    """Columns a program: up to 1024, fewer while the rows alone do not give every SM a program."""
    block = min(1024, max(16, next_power_of_2(columns)))
    while block > 128 and num_rows * cdiv(columns, block) < 256:
        block //= 2
    return block


def _combine_block(columns: int, num_tokens: int, vector: int) -> int:
    """Columns a program: whole warps of 16-byte loads, up to 4; one warp while tokens alone do not fill the GPU."""
    warp = 32 * vector
    block = min(4 * warp, max(warp, next_power_of_2(columns)))
    while block > warp and num_tokens * cdiv(columns, block) < 1024:
        block //= 2
    return block


def combine_forward(
    y: torch.Tensor, row_of_route_TK: torch.Tensor, weight_TK: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """(T, O): each token's rows of y, weighted if weights are given; y is (R, O), or (S, R, O) with S partial sums."""
    y = y.contiguous()
    splits = y.shape[0] if y.dim() == 3 else 1
    num_rows, columns = y.shape[-2:]
    num_tokens, top_k = row_of_route_TK.shape
    out = torch.empty(num_tokens, columns, dtype=dtype, device=y.device)
    if num_tokens == 0:
        return out
    vector = 16 // y.element_size()
    parts = min(16, next_power_of_2(top_k * splits))
    block = _combine_block(columns, num_tokens, vector)
    launch(
        _combine_kernel,
        (num_tokens, cdiv(columns, block)),
        y,
        row_of_route_TK,
        None if weight_TK is None else weight_TK.contiguous(),
        out,
        columns,
        num_rows * columns,
        TOP_K=top_k,
        SPLITS=splits,
        WEIGHTED=weight_TK is not None,
        BLOCK_O=block,
        BLOCK_J=parts,
        num_warps=max(1, block // (32 * vector)),
        **pdl_options(y.device),
    )
    return out


def permute_forward(
    x_TH: torch.Tensor,
    row_route_R: torch.Tensor,
    offsets_P: torch.Tensor,
    top_k: int,
    weight_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """(R, H): each row's token of x, weighted if weights are given; zero in the rows that no expert computes."""
    if x_TH.stride(-1) != 1:
        x_TH = x_TH.contiguous()
    num_rows, columns = row_route_R.shape[0], x_TH.shape[1]
    out = torch.empty(num_rows, columns, dtype=x_TH.dtype, device=x_TH.device)
    if num_rows == 0:
        return out
    block = _block(columns)
    launch(
        _permute_kernel,
        (num_rows, cdiv(columns, block)),
        x_TH,
        row_route_R,
        None if weight_TK is None else weight_TK.contiguous(),
        offsets_P[-1:],
        out,
        columns,
        x_TH.stride(0),
        TOP_K=top_k,
        WEIGHTED=weight_TK is not None,
        BLOCK_H=block,
        num_warps=4,
        **pdl_options(x_TH.device),
    )
    return out


def weight_gradient(
    partials: torch.Tensor,
    row_of_route_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    grad_out_TO: torch.Tensor,
    down_bias_EO: torch.Tensor | None,
) -> torch.Tensor:
    """(T, K) float32 gradient of the routing weights from the partial sums of `grouped_gemm_grad_act`."""
    grad = torch.empty(row_of_route_TK.shape, dtype=torch.float32, device=partials.device)
    num_routes, columns = row_of_route_TK.numel(), grad_out_TO.shape[1]
    if num_routes == 0:
        return grad
    if grad_out_TO.stride(-1) != 1:
        grad_out_TO = grad_out_TO.contiguous()
    launch(
        _weight_grad_kernel,
        (cdiv(num_routes, 64),),
        partials,
        row_of_route_TK,
        ids_TK,
        grad_out_TO,
        None if down_bias_EO is None else down_bias_EO.contiguous(),
        grad,
        num_routes,
        columns,
        grad_out_TO.stride(0),
        TOP_K=row_of_route_TK.shape[1],
        TILES=partials.shape[1],
        HAS_BIAS=down_bias_EO is not None,
        BLOCK=64,
        BLOCK_O=64,
        num_warps=4,
    )
    return grad


def route_dot(y_RO: torch.Tensor, grad_out_TO: torch.Tensor, row_of_route_TK: torch.Tensor) -> torch.Tensor:
    """(T, K) float32: <gradient of the token, row of the route>, the gradient of combine's weights."""
    y_RO = y_RO.contiguous()
    if grad_out_TO.stride(-1) != 1:
        grad_out_TO = grad_out_TO.contiguous()
    out = torch.empty(row_of_route_TK.shape, dtype=torch.float32, device=y_RO.device)
    if out.numel():
        launch(
            _route_dot_kernel,
            (out.numel(),),
            y_RO,
            grad_out_TO,
            row_of_route_TK,
            out,
            y_RO.shape[1],
            grad_out_TO.stride(0),
            TOP_K=row_of_route_TK.shape[1],
            BLOCK_O=_block(y_RO.shape[1]),
            num_warps=4,
        )
    return out


def grad_bias(
    d: torch.Tensor,
    bias_EN: torch.Tensor,
    offsets_P: torch.Tensor,
    *,
    route_R: torch.Tensor | None = None,
    route_weight_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of a bias, (E, N): the sum of each expert's rows of d, gathered and weighted by route if given."""
    if d.stride(-1) != 1:
        d = d.contiguous()
    num_experts, columns = bias_EN.shape
    out = torch.empty(num_experts, columns, dtype=bias_EN.dtype, device=bias_EN.device)
    block_n = 64
    launch(
        _grad_bias_kernel,
        (num_experts, cdiv(columns, block_n)),
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
