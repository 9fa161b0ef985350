"""Routing on the device: softmax or sigmoid, top-k and per-expert counts in one launch; then a stable order of rows.

A few tokens (up to 64, fewer with many experts) take one launch of one program. More take three: choose and count per
block of tokens; an exclusive prefix of the counts over blocks, per expert; place each route. No atomics, no host reads:
the order is the reference's, to the bit, on every run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_gpu.config import RouterConfig
from moe_gpu.triton_kernels.tuning import cdiv, next_power_of_2

ROUTES_PER_BLOCK = 256
SINGLE_LAUNCH_TOKENS = 64
SINGLE_LAUNCH_ROUTES = 512
SINGLE_LAUNCH_LOGITS = 4096


@triton.jit
def _ordered_key(x, e, BLOCK_E: tl.constexpr):
    """int64 whose order is the order of x, the lower expert first among equals; never the smallest int64."""
    x = tl.where(x == 0, 0.0, x)  # -0.0 ties with 0.0
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key.to(tl.int64) * BLOCK_E + (BLOCK_E - 1 - e)


@triton.jit
def _group_mask(scores, e, E, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether each expert's group is among the TOPK_GROUP groups whose two best experts sum highest."""
    group_size = E // N_GROUP
    group_of = e // group_size
    NEG: tl.constexpr = float("-inf")
    BLOCK_G: tl.constexpr = triton.next_power_of_2(N_GROUP)
    g = tl.arange(0, BLOCK_G)[None, :]
    group_scores = tl.full((BLOCK_T, BLOCK_G), NEG, tl.float32)
    for group in range(N_GROUP):
        own = tl.where((group_of == group) & (e < E), scores, NEG)
        best, at = tl.max(own, 1, return_indices=True)
        second = tl.max(tl.where(e == at[:, None], NEG, own), 1)
        group_scores = tl.where(g == group, (best + second)[:, None], group_scores)
    LOWEST: tl.constexpr = -(2**63)
    keys = tl.where(g < N_GROUP, _ordered_key(group_scores, g, BLOCK_G), LOWEST)
    chosen = (e + tl.zeros((BLOCK_T, 1), tl.int32)) < 0
    for _ in range(TOPK_GROUP):
        best = tl.max(keys, 1)
        keys = tl.where(keys == best[:, None], LOWEST, keys)
        chosen = chosen | (group_of == (BLOCK_G - 1 - (best & (BLOCK_G - 1)))[:, None])
    return chosen


