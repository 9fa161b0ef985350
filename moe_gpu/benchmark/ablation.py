"""What each part brings: one layer with a shared expert, its parts added one by one, and all of them but one.

The parts: the Triton (and Gluon) kernels over the plain loop; a CUDA graph of the whole layer; load-aware tiles; the
shared expert beside the routed ones in slices, and on plain streams. Of slices or streams the fastest way that there is
serves, even where nothing beside anything would be faster: this measures a part, it does not choose one. Where both are
on, the faster of the two serves. Beside them, layers that differ in their number of experts alone.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moe_gpu.benchmark import timing
from moe_gpu.benchmark.check import Checker, Comparison
from moe_gpu.benchmark.measure import Case, Pass, measure_pass
from moe_gpu.benchmark.problem import Problem, check_memory, make_problem
from moe_gpu.benchmark.providers import BASELINE, Built, Provider, use_tensors
from moe_gpu.benchmark.suite import MoEBenchmark, Progress, choose_device
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.cuda_graph_manager import BatchScheduler
from moe_gpu.cuda_graph_manager.scheduler import Arm, default_arms
from moe_gpu.machine import describe_machine
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.moe_layer import Expert, MoELayer
from moe_gpu.results import ABLATION, BenchmarkRow, Row, select, stamp
from moe_gpu.slices.device import present_device
from moe_gpu.triton_kernels.ops import TritonExpertOps

KERNELS, GRAPHS, TILES, SLICES, STREAMS = PARTS = (
    "Triton kernels",
    "CUDA graphs",
    "load-aware tiles",
    "slices",
    "streams",
)
# Beyond so many rows an expert on average the wider of the load-aware tiles serves.
FEW_ROWS_PER_EXPERT = 64
EXPERT_COUNTS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Variant:
    """A layer with some of the parts."""

    name: str
    parts: frozenset[str]


def variants() -> list[Variant]:
    """The baseline, every part added to those before it, then all parts but one."""
    found = [Variant("baseline", frozenset())]
    found += [Variant(f"+ {part}", frozenset(PARTS[: number + 1])) for number, part in enumerate(PARTS)]
    return found + [Variant(f"all but {part}", frozenset(PARTS) - {part}) for part in PARTS]


class WithShared(Checker):
    """Checks the routed experts' part of a layer that adds a shared expert's output."""

    def __init__(self, problem: Problem, shared_expert: nn.Module) -> None:
        super().__init__(problem)
        with torch.no_grad():
            self._shared_TO = shared_expert(problem.x_TH)

    def check_output(self, out_TO: torch.Tensor) -> Comparison:
        """As Checker's, of the output less the shared expert's."""
        routed_TO = out_TO.double() - self._shared_TO.double() if out_TO.shape == self._shared_TO.shape else out_TO
        return super().check_output(routed_TO.to(out_TO.dtype))


def make_shared_expert(problem: Problem, seed: int) -> Expert:
    """A shared expert of the routed ones' width, seeded, without gradients."""
    c = problem.config
    with torch.random.fork_rng(devices=[problem.device] if problem.device.type == "cuda" else []):
        torch.manual_seed(seed)
        shared = Expert(c.input_dim, c.expert_dim, c.hidden_dim, c.activation, c.depth, c.bias)
    return shared.to(problem.device, problem.dtype).requires_grad_(False)


def _unavailable(parts: frozenset[str], problem: Problem, mode: str) -> str | None:
    """Why a layer with these parts cannot be built on the problem's device, or None."""
    if KERNELS not in parts:
        return (
            f"the plain loop reads the routing on the host: {', '.join(sorted(parts))} need {KERNELS}"
            if parts
            else None
        )
    backend = TritonExpertOps(problem.device).backend_for(problem.dtype)
    if backend.name != "triton":
        return f"no {KERNELS} here: {backend.reason}"
    if problem.device.type != "cuda" and parts - {KERNELS, TILES}:
        return f"{', '.join(sorted(parts - {KERNELS, TILES}))} need an NVIDIA GPU"
    if TILES in parts and not _tiles_for(problem):
        return "no load-aware tile fits this device or dtype"
    return None


def _tiles_for(problem: Problem) -> dict[str, Any]:
    """The load-aware tiles of a layer's forward products; empty where one does not fit."""
    from moe_gpu.triton_kernels.grouped_gemm import shared_bytes
    from moe_gpu.triton_kernels.tuning import load_aware_tiles, operand_bytes

    c = problem.config
    many = problem.num_tokens * c.top_k > FEW_ROWS_PER_EXPERT * c.num_experts
    tiles = {kind: load_aware_tiles(kind)[2 if many else 0] for kind in ("up", "down")}
    limit = shared_bytes(problem.device)
    fit = all(operand_bytes(kind, tile) < limit for kind, tile in tiles.items())
    return tiles if fit and problem.dtype.itemsize == 2 else {}


