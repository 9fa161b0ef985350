"""Routing on the device: router logits to top-k choices and their weights, and on to rows sorted by expert.

Two steps. Choose: a program takes a block of tokens and writes their choices and weights, each route's rank among the
routes of its expert in the block, and how many each expert has. Place (`placing.py`) gives each route its row. Few
tokens are one block, and one launch does both; more take two launches. No atomics, no host reads: the order is the
reference's, to the bit, on every run.

Choose holds a step of tokens as (lanes, tokens, chunks of experts), the first axis over the lanes of a warp and the
second over warps: the best expert of a token is then a reduction within one warp. Triton lays axes out by how
contiguous addresses are, so `max_contiguous` claims a little more for each axis before the next; as no address is known
to be aligned, that orders the axes and makes no vectors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_gpu.config import RouterConfig
from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.placing import (
    MAX_BLOCKS,
    PLACED_AT_ONCE,
    SINGLE_LAUNCH_ROUTES,
    new_rows,
    place,
    place_block,
)
from moe_gpu.triton_kernels.tuning import cdiv, next_power_of_2

SINGLE_LAUNCH_TOKENS = 64
SINGLE_LAUNCH_LOGITS = 64 * 256
# Beyond, programs that wait for the launch before them hold the SMs that it still needs: an H200 takes 30 us with
# dependent launch and 16 without for 4096 tokens, 128 experts, but 9.6 and 10.5 for 1024 (printed, not recorded).
PDL_MAX_TOKENS = 2048

_LOWEST = tl.constexpr(-(2**31))  # below the key of every float
_INFINITY = tl.constexpr(0x7F800000)
_NOT_A_NUMBER = tl.constexpr(0x7FC00000)
_MINUS_INFINITY = tl.constexpr(-0x7F800001)
_FREE_BITS = tl.constexpr(0x1FFF)  # zero in every float32 that was a float16 or a bfloat16


@triton.jit
def _flip(bits):
    """Between the bits of float32 and int32 in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(x):
    """int32 in the order of float32 x: -0.0 ties with 0.0, NaN comes above infinity, nothing is _LOWEST."""
    key = _flip(tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True))
    return tl.where(x != x, _NOT_A_NUMBER, key)


@triton.jit
def _float(key):
    return _flip(key).to(tl.float32, bitcast=True)


