"""Of `hopper_decode.py`: what its items are, and the two warps that bring their weights and rows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_gpu.triton_kernels.hopper_common import copy_load, new_barriers, tma_load

# Newer releases of Triton call it otherwise.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

BOX_K = gl.constexpr(64)  # 128 bytes, the widest that TMA swizzles
STAGE_ROWS = gl.constexpr(256)  # of weights in boxes of one stage, whether above each other or side by side
NONE, UP, DOWN = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # what an item is of
ENDLESS = gl.constexpr((1 << 31) - 1)
WORDS = gl.constexpr(7)  # that tell an item


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _expert_bounds(offsets_ptr, E, BLOCK_E: gl.constexpr):
    """Of each expert: its number, and where its rows begin and end."""
    e = gl.arange(0, BLOCK_E, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    start = gl.load(offsets_ptr + e, mask=e < E, other=0)
    return e, start, gl.load(offsets_ptr + e + 1, mask=e < E, other=0)


@gluon.jit
def _num_tiles(rows, ROWS: gl.constexpr, TALL: gl.constexpr):
    """Of each expert: those of up to ROWS rows; if there are tall tiles, one of those at most, or tall ones."""
    if TALL:
        tiles = gl.where(rows > ROWS, gl.cdiv(rows, 2 * ROWS), gl.minimum(rows, 1))
    else:
        tiles = gl.cdiv(rows, ROWS)
    return tiles


@gluon.jit
def _count_items(
    start,
    end,
    I,  # noqa: E741
    O,  # noqa: E741
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """Row tiles up to each expert's last one; items of a tile in the up and the down projection; all of up; of both."""
    ends = gl.associative_scan(_num_tiles(end - start, ROWS, TALL), 0, _plus)
    ups = gl.cdiv(I, HEIGHT // UP_FOLD // HALVES)
    downs = gl.cdiv(O, HEIGHT // DOWN_FOLD)
    num_tiles = gl.max(ends, 0)
    return ends, ups, downs, num_tiles * ups, num_tiles * (ups + downs)


@gluon.jit
def _place_of_item(e, start, end, ends, item, each, ROWS: gl.constexpr, TALL: gl.constexpr):
    """Of an item: expert, row tile, number among the tile's `each` items, first row and end of the expert's, if tall.

    Of an expert with several tiles the same weights come one after the other, so that they are read once.
    """
    tiles = _num_tiles(end - start, ROWS, TALL)
    mine = (ends * each > item) & ((ends - tiles) * each <= item)
    before = gl.max(gl.where(mine, ends - tiles, 0), 0)
    first = gl.max(gl.where(mine, start, 0), 0)
    last = gl.max(gl.where(mine, end, 0), 0)
    expert = gl.max(gl.where(mine, e, 0), 0)
    tall = 1 if TALL and last - first > ROWS else 0
    height = 2 * ROWS if TALL else ROWS  # one tile of an expert that is not tall, whatever its height
    count = gl.cdiv(last - first, height)
    within = item - before * each
    return expert, before + within % count, within // count, first + within % count * height, last, tall


@gluon.jit
def _lanes():
    return gl.arange(0, 32 * gl.num_warps(), layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def _count_on(counter_ptr, most):
    """One thread counts, from `most` on to 0. What was there is waited for where it is looked at, unlike a scalar's."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.eq.s32 p, $2, 0;
        @p atom.relaxed.gpu.global.inc.u32 $0, [$1], $3;
        }""",
        "=r,l,r,r",
        [counter_ptr, _lanes(), most],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _counted(before):
    """What `_count_on` found, in one warp."""
    return gl.max(gl.where(_lanes() == 0, before, 0), 0)


@gluon.jit
def _load_acquire(ptr):
    """What others have released by an addition, and with it all that they wrote before."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def new_item_queue():
    """Two places for items, and the barriers of an item told and taken by the others."""
    queue = gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], mbarrier.MBarrierLayout())
    return queue, new_barriers(2, 1), new_barriers(2, 2)


@gluon.jit
def _publish(queue, published, taken, turn, words):
    """Tell the others an item, once they have taken the one before the last."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(taken.index(turn % 2), ((turn // 2) & 1) ^ 1)
    for i in gl.static_range(WORDS):
        queue.index(turn % 2 * WORDS + i).store(gl.full([1], words[i], gl.int32, layout=layout))
    mbarrier.arrive(published.index(turn % 2), count=1)


@gluon.jit
def _word(queue, turn, i: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(queue.index(turn % 2 * WORDS + i).load(layout), 0)


@gluon.jit
def take_item(queue, published, taken, turn):
    """The item that was claimed in its turn: UP, DOWN or NONE, then as `_place_of_item`."""
    mbarrier.wait(published.index(turn % 2), (turn // 2) & 1)
    which = _word(queue, turn, 0)
    expert = _word(queue, turn, 1)
    tile = _word(queue, turn, 2)
    number = _word(queue, turn, 3)
    first = _word(queue, turn, 4)
    last = _word(queue, turn, 5)
    tall = _word(queue, turn, 6)
    mbarrier.arrive(taken.index(turn % 2), count=1)
    return which, expert, tile, number, first, last, tall


@gluon.jit
def _bring_weights(
    desc,
    row,
    N,
    K,
    tall,
    w_ring,
    full,
    empty,
    step,
    STAGES: gl.constexpr,
    HALVES: gl.constexpr,
    FOLD: gl.constexpr,
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """All of k of the weight rows from `row` on, and of those N after them if there are two halves."""
    PANELS: gl.constexpr = STAGE_ROWS // HEIGHT
    if TALL and tall == 1:
        step = _bring_panels(desc, row, N, K, w_ring, full, empty, step, STAGES, HALVES, FOLD, HEIGHT, PANELS // 2)
    else:
        step = _bring_panels(desc, row, N, K, w_ring, full, empty, step, STAGES, HALVES, FOLD, HEIGHT, PANELS)
    return step


@gluon.jit
def _bring_panels(
    desc,
    row,
    N,
    K,
    w_ring,
    full,
    empty,
    step,
    STAGES: gl.constexpr,
    HALVES: gl.constexpr,
    FOLD: gl.constexpr,
    HEIGHT: gl.constexpr,
    COUNT: gl.constexpr,
):
    """The same in stages of COUNT panels of the item's height, beside each other."""
    SHARE: gl.constexpr = HEIGHT // FOLD // HALVES
    for depth in range(0, K, FOLD * COUNT * BOX_K):
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, HEIGHT * COUNT * BOX_K * 2)
        for half in gl.static_range(HALVES):
            for box in gl.static_range(FOLD * COUNT):
                place = w_ring.index(stage).slice(
                    box % COUNT * HEIGHT + (box // COUNT * HALVES + half) * SHARE, SHARE, dim=0
                )
                tma_load(desc, [row + half * N, depth + box * BOX_K], bar, place)
        step += 1
    # An item is claimed when there is room for it: claimed earlier, it would wait here while others have nothing left.
    mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)
    return step


@gluon.jit
def weights_producer(
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
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """Claims items and brings their weights."""
    e, start, end = _expert_bounds(offsets_ptr, E, BLOCK_E)
    claim = _count_on(state_ptr, ENDLESS)
    ends, ups, downs, num_up, total = _count_items(start, end, I, O, ROWS, HALVES, UP_FOLD, DOWN_FOLD, HEIGHT, TALL)
    item = _counted(claim)
    step = 0
    turn = 0
    while item < total:
        up = item < num_up
        within = item if up else item - num_up
        expert, tile, number, first, last, tall = _place_of_item(
            e, start, end, ends, within, ups if up else downs, ROWS, TALL
        )
        _publish(queue, published, taken, turn, (UP if up else DOWN, expert, tile, number, first, last, tall))
        if up:
            row = expert * (HALVES * I) + number * (HEIGHT // UP_FOLD // HALVES)
            step = _bring_weights(
                up_desc, row, I, H, tall, w_ring, full, empty, step, STAGES, HALVES, UP_FOLD, HEIGHT, TALL
            )
        else:
            row = expert * O + number * (HEIGHT // DOWN_FOLD)
            step = _bring_weights(
                down_desc, row, O, I, tall, w_ring, full, empty, step, STAGES, 1, DOWN_FOLD, HEIGHT, TALL
            )
        item = _counted(_count_on(state_ptr, ENDLESS))
        turn += 1
    # Each program claims one past the last item; the last of those clears.
    gl.store(state_ptr, 0, mask=item == total + gl.num_programs(0) - 1)
    _publish(queue, published, taken, turn, (NONE, 0, 0, 0, 0, 0, 0))


@gluon.jit
def _row_offsets(route_ptr, row, last, stride, TOP_K: gl.constexpr):
    """Where rows begin, as a column: of the routes' tokens, or of the rows themselves if TOP_K is 0."""
    if TOP_K == 0:
        source = row
    else:
        source = gl.load(route_ptr + row, mask=row < last, other=0) // TOP_K
    return gl.expand_dims(source.to(gl.int64) * stride, 1)


@gluon.jit
def _bring_rows(
    rows_ptr,
    route_ptr,
    first,
    last,
    tall,
    stride,
    K,
    x_ring,
    full,
    empty,
    step,
    TOP_K: gl.constexpr,
    ROWS: gl.constexpr,
    FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """All of k of the rows from `first` on."""
    PANELS: gl.constexpr = STAGE_ROWS // HEIGHT
    if TALL and tall == 1:
        step = _bring_tile(
            rows_ptr, route_ptr, first, last, stride, K, x_ring, full, empty, step,
            TOP_K, 2 * ROWS, FOLD, STAGES, PANELS // 2,
        )  # fmt: skip
    else:
        step = _bring_tile(
            rows_ptr, route_ptr, first, last, stride, K, x_ring, full, empty, step, TOP_K, ROWS, FOLD, STAGES, PANELS
        )
    return step


@gluon.jit
def _bring_tile(
    rows_ptr,
    route_ptr,
    first,
    last,
    stride,
    K,
    x_ring,
    full,
    empty,
    step,
    TOP_K: gl.constexpr,
    ROWS: gl.constexpr,
    FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    COUNT: gl.constexpr,
):
    """Zeros past the end of k. Of rows past `last` nobody looks at the sums: parts of the tile without any stay."""
    COLUMNS: gl.constexpr = x_ring.shape[1] // COUNT
    EACH: gl.constexpr = min(ROWS, max(16, ROWS // 4))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = first + gl.arange(0, EACH, layout=gl.SliceLayout(1, layout))
    k = gl.expand_dims(gl.arange(0, BOX_K, layout=gl.SliceLayout(0, layout)), 0)
    source0 = _row_offsets(route_ptr, row, last, stride, TOP_K)
    if ROWS > EACH:
        source1 = _row_offsets(route_ptr, row + EACH, last, stride, TOP_K)
    if ROWS > 2 * EACH:
        source2 = _row_offsets(route_ptr, row + 2 * EACH, last, stride, TOP_K)
        source3 = _row_offsets(route_ptr, row + 3 * EACH, last, stride, TOP_K)
    for depth in range(0, K, FOLD * COUNT * BOX_K):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        for part in gl.static_range(ROWS // EACH):
            if first + part * EACH < last:
                live = gl.expand_dims(row + part * EACH < last, 1)
                if part == 0:
                    source = source0
                elif part == 1:
                    source = source1
                elif part == 2:
                    source = source2
                else:
                    source = source3
                for box in gl.static_range(FOLD * COUNT):
                    place = x_ring.index(stage).slice(
                        box % COUNT * COLUMNS + box // COUNT * ROWS + part * EACH, EACH, dim=0
                    )
                    at = depth + box * BOX_K
                    copy_load(place, rows_ptr + at + (source + k), mask=live & (k < K - at))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)  # each thread's, once its copies landed
        step += 1
    return step


@gluon.jit
def rows_producer(
    x_ptr,
    a_ptr,
    route_ptr,
    state_ptr,
    x_ring,
    full,
    empty,
    queue,
    published,
    taken,
    H,
    I,  # noqa: E741
    O,  # noqa: E741
    x_stride,
    TOP_K: gl.constexpr,
    HALVES: gl.constexpr,
    ROWS: gl.constexpr,
    UP_FOLD: gl.constexpr,
    DOWN_FOLD: gl.constexpr,
    STAGES: gl.constexpr,
    HEIGHT: gl.constexpr,
    TALL: gl.constexpr,
):
    """Brings the rows of every claimed item: tokens', or the intermediate's once it is complete."""
    ups = gl.cdiv(I, HEIGHT // UP_FOLD // HALVES)
    downs = gl.cdiv(O, HEIGHT // DOWN_FOLD)
    step = 0
    turn = 0
    which, _, tile, _, first, last, tall = take_item(queue, published, taken, turn)
    while which != NONE:
        if which == UP:
            step = _bring_rows(
                x_ptr, route_ptr, first, last, tall, x_stride, H, x_ring, full, empty, step,
                TOP_K, ROWS, UP_FOLD, STAGES, HEIGHT, TALL,
            )  # fmt: skip
        else:
            done_ptr = state_ptr + 1 + tile
            while _load_acquire(done_ptr) < ups:
                pass
            thread_barrier()  # each warp has looked, before whoever is last clears it
            _count_on(done_ptr, ups + downs - 1)  # nobody else will look after the last
            step = _bring_rows(
                a_ptr, route_ptr, first, last, tall, I, I, x_ring, full, empty, step,
                0, ROWS, DOWN_FOLD, STAGES, HEIGHT, TALL,
            )  # fmt: skip
        turn += 1
        which, _, tile, _, first, last, tall = take_item(queue, published, taken, turn)
