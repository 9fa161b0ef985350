"""Experts for few rows each on Hopper, in Gluon: one launch that keeps memory busy from the first weight to the last.

Weights are the left side of the product, the rows of an expert the right one. The work is items: a few weight rows of
one row tile, over all of k; the up projection's of every tile, then the down projection's. Programs claim items from a
counter. In each, one warp brings weights by TMA, 512 bytes and more of every row at once, since DRAM reads neighbours
faster than strides; one warp brings rows, and waits for the intermediate of an item of the down projection, whose
weights are under way meanwhile; a warpgroup multiplies on wgmma. Whoever claims an item of the down projection knows
that all of the up projection is in the hands of programs that run, so waiting ends however many run at a time.

wgmma multiplies 64 rows. Items of fewer weight rows are folded: pieces of k lie one below the other, and each piece's
rows of activations have columns of their own; of the sums, piece by piece, those of its own columns count.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels.counters import Counters
from moe_gpu.triton_kernels.grouped_gemm import row_contiguous
from moe_gpu.triton_kernels.hopper_common import (
    accumulator_layout,
    activate,
    claimed_tile,
    copy_load,
    matrix,
    new_barriers,
    new_queue,
    piece_layout,
    tma_load,
)
from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.tuning import HopperDecodeConfig, cdiv, next_power_of_2

# Newer releases of Triton call it otherwise.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

BOX_K = gl.constexpr(64)  # 128 bytes, the widest that TMA swizzles
PANELS = gl.constexpr(4)  # boxes side by side in a stage
HEIGHT = gl.constexpr(64)  # what wgmma multiplies: weight rows times folds

_COUNTERS = Counters()


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _bounds(offsets_ptr, E, BLOCK_E: gl.constexpr):
    """Of each expert: its number, and where its rows begin and end."""
    e = gl.arange(0, BLOCK_E, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    start = gl.load(offsets_ptr + e, mask=e < E, other=0)
    return e, start, gl.load(offsets_ptr + e + 1, mask=e < E, other=0)


@gluon.jit
def _items(start, end, I, O, ROWS: gl.constexpr, HALVES: gl.constexpr, UP_FOLD: gl.constexpr, DOWN_FOLD: gl.constexpr):  # noqa: E741
    """Row tiles up to each expert's last one; items of a tile in the up and the down projection; all of up; of both."""
    ends = gl.associative_scan(gl.cdiv(end - start, ROWS), 0, _plus)
    ups = gl.cdiv(I, HEIGHT // UP_FOLD // HALVES)
    downs = gl.cdiv(O, HEIGHT // DOWN_FOLD)
    num_tiles = gl.max(ends, 0)
    return ends, ups, downs, num_tiles * ups, num_tiles * (ups + downs)


@gluon.jit
def _place(e, start, end, ends, item, each, ROWS: gl.constexpr):
    """Expert, row tile, number among the tile's `each` items, first row and end of the expert's rows, of an item.

    Of an expert with several tiles the same weights come one after the other, so that they are read once.
    """
    tiles = gl.cdiv(end - start, ROWS)
    mine = (ends * each > item) & ((ends - tiles) * each <= item)
    count = gl.max(gl.where(mine, tiles, 1), 0)
    before = gl.max(gl.where(mine, ends - tiles, 0), 0)
    within = item - before * each
    first = gl.max(gl.where(mine, start, 0), 0) + within % count * ROWS
    expert = gl.max(gl.where(mine, e, 0), 0)
    return expert, before + within % count, within // count, first, gl.max(gl.where(mine, end, 0), 0)


@gluon.jit
def _publish(item, claims_ptr, total, queue, published, taken, turn):
    """Tell the others what was claimed. Each program makes one claim past the last item; the last of those clears."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    gl.store(claims_ptr, 0, mask=item == total + gl.num_programs(0) - 1)
    mbarrier.wait(taken.index(turn % 2), ((turn // 2) & 1) ^ 1)
    queue.index(turn % 2).store(gl.full([1], item, gl.int32, layout=layout))
    mbarrier.arrive(published.index(turn % 2), count=1)


@gluon.jit
def _bring_weights(
    desc, row, N, K, w_ring, full, empty, step, STAGES: gl.constexpr, HALVES: gl.constexpr, FOLD: gl.constexpr
):
    """All of k of the weight rows from `row` on, and of those N after them if there are two halves."""
    SHARE: gl.constexpr = HEIGHT // FOLD // HALVES
    for depth in range(0, K, FOLD * PANELS * BOX_K):
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, HEIGHT * PANELS * BOX_K * 2)
        for half in gl.static_range(HALVES):
            for box in gl.static_range(FOLD * PANELS):
                place = w_ring.index(stage * PANELS + box % PANELS)
                place = place.slice((box // PANELS * HALVES + half) * SHARE, SHARE, dim=0)
                tma_load(desc, [row + half * N, depth + box * BOX_K], bar, place)
        step += 1
    return step


@gluon.jit
def _weights_producer(
    up_desc,
    down_desc,
    offsets_ptr,
    state_ptr,
    w_ring,
    full,
    empty,
    queue,
    published,
    taken,
    E,
    H,
    I,  # noqa: E741
    O,  # noqa: E741
    HALVES: gl.constexpr,
    BLOCK_E: gl.constexpr,
    ROWS: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Claims items and brings their weights."""
    e, start, end = _bounds(offsets_ptr, E, BLOCK_E)
    item = gl.atomic_add(state_ptr, 1, sem="relaxed")
    ends, ups, downs, num_up, total = _items(start, end, I, O, ROWS, HALVES, UP_FOLD, DOWN_FOLD)
    _publish(item, state_ptr, total, queue, published, taken, 0)
    step = 0
    turn = 1
    while item < total:
        if item < num_up:
            expert, _, number, _, _ = _place(e, start, end, ends, item, ups, ROWS)
            row = expert * (HALVES * I) + number * (HEIGHT // UP_FOLD // HALVES)
            step = _bring_weights(up_desc, row, I, H, w_ring, full, empty, step, STAGES, HALVES, UP_FOLD)
        else:
            expert, _, number, _, _ = _place(e, start, end, ends, item - num_up, downs, ROWS)
            row = expert * O + number * (HEIGHT // DOWN_FOLD)
            step = _bring_weights(down_desc, row, O, I, w_ring, full, empty, step, STAGES, 1, DOWN_FOLD)
        item = gl.atomic_add(state_ptr, 1, sem="relaxed")
        _publish(item, state_ptr, total, queue, published, taken, turn)
        turn += 1


@gluon.jit
def _bring_rows(
    rows_ptr,
    source,
    live,
    K,
    x_ring,
    full,
    empty,
    step,
    ROWS: gl.constexpr,
    FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """All of k of the rows at offsets `source`; zeros in those that are not live and past the end."""
    k = gl.expand_dims(gl.arange(0, BOX_K, layout=gl.SliceLayout(0, layout)), 0)
    for depth in range(0, K, FOLD * PANELS * BOX_K):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        for box in gl.static_range(FOLD * PANELS):
            place = x_ring.index(stage * PANELS + box % PANELS).slice(box // PANELS * ROWS, ROWS, dim=0)
            at = depth + box * BOX_K
            copy_load(place, rows_ptr + at + (source + k), mask=live & (k < K - at))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)  # each thread's, once its copies landed
        step += 1
    return step


@gluon.jit
def _rows_producer(
    x_ptr,
    a_ptr,
    route_ptr,
    offsets_ptr,
    state_ptr,
    x_ring,
    full,
    empty,
    queue,
    published,
    taken,
    E,
    H,
    I,  # noqa: E741
    O,  # noqa: E741
    x_stride,
    TOP_K: gl.constexpr,
    HALVES: gl.constexpr,
    BLOCK_E: gl.constexpr,
    ROWS: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Brings the rows of every claimed item: tokens', or the intermediate's once it is complete."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    e, start, end = _bounds(offsets_ptr, E, BLOCK_E)
    ends, ups, downs, num_up, total = _items(start, end, I, O, ROWS, HALVES, UP_FOLD, DOWN_FOLD)
    step = 0
    turn = 1
    item = claimed_tile(queue, published, taken, 0)
    while item < total:
        up = item < num_up
        each = ups if up else downs
        _, tile, _, first, last = _place(e, start, end, ends, item if up else item - num_up, each, ROWS)
        row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        live = gl.expand_dims(row < last, 1)
        if up:
            token = gl.load(route_ptr + row, mask=row < last, other=0) // TOP_K
            source = gl.expand_dims(token.to(gl.int64) * x_stride, 1)
            step = _bring_rows(x_ptr, source, live, H, x_ring, full, empty, step, ROWS, UP_FOLD, STAGES, layout)
        else:
            done_ptr = state_ptr + 1 + tile
            while gl.load(done_ptr, volatile=True) < ups:
                pass
            done = gl.atomic_add(done_ptr, 1, sem="acquire")
            gl.store(done_ptr, 0, mask=done == ups + downs - 1)  # nobody else will look
            source = gl.expand_dims(row.to(gl.int64) * I, 1)
            step = _bring_rows(a_ptr, source, live, I, x_ring, full, empty, step, ROWS, DOWN_FOLD, STAGES, layout)
        item = claimed_tile(queue, published, taken, turn)
        turn += 1


@gluon.jit
def _sums(w_ring, x_ring, sums, full, empty, step, K, FOLD: gl.constexpr, STAGES: gl.constexpr):
    """An item's sums into `sums`; where the other projection has more folds, its columns hold what they happen to."""
    COLUMNS: gl.constexpr = x_ring.shape[1]
    acc = warpgroup_mma_init(gl.zeros((HEIGHT, COLUMNS), gl.float32, layout=accumulator_layout(COLUMNS)))
    for _ in range(0, K, FOLD * PANELS * BOX_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads through the asynchronous one
        for panel in gl.static_range(PANELS):
            right = x_ring.index(stage * PANELS + panel).permute([1, 0])
            acc = warpgroup_mma(w_ring.index(stage * PANELS + panel), right, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=(acc,)))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    sums.store(warpgroup_mma_wait(num_outstanding=0, deps=(acc,)))
    return step


@gluon.jit
def _unfolded(sums, at, COLUMNS: gl.constexpr, ROWS: gl.constexpr, FOLD: gl.constexpr, layout: gl.constexpr):
    """(COLUMNS, ROWS) of the sums from weight row `at` on: those of each piece of k, in its own columns."""
    value = sums.slice(at, COLUMNS, dim=0).slice(0, ROWS, dim=1).load(layout)
    for piece in gl.static_range(1, FOLD):
        own = sums.slice(at + piece * (HEIGHT // FOLD), COLUMNS, dim=0).slice(piece * ROWS, ROWS, dim=1)
        value += own.load(layout)
    return value


@gluon.jit
def _finish(
    sums,
    out_ptr,
    bias_ptr,
    expert,
    column,
    first,
    last,
    N,
    FUNCTION: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    FOLD: gl.constexpr,
):
    """Bias, activation and store of an item's sums: rows `first` to `last`, columns from `column` on, of N."""
    COLUMNS: gl.constexpr = HEIGHT // FOLD // HALVES
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, 4], [0, 1])
    n = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, layout))
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    value = _unfolded(sums, 0, COLUMNS, ROWS, FOLD, layout)
    if HAS_BIAS:
        bias = bias_ptr + expert * (HALVES * N) + n
        value += gl.expand_dims(gl.load(bias, mask=n < N, other=0.0).to(gl.float32), 1)
    if FUNCTION != "none":
        value = activate(value, FUNCTION)
    if HALVES == 2:
        up = _unfolded(sums, COLUMNS, COLUMNS, ROWS, FOLD, layout)
        if HAS_BIAS:
            up += gl.expand_dims(gl.load(bias + N, mask=n < N, other=0.0).to(gl.float32), 1)
        value *= up
    out = out_ptr + (gl.expand_dims(row.to(gl.int64) * N, 0) + gl.expand_dims(n, 1))
    inside = gl.expand_dims(row < last, 0) & gl.expand_dims(n < N, 1)
    gl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _consumer(
    a_ptr,
    y_ptr,
    offsets_ptr,
    state_ptr,
    up_bias_ptr,
    down_bias_ptr,
    w_ring,
    x_ring,
    sums,
    full,
    empty,
    queue,
    published,
    taken,
    E,
    H,
    I,  # noqa: E741
    O,  # noqa: E741
    FUNCTION: gl.constexpr,
    HALVES: gl.constexpr,
    UP_BIAS: gl.constexpr,
    DOWN_BIAS: gl.constexpr,
    BLOCK_E: gl.constexpr,
    ROWS: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiplies and finishes every claimed item, and counts those of the up projection as done."""
    e, start, end = _bounds(offsets_ptr, E, BLOCK_E)
    ends, ups, downs, num_up, total = _items(start, end, I, O, ROWS, HALVES, UP_FOLD, DOWN_FOLD)
    step = 0
    turn = 1
    item = claimed_tile(queue, published, taken, 0)
    while item < total:
        if item < num_up:
            step = _sums(w_ring, x_ring, sums, full, empty, step, H, UP_FOLD, STAGES)
            expert, tile, number, first, last = _place(e, start, end, ends, item, ups, ROWS)
            column = number * (HEIGHT // UP_FOLD // HALVES)
            _finish(sums, a_ptr, up_bias_ptr, expert, column, first, last, I, FUNCTION, HALVES, UP_BIAS, ROWS, UP_FOLD)
            thread_barrier()  # all of the warpgroup's stores come before the count
            gl.atomic_add(state_ptr + 1 + tile, 1, sem="release")
        else:
            step = _sums(w_ring, x_ring, sums, full, empty, step, I, DOWN_FOLD, STAGES)
            expert, _, number, first, last = _place(e, start, end, ends, item - num_up, downs, ROWS)
            column = number * (HEIGHT // DOWN_FOLD)
            _finish(sums, y_ptr, down_bias_ptr, expert, column, first, last, O, "none", 1, DOWN_BIAS, ROWS, DOWN_FOLD)
        item = claimed_tile(queue, published, taken, turn)
        turn += 1


# Compiled for 1, so that loops were of a single turn, it read outside of shared memory on an H200.
@gluon.jit(do_not_specialize=["H_EIGHTH", "I_EIGHTH", "x_stride_eighth"])
def _decode_hopper_kernel(
    x_ptr,  # (T, H)
    route_ptr,  # (R,) int32
    offsets_ptr,  # (P,) int32
    up_desc,  # (E * I or E * 2I, H)
    down_desc,  # (E * O, I)
    up_bias_ptr,  # (E, I or 2I); unused unless UP_BIAS
    down_bias_ptr,  # (E, O); unused unless DOWN_BIAS
    a_ptr,  # (R, I)
    y_ptr,  # (R, O)
    state_ptr,  # int32, 0 before and after: claims, and of each row tile how many items are done
    E,
    H_EIGHTH,  # in eighths, so that the compiler knows rows to lie on 16 bytes
    I_EIGHTH,
    O,  # noqa: E741
    x_stride_eighth,
    TOP_K: gl.constexpr,
    FUNCTION: gl.constexpr,
    HALVES: gl.constexpr,
    UP_BIAS: gl.constexpr,
    DOWN_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_E: gl.constexpr,
    ROWS: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """y = f(x W_up^T + bias) W_down^T + bias per expert, for rows sorted by expert."""
    dtype: gl.constexpr = up_desc.dtype
    H = H_EIGHTH * 8
    I = I_EIGHTH * 8  # noqa: E741
    x_stride = x_stride_eighth * 8
    COLUMNS: gl.constexpr = ROWS * max(UP_FOLD, DOWN_FOLD)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, HEIGHT, BOX_K], piece_layout(BOX_K, dtype))
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, COLUMNS, BOX_K], piece_layout(BOX_K, dtype))
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [1, HEIGHT, COLUMNS], plain).index(0)
    full = new_barriers(STAGES, 33)  # the weights' bytes, and each thread's copies of rows
    empty = new_barriers(STAGES, 1)
    queue, published, taken = new_queue(True, full)
    fence_async_shared()
    wait_for_previous(PDL)
    gl.warp_specialize(
        [
            (_consumer, (
                a_ptr, y_ptr, offsets_ptr, state_ptr, up_bias_ptr, down_bias_ptr, w_ring, x_ring, sums, full, empty,
                queue, published, taken, E, H, I, O,
                FUNCTION, HALVES, UP_BIAS, DOWN_BIAS, BLOCK_E, ROWS, UP_FOLD, DOWN_FOLD, STAGES,
            )),
            (_weights_producer, (
                up_desc, down_desc, offsets_ptr, state_ptr, w_ring, full, empty, queue, published, taken,
                E, H, I, O, HALVES, BLOCK_E, ROWS, UP_FOLD, DOWN_FOLD, STAGES,
            )),
            (_rows_producer, (
                x_ptr, a_ptr, route_ptr, offsets_ptr, state_ptr, x_ring, full, empty, queue, published, taken,
                E, H, I, O, x_stride, TOP_K, HALVES, BLOCK_E, ROWS, UP_FOLD, DOWN_FOLD, STAGES,
            )),
        ],
        [1, 1],
        [152, 152],
    )  # fmt: skip


def decode_forward_hopper(
    x_TH: torch.Tensor,
    row_route_R: torch.Tensor,
    offsets_P: torch.Tensor,
    top_k: int,
    up_EGH: torch.Tensor,
    down_EOI: torch.Tensor,
    activation: str,
    config: HopperDecodeConfig,
    programs: int,
    up_bias_EG: torch.Tensor | None = None,
    down_bias_EO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `decode_forward`; the rows are in `out`'s dtype where it is given."""
    x_TH = row_contiguous(x_TH)
    kind = ACTIVATIONS[activation]
    num_experts, output_dim, hidden_dim = down_EOI.shape
    num_rows, input_dim = row_route_R.shape[0], x_TH.shape[1]
    a = torch.empty(num_rows, hidden_dim, dtype=x_TH.dtype, device=x_TH.device)
    y = torch.empty(num_rows, output_dim, dtype=torch.float32, device=x_TH.device) if out is None else out
    if num_rows == 0:
        return y
    row_tiles = min(num_rows, cdiv(num_rows, config.rows) + min(num_experts, num_rows))
    halves = 2 if kind.gated else 1
    up_share, down_share = HEIGHT.value // config.up_fold // halves, HEIGHT.value // config.down_fold
    items = row_tiles * (cdiv(hidden_dim, up_share) + cdiv(output_dim, down_share))
    launch(
        _decode_hopper_kernel,
        (min(programs, items),),
        x_TH,
        row_route_R,
        offsets_P,
        matrix(up_EGH.view(-1, input_dim), up_share, BOX_K.value),
        matrix(down_EOI.view(-1, hidden_dim), down_share, BOX_K.value),
        None if up_bias_EG is None else up_bias_EG.contiguous(),
        None if down_bias_EO is None else down_bias_EO.contiguous(),
        a,
        y,
        _COUNTERS.get(x_TH.device, 1 + row_tiles),
        num_experts,
        input_dim // 8,
        hidden_dim // 8,
        output_dim,
        x_TH.stride(0) // 8,
        TOP_K=top_k,
        FUNCTION=kind.function,
        HALVES=halves,
        UP_BIAS=up_bias_EG is not None,
        DOWN_BIAS=down_bias_EO is not None,
        BLOCK_E=max(128, next_power_of_2(num_experts)),
        ROWS=config.rows,
        UP_FOLD=config.up_fold,
        DOWN_FOLD=config.down_fold,
        STAGES=config.stages,
        num_warps=4,
        **pdl_options(x_TH.device),
    )
    return y
