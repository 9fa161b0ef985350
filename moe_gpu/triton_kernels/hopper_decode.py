"""Experts for few rows each on Hopper, in Gluon: one launch that keeps memory busy from the first weight to the last.

Weights are the left side of the product, the rows of an expert the right one. The work is items: a few weight rows of
one row tile, over all of k; the up projection's of every tile, then the down projection's. Programs claim items from a
counter. In each, one warp brings weights by TMA, 512 bytes and more of every row at once, since DRAM reads neighbours
faster than strides; one warp or two bring rows, and wait for the intermediate of an item of the down projection, whose
weights are under way meanwhile; a warpgroup multiplies on wgmma. Whoever claims an item of the down projection knows
that all of the up projection is in the hands of programs that run, so waiting ends however many run at a time.
An expert with more rows than a tile has tall ones: twice the rows against half the depth of weights in the same stages.

wgmma multiplies 64 rows. Items of fewer weight rows are folded: pieces of k lie one below the other, and each piece's
rows of activations have columns of their own; of the sums, piece by piece, those of its own columns count.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
    activate,
    matrix,
    new_accumulator,
    new_barriers,
    piece_layout,
    upper_lower,
)
from moe_gpu.triton_kernels.hopper_decode_producers import (
    BOX_K,
    NONE,
    STAGE_ROWS,
    UP,
    new_item_queue,
    rows_producer,
    take_item,
    thread_barrier,
    weights_producer,
)
from moe_gpu.triton_kernels.launch import launch, pdl_options, wait_for_previous
from moe_gpu.triton_kernels.tuning import HopperDecodeConfig, cdiv, next_power_of_2

_COUNTERS = Counters()


@gluon.jit
def _multiply(
    w_ring,
    x_ring,
    full,
    empty,
    step,
    K,
    HEIGHT: gl.constexpr,
    FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    COUNT: gl.constexpr,
):
    """An item's sums; where the other projection has more folds, its columns hold what they happen to."""
    COLUMNS: gl.constexpr = x_ring.shape[1] // COUNT
    acc = new_accumulator(COLUMNS, HEIGHT)
    for _ in range(0, K, FOLD * COUNT * BOX_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads through the asynchronous one
        for panel in gl.static_range(COUNT):
            left = w_ring.index(stage).slice(panel * HEIGHT, HEIGHT, dim=0)
            right = x_ring.index(stage).slice(panel * COLUMNS, COLUMNS, dim=0).permute([1, 0])
            acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=(acc,)))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,)), step


