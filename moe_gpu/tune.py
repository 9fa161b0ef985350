"""`moe-gpu tune`: time the candidate tiles of every product on this GPU, and keep the fastest in its table.

Candidates compile in parallel into Triton's cache; then each is checked against plain PyTorch in float64 and timed, in
turn with the others, from a cold L2, under the routing that is asked for. The tile that serves now stays unless it is
beaten by more than MARGIN.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark.problem import zipf_exponent
from moe_gpu.benchmark.timing import Job, Timer, attempt, measure_ceilings, time_interleaved
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.console import Progress, progress_bar
from moe_gpu.explain import Gpu, LayerProduct, both_products, hopper_reason, layer_products, present_gpu
from moe_gpu.machine import describe_machine
from moe_gpu.results import Row, TileRow, percentile, write_rows
from moe_gpu.triton_kernels.tile_table import (
    AnyTile,
    Cell,
    Entry,
    Table,
    TableError,
    Tile,
    cache_path,
    choose_decode,
    choose_tile,
    forget_tables,
    path_of,
    read_table,
    write_table,
)
from moe_gpu.triton_kernels.tuning import (
    TUNED,
    GemmConfig,
    HopperConfig,
    HopperDecodeConfig,
    TwoProducts,
    gather_first,
    half_tiles,
    load_aware_tiles,
    operand_bytes,
)
from moe_gpu.tune_problem import DTYPE, Case, Operands, compare

MARGIN = 0.01
FIRST_SAMPLES, LAST_SAMPLES, FINALISTS = 3, 15, 3
MOST_ROWS_IN_ONE_LAUNCH = 64  # an expert; where the launch for few rows is tried
COMPILED_TOKENS = 65  # more than the tallest tile of one launch has rows: for fewer it is another kernel
# What of --seconds compiling may take.
COMPILE_SHARE = 0.6


def default_tokens(config: MoEConfig) -> list[int]:
    """Tokens that put 8, 16, ... 2048 rows on an expert."""
    return [rows * config.num_experts // config.top_k for rows in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)]


def few_tokens(config: MoEConfig) -> list[int]:
    """Tokens that put 1, 2, 4 ... 64 rows on an expert."""
    return [max(1, rows * config.num_experts // config.top_k) for rows in (1, 2, 4, 8, 16, 32, 64)]


def plan(
    gpu: Gpu,
    presets: Sequence[str],
    tokens: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    sm_budgets: Sequence[int] | None = None,
    routing: str = "uniform",
) -> list[Case]:
    """The cells to measure, one a bucket; ValueError for a budget that the GPU has not got, or an unknown routing."""
    if routing == "trace":
        raise ValueError("routing='trace' has no trace here; give uniform or zipf-S, such as zipf-1.2")
    zipf_exponent(routing)
    for budget in sm_budgets or ():
        if budget > gpu.num_sms:
            raise ValueError(f"--sm-budget {budget} exceeds the {gpu.num_sms} SMs of {gpu.name}; give fewer")
    cases: dict[Cell, Case] = {}
    for preset in presets:
        c = PRESETS[preset]
        ordered = replace(layer_products(c)[-2], kind="grad_w")  # the gradient of `up` over rows in order
        for count, sms in itertools.product(tokens or default_tokens(c), sm_budgets or [gpu.num_sms]):
            for product in (*layer_products(c), ordered):
                if product.kind in (kinds or TUNED):
                    case = Case(preset, product, count, sms, routing)
                    cases.setdefault(case.cell, case)
        if "decode" not in (kinds or TUNED) or hopper_reason(gpu, c, DTYPE) is not None:
            continue
        for count, sms in itertools.product(tokens or few_tokens(c), sm_budgets or [gpu.num_sms]):
            case = Case(preset, both_products(c), count, sms, routing)
            if c.num_experts < 2 * case.rows <= 2 * MOST_ROWS_IN_ONE_LAUNCH * c.num_experts:
                cases.setdefault(case.cell, case)
    return list(cases.values())


def candidates(kind: str, rows_per_expert: float, shared_bytes: int, gated: bool, hopper: bool) -> list[Tile]:
    """Tiles worth timing; none that needs more shared memory than there is."""
    found: list[Tile] = []
    if hopper:
        stores = [(4, 64, 2), (4, 128, 1), (3, 64, 2), (3, 128, 2), (3, 256, 1)]
        if kind == "grad_act":  # its stores have a shape of their own
            stores = [(4, 64, 2), (3, 64, 2)]
        plain = [
            HopperConfig(stages, width, slots, group)
            for (stages, width, slots), group in itertools.product(stores, (8, 16, 4))
        ]
        if kind in ("up", "down", "grad_x"):
            plain += [HopperConfig(*store, group_m=4, claimed=True) for store in stores]
        if kind in ("up", "down", "grad_x") and rows_per_expert > 64:
            plain += [
                HopperConfig(3, width, slots, group, rows=192, claimed=True)
                for (width, slots), group in itertools.product([(64, 2), (64, 3), (128, 1)], (8, 16, 4))
            ]
        # A store as wide as another's would be the same tile twice.
        found += [tile for tile in plain if tile.width == tile.store_width(kind == "up" and gated)]
    found += half_tiles(kind, shared_bytes).values()
    found += _plain_candidates(kind, rows_per_expert)
    found += load_aware_tiles(kind)
    return [tile for tile in dict.fromkeys(found) if operand_bytes(kind, tile, gated) < shared_bytes]


def decode_candidates(shared_bytes: int) -> list[AnyTile]:
    """Tiles of the launch for few rows, each with all the stages that fit; and two products."""
    found: list[AnyTile] = [TwoProducts()]
    shapes = [*itertools.product((8, 16, 32, 64), (1, 2), (1, 2), (64,)), (32, 1, 1, 128), (64, 1, 1, 128)]
    for rows, up_fold, down_fold, height in shapes:
        tile = HopperDecodeConfig(rows, up_fold, down_fold, 1, height)
        stages = min(6, (shared_bytes - tile.sums_bytes - 2048) // tile.stage_bytes)
        if stages >= 2:
            found.append(replace(tile, stages=stages))
    return found


def _plain_candidates(kind: str, rows_per_expert: float) -> Iterator[GemmConfig]:
    if kind.startswith("grad_w"):
        shapes = [(64, 128, 128, 4), (64, 128, 256, 8)] if rows_per_expert > 96 else [(32, 128, 128, 4)]
        for (m, n, k, warps), stages in itertools.product(shapes, (2, 3, 4, 5)):
            yield GemmConfig(m, n, k, warps, stages, 8, 2 if warps == 4 else 1)
    elif rows_per_expert > 96:
        shapes = {
            "up": [(128, 128, 64, 8), (64, 128, 64, 4)],
            "down": [(128, 256, 64, 8), (128, 128, 64, 4)],
            "grad_act": [(128, 256, 64, 8), (64, 128, 64, 4)],
            "grad_x": [(128, 256, 64, 8), (128, 128, 64, 4)],
        }[kind]
        for (m, n, k, warps), stages in itertools.product(shapes, (3, 4)):
            yield GemmConfig(m, n, k, warps, stages, 8, 2 if warps == 4 else 1)
    else:
        rows = [16] if rows_per_expert <= 16 else [32, 64] if rows_per_expert <= 40 else [64]
        for m, n, k, stages in itertools.product(rows, (64, 128), (64, 128), (3, 4)):
            if n * k < 128 * 128:
                yield GemmConfig(m, n, k, 4, stages, 8, 2)


class QueuedTimer(Timer):
    """As Timer, behind enough writes that the host has queued the whole call before it begins: no launch is timed."""

    def __call__(self, job: Job) -> float:
        assert self._buffer is not None  # a GPU's
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        for _ in range(8):
            self._buffer.zero_()
        start.record()
        job.run(None)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def pick(
    times_ms: dict[AnyTile, float], incumbents: dict[str, AnyTile], current: AnyTile
) -> tuple[tuple[AnyTile, float], ...]:
    """The tile to serve, then the best of the other path; what serves now stays unless beaten by more than MARGIN.

    incumbents: what serves now by path. current: the one of them that does where both can.
    """

    def best(tiles: list[AnyTile], incumbent: AnyTile | None) -> AnyTile:
        fastest = min(tiles, key=times_ms.__getitem__)
        if incumbent in times_ms and times_ms[fastest] >= (1 - MARGIN) * times_ms[incumbent]:
            return incumbent
        return fastest

    if not times_ms:
        return ()
    chosen = best(list(times_ms), current)
    others = [tile for tile in times_ms if path_of(tile) != path_of(chosen)]
    tiles = [chosen]
    if others:
        tiles.append(best(others, incumbents.get(path_of(others[0]))))
    return tuple((tile, times_ms[tile]) for tile in tiles)


@dataclass(frozen=True)
class Outcome:
    """A measured case: a row for each candidate, the tiles to serve, and what served before with its time."""

    case: Case
    rows: tuple[TileRow, ...]
    tiles: tuple[tuple[AnyTile, float], ...]
    before: AnyTile
    before_ms: float | None


def _candidates_of(case: Case, gpu: Gpu) -> tuple[list[AnyTile], dict[str, AnyTile], AnyTile]:
    """The tiles to time, what serves now by path, and what serves now."""
    c, cell = case.config, case.cell
    if cell.kind == "decode":
        sizes = case.rows, case.tokens, c.num_experts, c.input_dim, c.hidden_dim
        serves = choose_decode(DTYPE, *sizes, gpu.name, case.sms).tile or TwoProducts()
        both = list(dict.fromkeys([serves, *decode_candidates(gpu.shared_bytes)]))
        return both, {path_of(tile): tile for tile in (TwoProducts(), serves)}, serves
    hopper = hopper_reason(gpu, c, DTYPE) is None
    now = [
        choose_tile(
            cell.kind, DTYPE, case.rows, c.num_experts, (cell.n, cell.k), gpu.name, case.sms, gpu.shared_bytes, allowed
        ).tile
        for allowed in ([True, False] if hopper else [False])
    ]
    incumbents: dict[str, AnyTile] = {path_of(tile): tile for tile in now}
    gated = c.up_rows == 2 * c.hidden_dim
    tiles: list[AnyTile] = list(
        dict.fromkeys([*now, *candidates(cell.kind, case.rows / c.num_experts, gpu.shared_bytes, gated, hopper)])
    )
    if cell.kind == "grad_w_gather" and gather_first(cell.n, case.rows, c.num_experts):
        # The plain path copies the rows into order and takes the tile of `grad_w`: its own does not matter.
        plain = [tile for tile in tiles if path_of(tile) == "triton"]
        tiles = [tile for tile in tiles if path_of(tile) != "triton"] + plain[:1]
    return tiles, incumbents, now[0]


def measure(
    case: Case,
    operands: Operands,
    tiles: Sequence[AnyTile],
    incumbents: dict[str, AnyTile],
    current: AnyTile,
    timer: Timer,
) -> Outcome:
    """Check each candidate, time those that are right, and time the best of each path again with what serves now."""
    product, rows = case.product, []
    truth, same = (operands.expected(product, dtype) for dtype in (torch.float64, DTYPE))
    jobs: dict[AnyTile, Job] = {}
    failures: dict[AnyTile, str] = {}

    def check(call: Callable[[], dict[str, torch.Tensor]]) -> None:
        compare(operands.found(call()), same, truth)

    for tile in tiles:
        call = operands.call(product, tile, case.sms)
        outcome = attempt(functools.partial(check, call))
        if outcome.reason is None:
            jobs[tile] = Job(functools.partial(_call, call))
        else:
            failures[tile] = outcome.reason
    times, failed = _medians(jobs, timer, FIRST_SAMPLES)
    failures |= failed
    finalists = {tile for tile in (current, *incumbents.values()) if tile in times}
    for path in {path_of(tile) for tile in times}:
        ranked = sorted((tile for tile in times if path_of(tile) == path), key=times.__getitem__)
        finalists |= set(ranked[:FINALISTS])
    final, failed = _medians({tile: jobs[tile] for tile in times if tile in finalists}, timer, LAST_SAMPLES)
    failures |= failed
    times |= final
    for tile in tiles:
        config = asdict(tile)
        if tile in failures:
            rows.append(TileRow(product.kind, str(case), config, error=failures[tile]))
        else:
            rows.append(TileRow(product.kind, str(case), config, times[tile], case.flops / times[tile] / 1e9))
    tiles_kept = pick({tile: ms for tile, ms in final.items() if tile not in failures}, incumbents, current)
    return Outcome(case, tuple(rows), tiles_kept, current, final.get(current))


def _call(call: Callable[[], dict[str, torch.Tensor]], _: None) -> None:
    call()


def _medians(jobs: dict[AnyTile, Job], timer: Timer, samples: int) -> tuple[dict[AnyTile, float], dict[AnyTile, str]]:
    named = {str(number): tile for number, tile in enumerate(jobs)}
    counts = dict.fromkeys(named, samples)
    times, failures = time_interleaved({name: jobs[tile] for name, tile in named.items()}, timer, counts)
    medians = {named[name]: percentile(values, 0.5) for name, values in times.items()}
    return medians, {named[name]: reason for name, reason in failures.items()}


@functools.lru_cache(maxsize=1)
def _small_operands(config: MoEConfig, index: int) -> Operands:
    return Operands(config, COMPILED_TOKENS, torch.device("cuda", index))


def _compile(preset: str, product: LayerProduct, tile: AnyTile, index: int) -> None:
    """In a process of its own: run a tile on few tokens, which leaves its kernel in Triton's cache."""
    operands = _small_operands(PRESETS[preset], index)
    operands.call(product, tile, 1)()