@triton.jit
def _choose(
    x,
    bias,
    e,
    E,
    scale,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Expert ids and weights (BLOCK_T, BLOCK_K) of float32 logits x (BLOCK_T, BLOCK_E), -inf past E."""
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-x))
        bad = tl.max((x != x).to(tl.int32), 1) > 0
    else:
        exps = tl.exp(x - tl.max(x, 1)[:, None])
        scores = exps / tl.sum(exps, 1)[:, None]
        bad = tl.max((scores != scores).to(tl.int32), 1) > 0
    # Without a bias and groups the order of the scores is that of the logits, and the logits carry no rounding.
    choice = x
    if HAS_BIAS or N_GROUP > 1:
        choice = (x if BY_LOGIT else scores) + bias
    choice = tl.where(choice != choice, 0.0, choice)
    LOWEST: tl.constexpr = -(2**63)
    keys = tl.where(e < E, _ordered_key(choice, e, BLOCK_E), LOWEST)
    if N_GROUP > 1:
        keys = tl.where(_group_mask(choice, e, E, N_GROUP, TOPK_GROUP, BLOCK_T), keys, LOWEST)

    k = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.full((BLOCK_T, BLOCK_K), -1, tl.int32)
    values = tl.full((BLOCK_T, BLOCK_K), float("-inf") if OVER_CHOSEN else 0.0, tl.float32)
    source = x if OVER_CHOSEN else scores
    for slot in range(TOP_K):
        best = tl.max(keys, 1)
        chosen = (BLOCK_E - 1 - (best & (BLOCK_E - 1))).to(tl.int32)
        at = e == chosen[:, None]
        keys = tl.where(at, LOWEST, keys)
        value = tl.sum(tl.where(at, source, 0.0), 1)
        ids = tl.where(k == slot, chosen[:, None], ids)
        values = tl.where(k == slot, value[:, None], values)
    if OVER_CHOSEN:
        weights = tl.exp(values - tl.max(values, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
    elif NORM:
        weights = values / (tl.sum(values, 1)[:, None] + 1e-20)
    else:
        weights = values
    ids = tl.where(bad[:, None], -1, ids)
    return ids, tl.where(bad[:, None], 0.0, weights * scale)


@triton.jit
def _place(
    ids_ptr,  # (T, K) int32
    row_route_ptr,  # (R,) int32
    row_of_route_ptr,  # (T, K) int32
    offsets_ptr,  # (P,) int32
    demand,  # (BLOCK_P,) int32 routes of each bin, over all tokens
    before,  # (BLOCK_P,) int32 routes of each bin in the blocks before this one
    first_route,
    end_route,
    E,
    capacity,
    WRITE_OFFSETS: tl.constexpr,
    ROUTES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Give each route of one block its row: its expert's offset, plus the routes of that expert before it."""
    CHUNK: tl.constexpr = 16
    p = tl.arange(0, BLOCK_P)
    kept = tl.where(p < E, tl.minimum(demand, capacity), 0)
    overflow = tl.where(p <= E, demand - kept, 0)
    offsets = tl.cumsum(kept, 0) - kept
    overflow_first = tl.sum(kept, 0) + tl.cumsum(overflow, 0) - overflow
    if WRITE_OFFSETS:
        tl.store(offsets_ptr + p, offsets, mask=p <= E)
    i = first_route + tl.arange(0, ROUTES)
    own = i < end_route
    ids = tl.load(ids_ptr + i, mask=own, other=-1)
    bins = tl.where((ids >= 0) & (ids < E), ids, E)
    rank = tl.gather(before, bins, 0)
    for start in range(first_route, end_route, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(ids_ptr + j, mask=j < end_route, other=-1)
        other = tl.where((other >= 0) & (other < E), other, E)
        earlier = (bins[:, None] == other[None, :]) & (j[None, :] < i[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    fits = (bins < E) & (rank < capacity)
    excess = rank - tl.where(bins < E, capacity, 0)
    row = tl.where(fits, tl.gather(offsets, bins, 0) + rank, tl.gather(overflow_first, bins, 0) + excess)
    tl.store(row_route_ptr + row, i, mask=own)
    tl.store(row_of_route_ptr + i, tl.where(fits, row, -1), mask=own)


@triton.jit(do_not_specialize=["T", "capacity"])
def _route_kernel(
    logits_ptr,  # (T, E) any float; unused unless HAS_LOGITS
    bias_ptr,  # (E,) float32; unused unless HAS_BIAS
    ids_ptr,  # (T, K) int32: written if HAS_LOGITS, else read
    weights_ptr,  # (T, K) float32: written if HAS_LOGITS
    block_counts_ptr,  # (blocks, BLOCK_P) int32: written unless SINGLE
    demand_ptr,  # (P,) int32: written if SINGLE, as the three below
    offsets_ptr,  # (P,) int32
    row_route_ptr,  # (R,) int32
    row_of_route_ptr,  # (T, K) int32
    T,
    E,
    capacity,
    scale,
    logits_stride,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROUTES: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """One program a block of BLOCK_T tokens: choices, weights and the block's count of each expert."""
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)[None, :]
    slots = t.to(tl.int64)[:, None] * TOP_K + k
    used = (t < T)[:, None] & (k < TOP_K)
    if HAS_LOGITS:
        e = tl.arange(0, BLOCK_E)[None, :]
        inside = (t < T)[:, None] & (e < E)
        address = logits_ptr + t.to(tl.int64)[:, None] * logits_stride + e
        x = tl.load(address, mask=inside, other=float("-inf")).to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)
        ids, weights = _choose(
            x,
            bias,
            e,
            E,
            scale,
            TOP_K,
            BLOCK_K,
            BLOCK_T,
            BLOCK_E,
            N_GROUP,
            TOPK_GROUP,
            SIGMOID,
            BY_LOGIT,
            OVER_CHOSEN,
            NORM,
            HAS_BIAS,
        )
        tl.store(ids_ptr + slots, ids, mask=used)
        tl.store(weights_ptr + slots, weights, mask=used)
    else:
        ids = tl.load(ids_ptr + slots, mask=used, other=-1)
    bins = tl.where((ids >= 0) & (ids < E), ids, E)
    bins = tl.where(used, bins, E + 1)
    counts = tl.histogram(tl.reshape(bins, (BLOCK_T * BLOCK_K,)), BLOCK_P)
    p = tl.arange(0, BLOCK_P)
    if SINGLE:
        tl.store(demand_ptr + p, counts, mask=p <= E)
        tl.debug_barrier()  # `_place` reads other threads' ids
        _place(
            ids_ptr,
            row_route_ptr,
            row_of_route_ptr,
            offsets_ptr,
            counts,
            tl.zeros_like(counts),
            0,
            T * TOP_K,
            E,
            capacity,
            True,
            ROUTES,
            BLOCK_P,
        )
    else:
        tl.store(block_counts_ptr + block.to(tl.int64) * BLOCK_P + p, counts)


@triton.jit(do_not_specialize=["num_blocks"])
def _prefix_kernel(
    block_counts_ptr,  # (blocks, BLOCK_P) int32: counts in, exclusive prefix over blocks out
    demand_ptr,  # (P,) int32
    num_blocks,
    E,
    BLOCK_P: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program BINS bins: walks over all blocks."""
    p = tl.program_id(0) * BINS + tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        address = block_counts_ptr + block.to(tl.int64)[:, None] * BLOCK_P + p[None, :]
        inside = (block < num_blocks)[:, None] & (p < BLOCK_P)[None, :]
        counts = tl.load(address, mask=inside, other=0)
        tl.store(address, tl.cumsum(counts, 0) - counts + total[None, :], mask=inside)
        total += tl.sum(counts, 0)
    tl.store(demand_ptr + p, total, mask=p <= E)


@triton.jit(do_not_specialize=["num_routes", "capacity"])
def _place_kernel(
    ids_ptr,
    row_route_ptr,
    row_of_route_ptr,
    offsets_ptr,
    demand_ptr,
    block_counts_ptr,
    num_routes,
    E,
    capacity,
    BLOCK_ROUTES: tl.constexpr,
    ROUTES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program a block of BLOCK_ROUTES routes; program 0 also writes the offsets."""
    block = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)
    demand = tl.load(demand_ptr + p, mask=p <= E, other=0)
    before = tl.load(block_counts_ptr + block.to(tl.int64) * BLOCK_P + p)
    first = block * BLOCK_ROUTES
    end = tl.minimum(first + BLOCK_ROUTES, num_routes)
    if block == 0:
        _place(
            ids_ptr,
            row_route_ptr,
            row_of_route_ptr,
            offsets_ptr,
            demand,
            before,
            first,
            end,
            E,
            capacity,
            True,
            ROUTES,
            BLOCK_P,
        )
    else:
        _place(
            ids_ptr,
            row_route_ptr,
            row_of_route_ptr,
            offsets_ptr,
            demand,
            before,
            first,
            end,
            E,
            capacity,
            False,
            ROUTES,
            BLOCK_P,
        )


@dataclass(frozen=True)
class _Blocks:
    """Block sizes of the routing kernels for one problem."""

    tokens: int
    experts: int
    bins: int
    routes: int
    single: bool

    def num_warps(self, n_group: int) -> int:
        # 16 logits a thread: their 64-bit keys and the float32 scores stay in registers. Groups want more of those a
        # thread than eight warps leave.
        return max(1, min(8 if n_group == 1 else 4, self.tokens * self.experts // 512))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def choose(cls, num_tokens: int, num_experts: int, top_k: int) -> _Blocks:
        block_k = next_power_of_2(top_k)
        block_e = next_power_of_2(num_experts)
        single = num_tokens <= SINGLE_LAUNCH_TOKENS and num_tokens * block_k <= SINGLE_LAUNCH_ROUTES
        single = single and next_power_of_2(num_tokens) * block_e <= SINGLE_LAUNCH_LOGITS
        if single:
            tokens = max(1, next_power_of_2(num_tokens))
        else:
            tokens = max(1, min(ROUTES_PER_BLOCK // block_k, 4096 // block_e))
        # Two bins more than experts: one for invalid routes, one for the padding of the block itself.
        bins = next_power_of_2(num_experts + 2)
        return cls(tokens, block_e, bins, next_power_of_2(tokens * top_k), single)


def router_flags(router: RouterConfig) -> dict[str, bool]:
    softmax = router.score_function == "softmax"
    return {
        "SIGMOID": not softmax,
        # Softmax over all, renormalised over the chosen, is softmax over the chosen logits.
        "OVER_CHOSEN": softmax and (router.softmax_after_topk or router.norm_topk_prob),
        "NORM": router.norm_topk_prob,
    }


def _launch(
    logits_TE: torch.Tensor | None,
    bias_E: torch.Tensor | None,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    num_experts: int,
    router: RouterConfig,
    capacity: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, top_k = ids_TK.shape
    device = ids_TK.device
    num_routes = num_tokens * top_k
    demand_P = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    offsets_P = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    row_route_R = torch.empty(num_routes, dtype=torch.int32, device=device)
    row_of_route_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    if num_tokens == 0:
        return demand_P.zero_(), offsets_P.zero_(), row_route_R, row_of_route_TK
    blocks = _Blocks.choose(num_tokens, num_experts, top_k)
    num_blocks = cdiv(num_tokens, blocks.tokens)
    limit = num_routes if capacity is None else min(capacity, num_routes)
    # A single launch keeps its counts in registers and never touches this buffer.
    block_counts = torch.empty(0 if blocks.single else num_blocks, blocks.bins, dtype=torch.int32, device=device)
    _route_kernel[(num_blocks,)](
        logits_TE,
        bias_E,
        ids_TK,
        weights_TK,
        block_counts,
        demand_P,
        offsets_P,
        row_route_R,
        row_of_route_TK,
        num_tokens,
        num_experts,
        limit,
        float(router.routed_scaling_factor),
        0 if logits_TE is None else logits_TE.stride(0),
        TOP_K=top_k,
        BLOCK_K=next_power_of_2(top_k),
        BLOCK_T=blocks.tokens,
        BLOCK_E=blocks.experts,
        BLOCK_P=blocks.bins,
        ROUTES=blocks.routes,
        N_GROUP=router.n_group,
        TOPK_GROUP=router.topk_group,
        BY_LOGIT=router.softmax_after_topk,
        HAS_BIAS=bias_E is not None,
        HAS_LOGITS=logits_TE is not None,
        SINGLE=blocks.single,
        num_warps=blocks.num_warps(router.n_group),
        **router_flags(router),
    )
    if not blocks.single:
        bins_per_program = 16
        _prefix_kernel[(cdiv(blocks.bins, bins_per_program),)](
            block_counts, demand_P, num_blocks, num_experts, BLOCK_P=blocks.bins, BINS=bins_per_program, CHUNK=128
        )
        _place_kernel[(num_blocks,)](
            ids_TK,
            row_route_R,
            row_of_route_TK,
            offsets_P,
            demand_P,
            block_counts,
            num_routes,
            num_experts,
            limit,
            BLOCK_ROUTES=blocks.tokens * top_k,
            ROUTES=blocks.routes,
            BLOCK_P=blocks.bins,
            num_warps=4,
        )
    return demand_P, offsets_P, row_route_R, row_of_route_TK


def route_forward(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, router: RouterConfig, capacity: int | None
) -> tuple[torch.Tensor, ...]:
    """(topk_ids_TK, topk_weights_TK, demand_P, offsets_P, row_route_R, row_of_route_TK) of logits of any float."""
    num_tokens, num_experts = logits_TE.shape
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    if bias_E is not None:
        bias_E = bias_E.to(torch.float32).contiguous()
    return ids_TK, weights_TK, *_launch(logits_TE, bias_E, ids_TK, weights_TK, num_experts, router, capacity)


def sort_routes(
    topk_ids_TK: torch.Tensor, num_experts: int, capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(demand_P, offsets_P, row_route_R, row_of_route_TK) of int32 choices made elsewhere."""
    return _launch(None, None, topk_ids_TK.contiguous(), None, num_experts, RouterConfig(), capacity)
