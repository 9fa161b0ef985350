"""Loads that shift, for the table `adaptive`: rows a call of each tenant, the same in every run or of a trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_gpu.profiler import RoutingTrace
from moe_gpu.slices.plan import groups_of

MOST_STEPS = 240


@dataclass(frozen=True)
class ShiftingLoad:
    """Rows a call of each tenant, step by step. groups: each tenant's experts, consecutive.

    merged: without slices all tenants' rows are one grouped product, as in a layer; else a call of each, side by side.
    """

    name: str
    groups: Sequence[tuple[int, ...]]
    steps: tuple[tuple[int, ...], ...]
    merged: bool

    def rows_E(self, step: int, num_experts: int) -> list[float]:
        """Rows of every expert: a tenant's are spread evenly over its experts, as far as they go."""
        rows_E = [0.0] * num_experts
        for group, rows in zip(self.groups, self.steps[step], strict=True):
            for place, expert in enumerate(group):
                rows_E[expert] = float(rows // len(group) + (place < rows % len(group)))
        return rows_E


def groups_of_experts(num_experts: int, quiet: int, phase: int) -> ShiftingLoad:
    """Four groups of a layer, `phase` steps each: quiet, a hot group that moves, a step change of all, one idle."""
    hot = [tuple(16 * quiet if group == warm else quiet for group in range(4)) for warm in range(4)]
    phases = [(quiet,) * 4, *hot, (8 * quiet,) * 4, (quiet, quiet, quiet, 0)]
    name = "four groups of experts"
    return ShiftingLoad(name, groups_of(num_experts, 4), _repeated(phases, phase), merged=True)


def unequal_jobs(num_experts: int, small: int, phase: int) -> ShiftingLoad:
    """Two jobs, one with 64 times the other's load: it slackens, they change places, both are busy, one idles."""
    large = 64 * small
    phases = [(large, small), (large // 4, small), (small, large), (large, large), (large, 0)]
    return ShiftingLoad("two unequal jobs", groups_of(num_experts, 2), _repeated(phases, phase), merged=False)


def recorded_load(trace: RoutingTrace, layer: int, tokens: int) -> ShiftingLoad:
    """Four groups at a trace's loads, rounded to steps of a factor of 1.4, since each size takes a graph of its own."""
    groups = groups_of(trace.num_experts, 4)
    counts_CE = trace.calls_LCE(tokens)[layer].tolist()
    steps = [tuple(_rounded(sum(counts[expert] for expert in group)) for group in groups) for counts in counts_CE]
    steps = [rows for rows in steps if any(rows)][:MOST_STEPS]
    if not steps:
        raise ValueError(f"the routing trace of {trace.source} holds no tokens; record one with `moe-gpu demo`")
    return ShiftingLoad(f"recorded: {trace.source}", groups, tuple(steps), merged=True)


def _rounded(rows: int) -> int:
    return round(2 ** (round(2 * math.log2(rows)) / 2)) if rows else 0


def _repeated(phases: Sequence[tuple[int, ...]], steps: int) -> tuple[tuple[int, ...], ...]:
    return tuple(rows for rows in phases for _ in range(steps))