def compile_all(
    work: Sequence[tuple[Case, Sequence[AnyTile]]], device: torch.device, seconds: float, progress: Progress
) -> set[tuple[str, LayerProduct, AnyTile]]:
    """Compile every candidate once, in parallel; those that were not reached in time are returned, not compiled."""
    keys = dict.fromkeys((case.preset, case.product, tile) for case, tiles in work for tile in tiles)
    largest = max(
        PRESETS[preset].num_experts * PRESETS[preset].parameters_per_expert * DTYPE.itemsize for preset, _, _ in keys
    )
    free, _ = torch.cuda.mem_get_info(device)
    workers = max(1, min((os.cpu_count() or 2) - 1, len(keys), free // (2 * largest + (1 << 30))))
    left = set(keys)
    end = time.monotonic() + seconds
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_compile, *key, device.index or 0): key for key in keys}
        for future in as_completed(futures, timeout=seconds):
            if not isinstance(future.exception(), BrokenProcessPool):
                left.discard(futures[future])  # one that failed says why when it is run here
            progress(len(keys) - len(left), len(keys), "")
            if time.monotonic() > end:
                break
    except FuturesTimeoutError:
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return left


def run_tune(
    presets: Sequence[str],
    *,
    tokens: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    sm_budgets: Sequence[int] | None = None,
    routing: str = "uniform",
    seconds: float = 600.0,
    output: Path | None = None,
    dry_run: bool = False,
) -> list[Row]:
    """Tune this GPU and print what was found; writes the user's table and, to `output`, a row for each candidate.

    seconds: about when to stop; what was not measured by then is said and keeps its tile. dry_run: only list the
    cells. Returns the rows. Raises ValueError without a GPU, for a budget, routing or file that cannot be.
    """
    begin = time.monotonic()
    gpu = present_gpu()
    assert gpu.device is not None  # present
    cases = plan(gpu, presets, tokens, kinds, sm_budgets, routing)
    work = [(case, *_candidates_of(case, gpu)) for case in cases]
    if dry_run:
        for case, tiles, _, current in work:
            cell = case.cell
            print(f"{cell.kind:13} {case}: {len(tiles)} candidates; now {path_of(current)} {_short(current)}")
        return []
    path = cache_path(gpu.name)
    for target in (path, output):
        if target is not None:
            _require_writable(target)
    with progress_bar("compile") as progress:
        left = compile_all([(c, t) for c, t, _, _ in work], gpu.device, seconds * COMPILE_SHARE, progress)
    machine = describe_machine(gpu.device)
    ceilings = tuple(measure_ceilings(gpu.device, DTYPE))
    outcomes: list[Outcome] = []
    try:
        with progress_bar("time") as progress:
            for outcome in _measured(work, left, gpu.device, begin + seconds, progress):
                outcomes.append(outcome)
    finally:
        rows: list[Row] = [machine, *ceilings, *(row for outcome in outcomes for row in outcome.rows)]
        if outcomes:
            _save(path, gpu.name, machine, ceilings, outcomes)
            if output is not None:
                write_rows(output, rows)
    _print_outcomes(outcomes)
    if left:
        print(f"not compiled in time, so not timed: {len(left)} candidates; give more --seconds")
    if len(outcomes) < len(work):
        print(f"not measured in time: {len(work) - len(outcomes)} of {len(work)} cells; give more --seconds")
    print(f"table: {path}" + (f"\nresults: {output}" if output is not None else ""))
    return rows


