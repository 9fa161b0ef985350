"""Record load-aware tiles against single ones on a GPU: `python benchmarks/run_tiles.py FILE.jsonl`.

Qwen3-30B-A3B's two forward products in bf16, `up` (gather and SwiGLU included) and `down`, each alone in a CUDA graph
and from a cold L2, all arms of a cell interleaved. Arms: every single tile of the rules, the load-aware tiles (several
classes of row tiles in one launch) and their shapes with one class, the Gluon kernels where they can serve, and
`torch._grouped_mm` with PyTorch's gather and SwiGLU. The table at the end adds the best `up` and `down` of each
sort. The loads: uniform, Zipf, and how a small model of as many experts, trained first, routes held-out text.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from text_trace import record_text_trace

from moe_gpu.benchmark.measure import Case as RowCase
from moe_gpu.benchmark.timing import (
    Job,
    Timer,
    attempt,
    capture,
    describe_samples,
    measure_ceilings,
    sample_count,
    time_interleaved,
    warm_up,
)
from moe_gpu.config import PRESETS
from moe_gpu.explain import Gpu, LayerProduct, hopper_reason, layer_products, present_gpu
from moe_gpu.machine import describe_machine
from moe_gpu.results import Row, stamp, write_rows
from moe_gpu.triton_kernels.tile_table import Tile, path_of
from moe_gpu.triton_kernels.tuning import (
    GemmConfig,
    HopperConfig,
    gemm_config,
    half_tiles,
    load_aware_tiles,
    operand_bytes,
)
from moe_gpu.tune import compile_all
from moe_gpu.tune_problem import DTYPE, Case, Operands, compare

PRESET = "qwen3-30b-a3b"
TOKENS = (256, 512, 1024, 2048, 4096, 8192)
TEXT = "text"
ROUTINGS = ("uniform", "zipf-0.6", "zipf-1.2", TEXT)
SINGLE, AWARE, HOPPER, TORCH = "single tile", "load-aware", "hopper", "torch_grouped_mm"
SAMPLES, BUDGET_S, COMPILE_S = 25, 0.05, 240.0
Times = dict[tuple[int, str, str, str], float]  # tokens, routing, product, sort of arm -> the best median


def tiles_of(kind: str, gpu: Gpu) -> list[Tile]:
    """What is compared for a product on this GPU."""
    aware = load_aware_tiles(kind)
    tiles: list[Tile] = [
        *half_tiles(kind, gpu.shared_bytes).values(),
        *(replace(t, smaller_ms=()) for t in aware),
        *aware,
    ]
    if hopper_reason(gpu, PRESETS[PRESET], DTYPE) is None:
        rule = gemm_config(kind, DTYPE, 1 << 20, 1, gpu.shared_bytes, hopper=True)
        assert isinstance(rule, HopperConfig)
        tiles += [
            rule,
            HopperConfig(3, **({"width": 128, "slots": 1} if kind == "down" else {}), rows=192, claimed=True),
        ]
    return [tile for tile in dict.fromkeys(tiles) if operand_bytes(kind, tile) < gpu.shared_bytes]


def sort_of(tile: Tile) -> str:
    if isinstance(tile, GemmConfig):
        return AWARE if tile.smaller_ms else SINGLE
    return HOPPER


def name_of(tile: Tile) -> str:
    """An arm's name: its sort, rows and shape."""
    if isinstance(tile, GemmConfig):
        rows = "/".join(map(str, (tile.block_m, *sorted(tile.smaller_ms, reverse=True))))
        return f"{sort_of(tile)} {rows}x{tile.block_n}x{tile.block_k} {tile.num_stages} stages"
    return f"{HOPPER} {tile.rows}{' claimed' if tile.claimed else ''}"


def by_torch(operands: Operands, product: LayerProduct) -> torch.Tensor:
    """The product by `torch._grouped_mm`, with a gather and SwiGLU of PyTorch's around `up`."""
    routing = operands.routing
    ends = routing.offsets_P[1:]
    if product.kind == "down":
        return torch._grouped_mm(operands.act, operands.down.transpose(1, 2), offs=ends)
    h = torch._grouped_mm(operands.x.index_select(0, routing.row_token_R), operands.up.transpose(1, 2), offs=ends)
    gate, up = h.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