@gluon.jit
def _unfolded(sums, at, COLUMNS: gl.constexpr, ROWS: gl.constexpr, FOLD: gl.constexpr, layout: gl.constexpr):
    """(COLUMNS, ROWS) of the sums from weight row `at` on: those of each piece of k, in its own columns."""
    value = sums.slice(at, COLUMNS, dim=0).slice(0, ROWS, dim=1).load(layout)
    for piece in gl.static_range(1, FOLD):
        own = sums.slice(at + piece * (sums.shape[0] // FOLD), COLUMNS, dim=0).slice(piece * ROWS, ROWS, dim=1)
        value += own.load(layout)
    return value


@gluon.jit
def _with_bias(x, bias_ptr, row, n, N, HAS_BIAS: gl.constexpr):
    """x plus what row `row` of N biases has for its rows, the columns n of the output."""
    if HAS_BIAS:
        x += gl.expand_dims(gl.load(bias_ptr + (row * N + n), mask=n < N, other=0.0).to(gl.float32), 1)
    return x


@gluon.jit
def _finish(
    acc,
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
    """Bias, activation and store of an item's sums: rows `first` to `last`, columns from `column` on, of N.

    They go through `sums`, shared memory of 64 weight rows.
    """
    part = sums.slice(0, acc.shape[1], dim=1)
    if acc.shape[0] == 64:
        part.store(acc)
        _store(sums, out_ptr, bias_ptr, expert, column, first, last, N, FUNCTION, HALVES, HAS_BIAS, ROWS, FOLD)
    else:
        gl.static_assert(FOLD == 1)
        upper, lower = upper_lower(acc)
        if HALVES == 2:  # each gate meets its up in one thread
            n = column + gl.arange(0, 64, layout=gl.SliceLayout(1, upper.type.layout))
            gate = activate(_with_bias(upper, bias_ptr, 2 * expert, n, N, HAS_BIAS), FUNCTION)
            part.store(gate * _with_bias(lower, bias_ptr, 2 * expert + 1, n, N, HAS_BIAS))
            _store(sums, out_ptr, bias_ptr, expert, column, first, last, N, "none", 1, False, ROWS, 1)
        else:
            part.store(upper)
            _store(sums, out_ptr, bias_ptr, expert, column, first, last, N, FUNCTION, 1, HAS_BIAS, ROWS, 1)
            part.store(lower)
            _store(sums, out_ptr, bias_ptr, expert, column + 64, first, last, N, FUNCTION, 1, HAS_BIAS, ROWS, 1)


@gluon.jit
def _store(
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
    """`_finish` from shared memory on."""
    COLUMNS: gl.constexpr = sums.shape[0] // FOLD // HALVES
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, 4], [0, 1])
    n = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, layout))
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    value = _unfolded(sums, 0, COLUMNS, ROWS, FOLD, layout)
    value = _with_bias(value, bias_ptr, HALVES * expert, n, N, HAS_BIAS)
    if FUNCTION != "none":
        value = activate(value, FUNCTION)
    if HALVES == 2:
        up = _unfolded(sums, COLUMNS, COLUMNS, ROWS, FOLD, layout)
        value *= _with_bias(up, bias_ptr, 2 * expert + 1, n, N, HAS_BIAS)
    out = out_ptr + (gl.expand_dims(row.to(gl.int64) * N, 0) + gl.expand_dims(n, 1))
    inside = gl.expand_dims(row < last, 0) & gl.expand_dims(n < N, 1)
    gl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _compute(
    expert,
    number,
    first,
    last,
    tall,
    w_ring,
    x_ring,
    sums,
    full,
    empty,
    step,
    out_ptr,
    bias_ptr,
    N,
    K,
    FUNCTION: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """An item of a projection from its stages to its rows of the output. Steps so far."""
    PANELS: gl.constexpr = STAGE_ROWS // HEIGHT
    column = number * (HEIGHT // FOLD // HALVES)
    if TALL and tall == 1:
        twice, step = _multiply(w_ring, x_ring, full, empty, step, K, HEIGHT, FOLD, STAGES, PANELS // 2)
        _finish(
            twice, sums, out_ptr, bias_ptr, expert, column, first, last, N,
            FUNCTION, HALVES, HAS_BIAS, 2 * ROWS, FOLD,
        )  # fmt: skip
    else:
        acc, step = _multiply(w_ring, x_ring, full, empty, step, K, HEIGHT, FOLD, STAGES, PANELS)
        _finish(acc, sums, out_ptr, bias_ptr, expert, column, first, last, N, FUNCTION, HALVES, HAS_BIAS, ROWS, FOLD)
    return step


@gluon.jit
def _consumer(
    a_ptr,
    y_ptr,
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
    H,
    I,  # noqa: E741
    O,  # noqa: E741
    FUNCTION: gl.constexpr,
    HALVES: gl.constexpr,
    UP_BIAS: gl.constexpr,
    DOWN_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """Multiplies and finishes every claimed item, and counts those of the up projection as done."""
    step = 0
    turn = 0
    which, expert, tile, number, first, last, tall = take_item(queue, published, taken, turn)
    while which != NONE:
        if which == UP:
            step = _compute(
                expert, number, first, last, tall, w_ring, x_ring, sums, full, empty, step, a_ptr, up_bias_ptr, I, H,
                FUNCTION, HALVES, UP_BIAS, ROWS, UP_FOLD, STAGES, HEIGHT, TALL,
            )  # fmt: skip
            thread_barrier()  # all of the warpgroup's stores come before the count
            gl.atomic_add(state_ptr + 1 + tile, 1, sem="release")
        else:
            step = _compute(
                expert, number, first, last, tall, w_ring, x_ring, sums, full, empty, step, y_ptr, down_bias_ptr, O, I,
                "none", 1, DOWN_BIAS, ROWS, DOWN_FOLD, STAGES, HEIGHT, TALL,
            )  # fmt: skip
        turn += 1
        which, expert, tile, number, first, last, tall = take_item(queue, published, taken, turn)


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
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """y = f(x W_up^T + bias) W_down^T + bias per expert, for rows sorted by expert."""
    dtype: gl.constexpr = up_desc.dtype
    H = H_EIGHTH * 8
    I = I_EIGHTH * 8  # noqa: E741
    x_stride = x_stride_eighth * 8
    COLUMNS: gl.constexpr = ROWS * max(UP_FOLD, DOWN_FOLD)
    ROW_WARPS: gl.constexpr = 2 if ROWS > 16 else 1
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, STAGE_ROWS, BOX_K], piece_layout(BOX_K, dtype))
    x_ring = gl.allocate_shared_memory(
        dtype, [STAGES, STAGE_ROWS // HEIGHT * COLUMNS, BOX_K], piece_layout(BOX_K, dtype)
    )
    # Columns change places by row, since a warp reads down a column.
    turned: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 8, [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [1, 64, COLUMNS * (2 if TALL else 1)], turned).index(0)
    full = new_barriers(STAGES, 1 + 32 * ROW_WARPS)  # the weights' bytes, and each thread's copies of rows
    empty = new_barriers(STAGES, 1)
    queue, published, taken = new_item_queue()
    fence_async_shared()
    wait_for_previous(PDL)
    gl.warp_specialize(
        [
            (_consumer, (
                a_ptr, y_ptr, state_ptr, up_bias_ptr, down_bias_ptr, w_ring, x_ring, sums, full, empty,
                queue, published, taken, H, I, O,
                FUNCTION, HALVES, UP_BIAS, DOWN_BIAS, ROWS, UP_FOLD, DOWN_FOLD, STAGES, HEIGHT, TALL,
            )),
            (weights_producer, (
                up_desc, down_desc, offsets_ptr, state_ptr, w_ring, full, empty, queue, published, taken,
                E, H, I, O, HALVES, BLOCK_E, ROWS, UP_FOLD, DOWN_FOLD, STAGES, HEIGHT, TALL,
            )),
            (rows_producer, (
                x_ptr, a_ptr, route_ptr, state_ptr, x_ring, full, empty, queue, published, taken,
                H, I, O, x_stride, TOP_K, HALVES, ROWS, UP_FOLD, DOWN_FOLD, STAGES, HEIGHT, TALL,
            )),
        ],
        [1, ROW_WARPS],
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
    up_share, down_share = config.height // config.up_fold // halves, config.height // config.down_fold
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
        HEIGHT=config.height,
        # Tokens no more than a tile's rows: no expert has more, unless a token chose it twice.
        TALL=x_TH.shape[0] > config.rows,
        num_warps=4,
        **pdl_options(x_TH.device),
    )
    return y