def _measured(
    work: Sequence[tuple[Case, list[AnyTile], dict[str, AnyTile], AnyTile]],
    left: set[tuple[str, LayerProduct, AnyTile]],
    device: torch.device,
    deadline: float,
    progress: Callable[[int, int, str], None],
) -> Iterator[Outcome]:
    """Measure until the deadline; cases of one preset and number of tokens share their tensors."""
    by_size = sorted(work, key=lambda item: (item[0].preset, item[0].tokens))
    operands, made_for = None, None
    timer = QueuedTimer(device)
    for number, (case, tiles, incumbents, current) in enumerate(by_size):
        if time.monotonic() > deadline:
            return
        if made_for != (case.preset, case.tokens):
            operands = None  # before the next are made
            torch.cuda.empty_cache()
            made = attempt(functools.partial(Operands, case.config, case.tokens, device, case.routing))
            operands, made_for = made.value, (case.preset, case.tokens)
        progress(number, len(by_size), f"{case.product.kind} {case}")
        if operands is not None:
            compiled = [tile for tile in tiles if (case.preset, case.product, tile) not in left]
            yield measure(case, operands, compiled, incumbents, current, timer)
    progress(len(by_size), len(by_size), "")


def _require_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another file or MOE_GPU_CACHE") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: its folder is read-only; choose another file or MOE_GPU_CACHE")


