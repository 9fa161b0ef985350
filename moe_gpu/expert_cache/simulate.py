"""Replay a routing trace through the cache's own bookkeeping: hit rates and copies of every policy, without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_gpu.expert_cache.book import CacheBook, Counts
from moe_gpu.expert_cache.budget import HbmBudgetError, parse_budget
from moe_gpu.expert_cache.policies import POLICIES
from moe_gpu.profiler import RoutingTrace
from moe_gpu.results import ExpertCacheRow

OPTIMAL = "optimal"
SIMULATED = (*POLICIES, OPTIMAL)
"""`static` has the trace's own counts for its profile, the best that pinning can do in hindsight; `optimal` evicts what
is needed again last (Belady's rule), which no policy that must wait for the future can beat by much."""


def needed_by_step(trace: RoutingTrace, tokens_per_step: int) -> np.ndarray:
    """(steps, L, E) bool: the experts that each step of so many consecutive tokens needs; the last may be shorter."""
    if tokens_per_step < 1:
        raise ValueError(f"tokens_per_step={tokens_per_step} must be at least 1")
    ids_LTK = trace.topk_ids_LTK.numpy()
    layers, tokens, _ = ids_LTK.shape
    if tokens == 0:
        raise ValueError(f"the routing trace of {trace.source} holds no tokens; record it again")
    steps = -(-tokens // tokens_per_step)
    needed = np.zeros((steps, layers, trace.num_experts + 1), dtype=bool)
    bins = np.where((ids_LTK >= 0) & (ids_LTK < trace.num_experts), ids_LTK, trace.num_experts)
    step_of_T = np.arange(tokens) // tokens_per_step
    for layer in range(layers):
        needed[step_of_T[:, None], layer, bins[layer]] = True
    return needed[:, :, :-1]


def next_use(needed: np.ndarray) -> np.ndarray:
    """(steps, L, E): the next step after each that needs an expert; the number of steps if none does."""
    following = np.full(needed.shape, len(needed), dtype=np.int64)
    for step in range(len(needed) - 2, -1, -1):
        following[step] = np.where(needed[step + 1], step + 1, following[step + 1])
    return following


def simulate(
    trace: RoutingTrace,
    budget_experts: int,
    policy: str = "auto",
    *,
    tokens_per_step: int = 1,
    prefetch: bool = True,
    expert_bytes: int | None = None,
) -> ExpertCacheRow:
    """What a cache of `budget_experts` slots a layer would have done on a trace, counted in copies of one expert.

    policy: one of SIMULATED. Steps are consecutive tokens of the trace. `optimal`, `static` and `on-demand` never
    prefetch. Raises ValueError for a policy that does not exist or a budget outside 1 ... E.
    """
    if policy not in SIMULATED:
        raise ValueError(f"policy={policy!r} is not one of {', '.join(SIMULATED)}")
    if not 1 <= budget_experts <= trace.num_experts:
        raise ValueError(f"budget_experts={budget_experts} must be from 1 to the trace's {trace.num_experts} experts")
    needed = needed_by_step(trace, tokens_per_step)
    ahead = next_use(needed) if policy == OPTIMAL else None
    prefetch = prefetch and policy not in ("on-demand", "static", OPTIMAL)
    profile = trace.counts_LE().tolist() if policy == "static" else None
    sizes = [(trace.num_experts, budget_experts, 1)] * trace.num_layers
    book = CacheBook(sizes, "static" if policy == OPTIMAL else policy, prefetch, profile)
    for step, needed_LE in enumerate(needed):
        for layer, needed_E in enumerate(needed_LE):
            if ahead is not None:
                book.layers[layer].history.set_profile((-ahead[step, layer]).tolist())
            ids = np.flatnonzero(needed_E).tolist()
            book.plan(layer, ids)
            book.learn(layer, ids)
            book.prefetch(layer, ids)
    return ExpertCacheRow(
        trace.source,
        policy,
        trace.num_layers,
        trace.num_experts,
        trace.top_k,
        budget_experts,
        tokens_per_step,
        simulated=True,
        prefetch=prefetch,
        serving=OPTIMAL if policy == OPTIMAL else book.contest.serving,
        policy_switches=book.contest.switches,
        expert_bytes=expert_bytes,
        bytes_copied=None if expert_bytes is None else expert_bytes * book.counts.bytes_copied,
        **counted(book.counts, 1),
    )


def counted(counts: Counts, expert_bytes: int) -> dict[str, Any]:
    """A cache's counts as fields of a row."""
    requests = counts.hits + counts.misses
    return dict(
        steps=counts.steps,
        hits=counts.hits,
        misses=counts.misses,
        hit_rate=counts.hits / requests if requests else None,
        copies=counts.bytes_copied // expert_bytes,
        copies_prefetched=counts.bytes_prefetched // expert_bytes,
        copies_wasted=counts.bytes_wasted // expert_bytes,
        evictions=counts.evictions,
    )


def slots_of(budget: str, num_experts: int) -> int:
    """Slots a layer of `8` (experts) or `25%`. Raises ValueError for anything that is not from one to all experts."""
    if budget.isdecimal():
        slots = int(budget)
    else:
        share = parse_budget(budget)
        if not isinstance(share, float):
            raise HbmBudgetError(f"--budget {budget!r} is not a number of experts or a share; give as 8 or 25%")
        slots = max(1, round(share * num_experts))
    if not 1 <= slots <= num_experts:
        raise HbmBudgetError(f"--budget {budget} must be from 1 to the trace's {num_experts} experts")
    return slots


def run_simulation(
    path: Path,
    budgets: Sequence[str],
    policies: Sequence[str] | None = None,
    tokens_per_step: int = 1,
    prefetch: bool = True,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> list[ExpertCacheRow]:
    """Simulate policies (all by default) at budgets on a trace file and print a table; returns its rows."""
    trace = RoutingTrace.load(path)
    work = [(slots_of(budget, trace.num_experts), policy) for budget in budgets for policy in policies or SIMULATED]
    rows = []
    for done, (slots, policy) in enumerate(work):
        progress(done, len(work), policy)
        rows.append(simulate(trace, slots, policy, tokens_per_step=tokens_per_step, prefetch=prefetch))
    progress(len(work), len(work), "")
    print_rows(rows)
    return rows


def print_rows(rows: Sequence[ExpertCacheRow]) -> None:
    """A table of hit rates and copies a step of one layer."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{rows[0].source}: {rows[0].tokens_per_step} token(s) a step, simulated"
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("slots", "policy", "hit rate", "copies/step", "prefetched", "wasted", "serving"):
        grid.add_column(heading, justify="left" if heading in ("policy", "serving") else "right")
    for row in rows:
        grid.add_row(
            f"{row.slots_per_layer}/{row.num_experts}",
            row.policy,
            "-" if row.hit_rate is None else f"{row.hit_rate:.1%}",
            "-" if row.copies is None or not row.steps else f"{row.copies / row.steps:.2f}",
            "-" if row.copies_prefetched is None else str(row.copies_prefetched),
            "-" if row.copies_wasted is None else str(row.copies_wasted),
            row.serving or "-",
        )
    Console().print(grid)