def _build(parts: frozenset[str], shared_expert: Expert, schedulers: list[BatchScheduler], problem: Problem) -> Built:
    """The layer with these parts, as one call without gradients; a scheduler made for it is added to the list."""
    config = problem.config.with_(shared_hidden_dim=problem.config.hidden_dim)
    with torch.device("meta"):
        if KERNELS in parts:
            layer: Any = AdvancedMoELayer.from_config(config, use_cuda_graphs=False, enable_energy_monitoring=False)
        else:
            layer = MoELayer(config)
    layer.shared_expert = None
    use_tensors(layer, problem)
    layer.shared_expert = shared_expert
    layer.eval()
    if KERNELS not in parts:
        return Built(lambda: layer(problem.x_TH, problem.logits()), "a loop over experts")
    words = [layer.ops.backend_for(problem.dtype).name]

    def run() -> torch.Tensor:
        return layer(problem.x_TH, router_logits_TE=problem.logits())[0]

    call: Callable[[], torch.Tensor] = run
    if TILES in parts:
        from moe_gpu.triton_kernels.products import given_tiles

        tiles = _tiles_for(problem)
        words.append("; ".join(f"{kind} by {tile}" for kind, tile in tiles.items()))

        def run_given() -> torch.Tensor:
            with given_tiles(tiles):
                return run()

        call = run_given
    with torch.no_grad():
        if parts & {SLICES, STREAMS}:
            arms = default_arms(present_device(problem.device.index))
            scheduler = BatchScheduler(arms=[arm for arm in arms if not arm.beside or _part_of(arm) in parts])
            schedulers.append(scheduler)
            layer.use_scheduler(scheduler)
            call()  # times every way
            words.append(_force(scheduler))
        if GRAPHS in parts:
            return Built(timing.capture(call, problem.device).replay, "; ".join(words))
    return Built(call, "; ".join(words))


def _part_of(arm: Arm) -> str:
    """The part that a way to run the shared expert beside the others belongs to."""
    return SLICES if arm.backend else STREAMS


def _force(scheduler: BatchScheduler) -> str:
    """Let the fastest way to run both side by side serve; in words, with what every way took."""
    ((key, choice),) = scheduler.choices.items()
    wanted = {arm.name: arm for arm in scheduler.arms if arm.beside and arm.name in choice.times_ms}
    times = ", ".join(f"{name} {time_ms * 1e3:.1f} us" for name, time_ms in choice.times_ms.items())
    if not wanted:
        refused = "; ".join(f"{name}: {why}" for name, why in choice.refused.items())
        raise RuntimeError(f"no way to run the shared expert beside the others: {refused}")
    fastest = min(wanted, key=choice.times_ms.__getitem__)
    scheduler.choices[key] = replace(choice, arm=wanted[fastest], reason="the fastest of the part under test")
    return f"shared expert: {fastest} (the optimiser's choice: {choice.arm.name}; {times})"


def default_preset(device: torch.device | str | None) -> str:
    """The layer that is taken apart where none is named: Qwen3-30B-A3B's on a GPU, a small one on a CPU."""
    return "qwen3-30b-a3b" if choose_device(device).type == "cuda" else "small"