def _save(path: Path, name: str, machine: Any, ceilings: tuple[Any, ...], outcomes: Sequence[Outcome]) -> None:
    entries = [Entry(outcome.case.cell, outcome.tiles) for outcome in outcomes if outcome.tiles]
    try:
        old = read_table(path, name)
    except (TableError, OSError):
        old = Table((), ())  # none, or one that the warning has already named
    write_table(path, old.merged(machine, entries, ceilings))
    forget_tables()


def _short(tile: AnyTile) -> str:
    return "x".join(str(value) for value in asdict(tile).values())


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title="tuned", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("product", "case", "path", "tile"):
        grid.add_column(name)
    for name in ("ms", "TFLOP/s", "before ms"):
        grid.add_column(name, justify="right", no_wrap=True)
    console = Console()
    wrong = []
    for outcome in outcomes:
        case = outcome.case
        wrong += [(case, row) for row in outcome.rows if row.error and row.error.startswith("WrongTileError")]
        if not outcome.tiles:
            grid.add_row(case.product.kind, str(case), "none could run", "", "-", "-", "-")
            continue
        tile, ms = outcome.tiles[0]
        rate = case.flops / ms / 1e9
        before = "-" if outcome.before_ms is None else f"{outcome.before_ms:.4f}"
        mark = "" if tile == outcome.before else " (new)"
        grid.add_row(
            case.product.kind, str(case), path_of(tile), _short(tile) + mark, f"{ms:.4f}", f"{rate:.0f}", before
        )
    console.print(grid)
    for case, row in wrong:
        console.print(f"never chosen: {row.kernel} {case} {row.config}: {row.error}", markup=False, soft_wrap=True)