class Recorder:
    """Times the arms of a product on one problem in turn and keeps their rows."""

    def __init__(self, path: Path, gpu: Gpu) -> None:
        assert gpu.device is not None
        self.path, self.gpu, self.device = path, gpu, gpu.device
        self.timer = Timer(self.device)
        self.machine = describe_machine(self.device)
        self.rows: list[Row] = [self.machine, *measure_ceilings(self.device, DTYPE)]
        self.best: Times = {}

    def _call(self, operands: Operands, product: LayerProduct, tile: Tile) -> Callable[[], dict[str, torch.Tensor]]:
        """The product by a tile; of a layer's two, `up` lists the row tiles that the Gluon kernels want."""
        make = functools.partial(operands.products, product.kind, tile, self.gpu.num_sms)
        listed = make()
        return lambda: operands.run(product, make() if product.kind == "up" else listed)

    def record(self, operands: Operands, product: LayerProduct, tokens: int, routing: str, tiles: list[Tile]) -> None:
        truth, same = (operands.expected(product, dtype) for dtype in (torch.float64, DTYPE))
        calls: dict[str, tuple[str, str | None, Callable[[], dict[str, torch.Tensor]]]] = {}
        for tile in tiles:
            calls[name_of(tile)] = sort_of(tile), f"{path_of(tile)} {asdict(tile)}", self._call(operands, product, tile)
        calls[TORCH] = TORCH, None, lambda: {"out": by_torch(operands, product)}
        jobs: dict[str, Job] = {}
        failures: dict[str, str] = {}
        counts: dict[str, int] = {}
        for name, (_, _, run) in calls.items():

            def build(name: str = name, run: Callable[[], dict[str, torch.Tensor]] = run) -> None:
                compare(operands.found(run()), same, truth)
                captured = capture(lambda: run()["out"], self.device)
                job = Job(lambda _: captured.replay())
                counts[name] = sample_count(warm_up(job, self.timer, 0.0), SAMPLES, BUDGET_S)
                jobs[name] = job

            outcome = attempt(build)
            if outcome.reason is not None:
                failures[name] = outcome.reason
        samples, failed = time_interleaved(jobs, self.timer, counts)
        failures |= failed
        c, routed = operands.config, operands.rows
        flops = 2 * routed * product.n * product.k
        case = RowCase(PRESET, c, tokens, DTYPE, routing, "forward", "graph")
        for name, (sort, backend, _) in calls.items():
            facts: dict[str, Any] = {"status": "failed", "reason": failures.get(name)}
            if name in samples:
                found = describe_samples(samples[name])
                facts = {"status": "ok", **found, "flops": flops, "tflops": flops / found["p50_ms"] / 1e9}
                key = tokens, routing, product.kind, sort
                self.best[key] = min(found["p50_ms"], self.best.get(key, float("inf")))
            row = case.row(name, scope=f"{product.kind} product", backend=backend, **facts)
            self.rows.append(stamp(row, self.machine))
            shown = row.reason if row.p50_ms is None else f"{row.p50_ms * 1e3:8.1f} us"
            print(f"{product.kind:5} T={tokens:<5} {routing:9} {name:45} {shown}", flush=True)
        write_rows(self.path, self.rows)


def print_ratios(best: Times, sorts: tuple[str, ...] = (SINGLE, AWARE, HOPPER, TORCH)) -> None:
    """Microseconds of the best `up` plus the best `down` of each sort, and the single tile's over the load-aware's."""
    print(f"{'T':>5} {'routing':9}" + "".join(f"{sort + ' us':>21}" for sort in sorts) + f"{'single / load-aware':>21}")
    for tokens, routing in dict.fromkeys((tokens, routing) for tokens, routing, _, _ in best):
        both = {}
        for sort in sorts:
            parts = [best.get((tokens, routing, kind, sort)) for kind in ("up", "down")]
            both[sort] = None if None in parts else sum(part for part in parts if part is not None) * 1e3
        cells = "".join(f"{'-' if value is None else f'{value:.1f}':>21}" for value in both.values())
        single, aware = both[SINGLE], both[AWARE]
        ratio = "-" if single is None or aware is None else f"{single / aware:.3f}"
        print(f"{tokens:>5} {routing:9}{cells}{ratio:>21}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N", help="tokens of a call")
    arguments = parser.parse_args()
    begin = time.monotonic()
    try:
        gpu = present_gpu()
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    config = PRESETS[PRESET]
    work = {product: tiles_of(product.kind, gpu) for product in layer_products(config)[:2]}
    assert gpu.device is not None
    cases = [(Case(PRESET, product, 1, gpu.num_sms), tiles) for product, tiles in work.items()]
    left = compile_all(cases, gpu.device, COMPILE_S, lambda done, total, _: None)
    print(f"compiled in {time.monotonic() - begin:.0f} s" + (f", {len(left)} not in time" if left else ""), flush=True)
    trace = record_text_trace(config, 2, 400, max(arguments.tokens), gpu.device)
    recorder = Recorder(arguments.output, gpu)
    for tokens in arguments.tokens:
        for routing in ROUTINGS:
            load = trace.replay(tokens, layer=1) if routing == TEXT else routing
            operands = Operands(config, tokens, gpu.device, load)
            for product, tiles in work.items():
                recorder.record(operands, product, tokens, routing, tiles)
            del operands
            torch.cuda.empty_cache()
    print_ratios(recorder.best)
    print(f"{time.monotonic() - begin:.0f} s; results: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