class Ablation:
    """The variants of a layer at several sizes and routings, and layers with 4 to 256 experts.

    Forward passes without gradients. config, model: a preset's, its shared expert replaced by one as wide as a routed
    one. Raises ValueError for what MoEBenchmark refuses, and for a size that does not fit the memory.
    """

    def __init__(
        self,
        config: MoEConfig | None = None,
        *,
        model: str | None = None,
        batch_sizes: Sequence[int] | None = None,
        routings: Sequence[str] = ("uniform", "zipf-1.2"),
        expert_counts: Sequence[int] = EXPERT_COUNTS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        num_iterations: int = 30,
        seed: int = 0,
        row_budget_s: float = 0.3,
    ) -> None:
        preset = default_preset(device)
        on_gpu = choose_device(device).type == "cuda"
        sizes = tuple(batch_sizes) if batch_sizes else ((64, 512, 4096) if on_gpu else (64, 256))
        common: dict[str, Any] = dict(
            device=device, dtype=dtype, num_iterations=num_iterations, seed=seed, row_budget_s=row_budget_s
        )
        self.variants = variants()
        self._layer = MoEBenchmark(
            config=config or PRESETS[preset],
            model=model or ("custom" if config else preset),
            batch_sizes=sizes,
            routings=routings,
            **common,
        )
        c = self._layer.config
        plain = MoEConfig(c.input_dim, c.expert_dim, c.hidden_dim, max(expert_counts), 1, activation=c.activation)
        self._sweep = [
            MoEBenchmark(
                config=replace(plain, num_experts=experts, top_k=min(c.top_k, min(expert_counts))),
                model=f"{experts} experts",
                batch_sizes=(max(sizes),),
                providers=(BASELINE, "torch_grouped_mm", "moe_gpu"),
                **common,
            )
            for experts in expert_counts
        ]
        self.num_iterations, self.row_budget_s, self.seed = num_iterations, row_budget_s, seed

    @property
    def num_steps(self) -> int:
        """Rows that `run` makes, machine and ceilings aside."""
        problems = len(self._layer.batch_sizes) * len(self._layer.routings)
        return problems * len(self.variants) + sum(benchmark.num_steps for benchmark in self._sweep)

    def run(self, on_progress: Progress | None = None) -> list[Row]:
        """Machine, ceilings, a row for each variant at each size and routing, and the rows of the sweep."""
        layer, done = self._layer, 0
        machine = describe_machine(layer.device)
        ceilings = timing.measure_ceilings(layer.device, layer.dtype)
        rows: list[Row] = [machine, *ceilings]

        def report(step: int, text: str) -> None:
            if on_progress is not None:
                on_progress(done + step, self.num_steps, text)

        for benchmark in self._sweep:
            rows += benchmark.measure(ceilings, lambda step, _, text: report(step, text))
            done += benchmark.num_steps
        for num_tokens in layer.batch_sizes:
            for routing in layer.routings:
                case = Case(layer.model, layer.config, num_tokens, layer.dtype, routing, "forward", "eager")
                made = timing.attempt(functools.partial(self._set_up, case))
                if made.reason is None:
                    found = self._measure(case, made.value, report)
                else:
                    found = [case.row(variant.name, "failed", reason=made.reason) for variant in self.variants]
                rows += [stamp(self._marked(row), machine) for row in found]
                done += len(self.variants)
        report(0, "done")
        return rows

    def _set_up(self, case: Case) -> tuple[Problem, Expert, WithShared]:
        check_memory(case.config, case.num_tokens, case.dtype, False, self._layer.device)
        problem = make_problem(
            case.config, case.num_tokens, case.routing, case.dtype, self._layer.device, seed=self.seed
        )
        shared = make_shared_expert(problem, self.seed)
        return problem, shared, WithShared(problem, shared)

    def _measure(
        self, case: Case, made: tuple[Problem, Expert, WithShared], report: Callable[[int, str], None]
    ) -> list[BenchmarkRow]:
        problem, shared, checker = made
        schedulers: list[BatchScheduler] = []
        providers = {
            variant.name: Provider(
                variant.name,
                functools.partial(_unavailable, variant.parts),
                functools.partial(_build, variant.parts, shared, schedulers),
            )
            for variant in self.variants
        }

        def tell(index: int, name: str) -> None:
            report(index, f"{case} {name}")

        one_pass = Pass(case, problem, checker, {})
        try:
            return measure_pass(
                one_pass, list(providers), self.num_iterations, self.row_budget_s, tell, known=providers
            )
        finally:
            gc.collect()  # graphs go before the partitions that they were captured in
            for scheduler in schedulers:
                scheduler.close()

    def _marked(self, row: BenchmarkRow) -> BenchmarkRow:
        """The row as one of an ablation: how it is launched, and no rates, since they leave the shared expert out."""
        parts = next(variant.parts for variant in self.variants if variant.name == row.provider)
        launch = "graph" if GRAPHS in parts else "eager"
        return replace(row, scope=ABLATION, launch=launch, flops=None, min_bytes=None, tflops=None, gbps=None)


def print_ablation(rows: Sequence[Row]) -> None:
    """A table for each size and routing: milliseconds, and speed over the baseline and over the variant before."""
    found = [row for row in select(rows, BenchmarkRow) if row.scope == ABLATION]
    for case in dict.fromkeys((row.model, row.num_tokens, row.routing) for row in found):
        group = {row.provider: row for row in found if (row.model, row.num_tokens, row.routing) == case}
        print(f"{case[0]} with a shared expert, T={case[1]}, {case[2]} routing, forward")
        whole = group[f"+ {PARTS[-1]}"].p50_ms
        print(f"  {'':28}{'ms':>10}{'over baseline':>16}{'over all parts':>16}")
        for name, row in group.items():
            if row.p50_ms is None:
                print(f"  {name:28}{row.status}: {row.reason}")
                continue
            base = group["baseline"].p50_ms
            ratios = ["-" if other is None else f"{other / row.p50_ms:.2f}x" for other in (base, whole)]
            print(f"  {name:28}{row.p50_ms:>10.4f}{ratios[0]:>16}{ratios[1]:>16}")