@triton.jit
def _row_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _row_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _keep_best_groups(key, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """Keys, _LOWEST outside the TOPK_GROUP groups whose two best experts sum highest; a chunk is a group."""
    lane = tl.arange(0, LANES)[:, None, None]
    group = tl.arange(0, CHUNKS)[None, :]
    best = tl.max(key, 0)
    at = tl.min(tl.where(key == best[None, :, :], lane, LANES), 0)
    second = tl.max(tl.where(lane == at[None, :, :], _LOWEST, key), 0)
    score = tl.where(group < N_GROUP, _key(_float(best) + _float(second)), _LOWEST)
    for _ in range(TOPK_GROUP):
        highest = tl.max(score, 1)
        chosen = tl.min(tl.where(score == highest[:, None], group, CHUNKS), 1)
        score = tl.where(group == chosen[:, None], _LOWEST, score)
    return tl.where((score == _LOWEST)[None, :, :], key, _LOWEST)


@triton.jit
def _choose(
    x,
    bias,
    exists,
    scale,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIQUE: tl.constexpr,
):
    """Slot and weight of each expert, which are chosen (the others' mean nothing), and which tokens have no choice."""
    lane = tl.arange(0, LANES)[:, None]
    chunk_first = tl.arange(0, CHUNKS)[None, None, :] * CHUNK
    key = _key(x)
    if UNIQUE:
        key = (key & ~_FREE_BITS) | (_FREE_BITS - chunk_first - lane[:, :, None])
    key = tl.where(exists, key, _LOWEST)
    top = _row_max(key)
    if SIGMOID:
        bad = top >= _NOT_A_NUMBER
        scores = 1 / (1 + tl.exp(-x))
    else:
        bad = (top >= _INFINITY) | (top <= _MINUS_INFINITY)
        scores = tl.exp(x - _row_max(x)[None, :, None])
        scores = scores / _row_sum(scores)[None, :, None]
    # Without a bias and groups the order of the scores is that of the logits, and the logits carry no rounding.
    if HAS_BIAS or N_GROUP > 1:
        key = tl.where(exists, _key((x if BY_LOGIT else scores) + bias), _LOWEST)
    if N_GROUP > 1:
        key = _keep_best_groups(key, N_GROUP, TOPK_GROUP, CHUNKS, LANES)
    FIRST: tl.constexpr = _LOWEST + 1  # the key of slot 0: below all floats, as those of the other slots
    PAST: tl.constexpr = 2**30
    for slot in range(TOP_K):
        best = _row_max(key)
        if UNIQUE:
            taken = key == best[None, :, None]
        else:
            # An expert is a lane plus its chunk's first, which is a constant in every thread.
            at = tl.min(tl.where(key == best[None, :, None], chunk_first, PAST), 2)
            at = tl.min(at + lane, 0)
            taken = at[None, :, None] - lane[:, :, None] == chunk_first
            if LANES != CHUNK:  # a chunk's padding numbers the next one's experts again
                taken = taken & (lane < CHUNK)[:, :, None]
        key = tl.where(taken, FIRST + slot, key)
    chosen = (key >= FIRST) & (key < FIRST + TOP_K)
    if OVER_CHOSEN:
        high = _row_max(tl.where(chosen, x, float("-inf")))
        weights = tl.where(chosen, tl.exp(x - high[None, :, None]), 0.0)
        weights = weights / _row_sum(weights)[None, :, None]
    elif NORM:
        weights = scores / (_row_sum(tl.where(chosen, scores, 0.0))[None, :, None] + 1e-20)
    else:
        weights = scores
    return key - FIRST, chosen, tl.where(bad[None, :, None], 0.0, weights * scale), bad


@triton.jit
def _choose_block(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    rank_ptr,
    counts_ptr,
    first,
    end,
    E,
    scale,
    stride_t,
    stride_e,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIQUE: tl.constexpr,
):
    """Tokens [first, end): choices, weights, ranks in the block, and the block's counts; ROWS tokens a step."""
    lane = tl.arange(0, LANES)[:, None, None]
    e = tl.arange(0, CHUNKS)[None, None, :] * CHUNK + lane
    exists = (lane < CHUNK) & (e < E)
    # What lies contiguously is addressed in two axes, lest its vectors shape the layout of the three.
    lane_of = tl.arange(0, LANES)[:, None]
    expert_of = tl.arange(0, CHUNKS)[None, :] * CHUNK + lane_of
    exists_of = (lane_of < CHUNK) & (expert_of < E)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert_of, mask=exists_of, other=0.0)[:, None, :]
    first_route = first.to(tl.int64) * TOP_K
    counts = tl.zeros((LANES, CHUNKS), tl.int32)
    num_bad = tl.zeros((LANES, CHUNKS), tl.int32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[None, :, None]
        # The stride between experts is never a constant 1, which would give a lane a vector: see the module.
        address = logits_ptr + row.to(tl.int64)[None, :, None] * stride_t + e * stride_e
        address = tl.max_contiguous(address, (4, 2, 1))
        x = tl.load(address, mask=exists & inside, other=float("-inf")).to(tl.float32)
        slot, chosen, weights, bad = _choose(
            x,
            bias,
            exists,
            scale,
            TOP_K,
            N_GROUP,
            TOPK_GROUP,
            CHUNK,
            CHUNKS,
            LANES,
            SIGMOID,
            BY_LOGIT,
            OVER_CHOSEN,
            NORM,
            HAS_BIAS,
            UNIQUE,
        )
        bad = bad[None, :, None]
        chosen = chosen & inside
        route = (row - first)[None, :, None] * TOP_K + slot
        tl.store(tl.max_contiguous(weights_ptr + first_route + route, (4, 2, 1)), weights, mask=chosen)
        tl.store(tl.max_contiguous(ids_ptr + first_route + route, (4, 2, 1)), tl.where(bad, -1, e), mask=chosen)
        # One scan counts both: an expert's tokens in the low half, tokens without a choice in the high one.
        mine = (chosen & ~bad).to(tl.int32) + ((bad & inside).to(tl.int32) << 16)
        before = tl.cumsum(mine, 1) - mine
        rank = counts[:, None, :] + (before & 0xFFFF)
        bad_rank = (num_bad[:, None, :] + (before >> 16)) * TOP_K + slot
        rank_ptrs = tl.max_contiguous(rank_ptr + first_route + route, (4, 2, 1))
        tl.store(rank_ptrs, tl.where(bad, bad_rank, rank), mask=chosen)
        total = tl.sum(mine, 1)
        counts += total & 0xFFFF
        num_bad += total >> 16
    tl.store(counts_ptr + expert_of, counts, mask=exists_of)


@triton.jit(do_not_specialize=["T", "block_tokens", "capacity", "stride_e"])
def _choose_kernel(
    logits_ptr,  # (T, E) any float of any strides
    bias_ptr,  # (E,) float32; unused unless HAS_BIAS
    ids_ptr,  # (T, K) int32
    weights_ptr,  # (T, K) float32
    counts_ptr,  # (blocks, E) int32: routes of each expert in each block of tokens
    row_of_route_ptr,  # (T, K) int32: each route's rank among those of its expert in the block; its row if SINGLE
    demand_ptr,  # (P,) int32: written if SINGLE, as the two below
    offsets_ptr,  # (P,) int32
    row_route_ptr,  # (R,) int32
    T,
    E,
    block_tokens,
    capacity,
    scale,
    stride_t,
    stride_e,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROUTES: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIQUE: tl.constexpr,
    CAPPED: tl.constexpr,
    SINGLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program block_tokens tokens; if SINGLE, one program all tokens, placing them too."""
    wait_for_previous(PDL)
    block = tl.program_id(0)
    first = block * block_tokens
    _choose_block(
        logits_ptr,
        bias_ptr,
        ids_ptr,
        weights_ptr,
        row_of_route_ptr,
        counts_ptr + block.to(tl.int64) * E,
        first,
        tl.minimum(first + block_tokens, T),
        E,
        scale,
        stride_t,
        stride_e,
        TOP_K,
        N_GROUP,
        TOPK_GROUP,
        ROWS,
        CHUNK,
        CHUNKS,
        LANES,
        SIGMOID,
        BY_LOGIT,
        OVER_CHOSEN,
        NORM,
        HAS_BIAS,
        UNIQUE,
    )
    if SINGLE:
        tl.debug_barrier()  # placing reads what other threads wrote
        e = tl.arange(0, BLOCK_E)
        counts = tl.load(counts_ptr + e, mask=e < E, other=0)
        place_block(
            ids_ptr,
            row_route_ptr,
            row_of_route_ptr,
            demand_ptr,
            offsets_ptr,
            counts,
            tl.zeros_like(counts),
            block,
            first,
            T * TOP_K,
            T * TOP_K,
            E,
            capacity,
            CAPPED,
            BLOCK_E,
            ROUTES,
        )


@dataclass(frozen=True)
class _Blocks:
    """How the tokens of one problem are divided: `count` programs of `tokens` tokens, `rows` of them a step."""

    count: int
    tokens: int
    rows: int
    chunk: int
    chunks: int
    lanes: int
    experts: int
    routes: int

    @property
    def single(self) -> bool:
        return self.count == 1

    @property
    def num_warps(self) -> int:
        """8 logits a thread, up to 16 warps; one warp a token, unless it would hold more than 16 logits a thread."""
        return max(1, min(16, self.rows * cdiv(self.chunks, 16), self.rows * self.chunks * self.lanes // 256))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def choose(cls, num_tokens: int, num_experts: int, top_k: int, n_group: int) -> _Blocks:
        block_e = next_power_of_2(num_experts)
        chunk = num_experts // n_group if n_group > 1 else min(32, block_e)
        chunks, lanes = next_power_of_2(cdiv(num_experts, chunk)), next_power_of_2(chunk)
        single = num_tokens * top_k <= SINGLE_LAUNCH_ROUTES and num_tokens * num_experts <= SINGLE_LAUNCH_LOGITS
        tokens = num_tokens if single else max(16, cdiv(num_tokens, MAX_BLOCKS))
        # 8 logits a thread of the most warps there are: their keys and scores stay in registers.
        rows = max(1, min(64, 4096 // (chunks * lanes), next_power_of_2(tokens)))
        tokens = cdiv(tokens, rows) * rows
        routes = min(PLACED_AT_ONCE, next_power_of_2(tokens * top_k))
        return cls(cdiv(num_tokens, tokens), tokens, rows, chunk, chunks, lanes, block_e, routes)


def _has_unique_keys(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, router: RouterConfig) -> bool:
    """Whether the order of a token's logits and of the ids that break its ties fit one int32."""
    if bias_E is not None or router.n_group > 1:
        return False
    return logits_TE.dtype in (torch.float16, torch.bfloat16) and logits_TE.shape[1] <= _FREE_BITS.value


def router_flags(router: RouterConfig) -> dict[str, bool]:
    softmax = router.score_function == "softmax"
    return {
        "SIGMOID": not softmax,
        # Softmax over all, renormalised over the chosen, is softmax over the chosen logits.
        "OVER_CHOSEN": softmax and (router.softmax_after_topk or router.norm_topk_prob),
        "NORM": router.norm_topk_prob,
    }


def route_forward(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, router: RouterConfig, capacity: int | None
) -> tuple[torch.Tensor, ...]:
    """(topk_ids_TK, topk_weights_TK, demand_P, offsets_P, row_route_R, row_of_route_TK) of logits of any float."""
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    rows = new_rows(ids_TK, num_experts)
    if num_tokens == 0:
        return ids_TK, weights_TK, *rows
    if bias_E is not None:
        bias_E = bias_E.to(torch.float32).contiguous()
    blocks = _Blocks.choose(num_tokens, num_experts, top_k, router.n_group)
    counts = torch.empty(blocks.count, num_experts, dtype=torch.int32, device=device)
    num_routes = num_tokens * top_k
    limit = num_routes if capacity is None else min(capacity, num_routes)
    pdl = pdl_options(device, pays=num_tokens <= PDL_MAX_TOKENS)
    launch(
        _choose_kernel,
        (blocks.count,),
        logits_TE,
        bias_E,
        ids_TK,
        weights_TK,
        counts,
        rows.row_of_route_TK,
        rows.demand_P,
        rows.offsets_P,
        rows.row_route_R,
        num_tokens,
        num_experts,
        blocks.tokens,
        limit,
        float(router.routed_scaling_factor),
        *logits_TE.stride(),
        TOP_K=top_k,
        N_GROUP=router.n_group,
        TOPK_GROUP=router.topk_group,
        ROWS=blocks.rows,
        CHUNK=blocks.chunk,
        CHUNKS=blocks.chunks,
        LANES=blocks.lanes,
        BLOCK_E=blocks.experts,
        ROUTES=blocks.routes,
        BY_LOGIT=router.softmax_after_topk,
        HAS_BIAS=bias_E is not None,
        UNIQUE=_has_unique_keys(logits_TE, bias_E, router),
        CAPPED=limit < num_routes,
        SINGLE=blocks.single,
        num_warps=blocks.num_warps,
        **router_flags(router),
        **pdl,
    )
    if not blocks.single:
        place(ids_TK, counts, rows, blocks.tokens * top_k, limit, blocks.routes, pdl)
    return ids_TK, weights_TK, *rows
