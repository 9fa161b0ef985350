"""ADAPTIVE over loads that shift, on described costs: within 2 % of the best other policy and of no slices at all.

Exploration counts, and so does the step in which a load shifts. Where shifts that nothing foretells come often, that
step alone can cost more than 2 %: over random loads the bound is 5 %. Nothing here is a measurement of a GPU. What a
step takes follows a table of costs, the truth; ADAPTIVE plans by that table or by one that errs, and is told times with
1 % of noise. Costs named `h200` are those recorded on an H200. `pytest -s` prints every total.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.results import Machine, SliceRow, read_rows, select
from moe_gpu.slice_bench.loads import ShiftingLoad, groups_of_experts, unequal_jobs
from moe_gpu.slices.costs import CostPoint, CostTable
from moe_gpu.slices.device import described_device
from moe_gpu.slices.plan import groups_of
from moe_gpu.slices.policies import SliceAllocationPolicy

H200 = described_device("H200")
MACHINE = Machine("NVIDIA H200", "cuda", "3.12", "2.11", "Linux", "2026-11-24", compute_capability="9.0", num_sms=132)
RECORDED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "h200_slices_0b827e4.jsonl"
NUM_EXPERTS, ALLOWED, ALLOWED_UNFORESEEN = 128, 1.02, 1.05


def made_up_costs(launch_ms: float, slowdown: float, floor: float, scale: float) -> CostTable:
    """Of no device: a floor, weights that few SMs can read, and products on SMs to the power of `scale`."""
    points = [
        CostPoint(experts, rows, sms, floor + experts * 0.02 / min(sms, 48) + rows * 2e-3 / sms**scale)
        for experts in (1, 8, 32, 128)
        for rows in (1, 128, 1024, 8192, 65536)
        for sms in (8, 16, 32, 64, 96, 128, 132)
    ]
    return CostTable(MACHINE, "made up", "bfloat16", "green_context", tuple(points), slowdown, launch_ms)


def recorded_costs() -> CostTable:
    points, added = [], {}
    for row in select(read_rows(RECORDED), SliceRow):
        if row.table == "cost" and " rows of " in row.what:
            rows, experts = (int(word) for word in row.what.split() if word.isdigit())
            points.append(CostPoint(experts, rows, row.got_sms, row.p50_ms))
        elif row.table == "cost":
            added[row.what] = row.value if row.p50_ms is None else row.p50_ms
    slowdown, launch_ms = added["time beside a busy neighbour"], added["added by a second slice"]
    return CostTable(MACHINE, "recorded", "bfloat16", "green_context", tuple(points), slowdown, launch_ms)


TRUTHS = {
    "helps": lambda: made_up_costs(0.002, 1.02, 0.005, 0.7),
    "close": lambda: made_up_costs(0.005, 1.05, 0.01, 0.9),
    "sometimes": lambda: made_up_costs(0.02, 1.1, 0.01, 0.85),
    "h200": recorded_costs,  # where experts in slices slow each other so much that slicing never helps
}


def points_off(costs: CostTable) -> CostTable:
    chance = random.Random(0)
    wrong = (replace(point, time_ms=point.time_ms * chance.uniform(0.8, 1.2)) for point in costs.points)
    return replace(costs, points=tuple(wrong))


ERRORS = {
    "true table": lambda costs: costs,
    "slices 20 % too cheap": lambda costs: replace(costs, slowdown=costs.slowdown * 0.8),
    "slices 20 % too dear": lambda costs: replace(costs, slowdown=costs.slowdown * 1.2),
    "every point up to 20 % off": points_off,
}


def random_load(seed: int, steps: int = 240) -> ShiftingLoad:
    """Phases of 24 to 64 steps, at random quiet, with a hot tenant, heavy, with an idle one, or uneven; some noisy."""
    chance = random.Random(seed)
    count, scale = chance.choice((2, 2, 3, 4, 4)), chance.choice((16, 64, 256, 1024))
    found: list[tuple[int, ...]] = []
    while len(found) < steps:
        base = [scale] * count
        kind = chance.choice(("quiet", "hot", "heavy", "idle", "uneven"))
        if kind in ("hot", "idle"):
            base[chance.randrange(count)] *= 16 if kind == "hot" else 0
        if kind in ("heavy", "uneven"):
            base = [4 * scale if kind == "heavy" else int(scale * 2 ** chance.uniform(-2, 3)) for _ in base]
        noise = chance.choice((0, 0, 0.05, 0.15))
        for _ in range(chance.randint(24, 64)):
            found.append(tuple(int(rows * chance.uniform(1 - noise, 1 + noise)) for rows in base))
    groups = [group[:32] for group in groups_of(NUM_EXPERTS, count)]
    return ShiftingLoad(f"random {seed}", groups, tuple(found[:steps]), merged=True)


LOADS = [groups_of_experts(NUM_EXPERTS, 128, 24), unequal_jobs(NUM_EXPERTS, 64, 24), *map(random_load, range(3))]


def work_of(load: ShiftingLoad, rows: tuple[int, ...]) -> list[tuple[float, float]]:
    """Active experts and rows of every tenant."""
    return [(float(min(row, len(group))), float(row)) for group, row in zip(load.groups, rows, strict=True)]


def true_ms(truth: CostTable, sms: tuple[int, ...] | None, work: list[tuple[float, float]]) -> float:
    if sms is None:
        return truth.time_ms(sum(experts for experts, _ in work), sum(rows for _, rows in work), H200.num_sms)
    return truth.sliced_ms([(*one, part) for one, part in zip(work, sms, strict=True)])


def simulate(load: ShiftingLoad, policy: SliceAllocationPolicy, truth: CostTable, table: CostTable) -> list[float]:
    manager = AdvancedGPUSliceManager(8, policy, H200, "green_context", costs=table, log_size=1000)
    for group in load.groups:
        manager.allocate_slices(group[0], 8 // len(load.groups), experts=group)
    chance, times = random.Random(0), []
    manager.optimize_allocations(load.rows_E(0, NUM_EXPERTS))
    for step, rows in enumerate(load.steps):
        work = work_of(load, rows)
        sms = manager.plan.sms if manager.plan.sliced else None
        times.append(true_ms(truth, sms, work))
        if sms is not None:
            spent = [truth.time_ms(*one, part) for one, part in zip(work, sms, strict=True)]
            for group, busy_ms in zip(load.groups, spent, strict=True):
                manager.update_slice_utilization(group[0], busy_ms / max(spent))
        manager.observe(load.rows_E(step, NUM_EXPERTS))
        manager.record_time(times[-1] * chance.lognormvariate(0, 0.01))
        manager.optimize_allocations()
    return times


def unsliced_ms(load: ShiftingLoad, truth: CostTable) -> list[float]:
    return [true_ms(truth, None, work_of(load, rows)) for rows in load.steps]


costs_of = functools.cache(lambda truth: TRUTHS[truth]())
OTHERS: dict[tuple[str, str], dict[str, list[float]]] = {}  # by load and truth: of the tables others know nothing


def times_of_others(load: ShiftingLoad, truth: str) -> dict[str, list[float]]:
    if (load.name, truth) not in OTHERS:
        costs = costs_of(truth)
        others = [policy for policy in SliceAllocationPolicy if policy is not SliceAllocationPolicy.ADAPTIVE]
        times = {policy.value: simulate(load, policy, costs, costs) for policy in others}
        OTHERS[load.name, truth] = times | {"not sliced": unsliced_ms(load, costs)}
    return OTHERS[load.name, truth]


def over_the_best(load: ShiftingLoad, truth: str, error: str) -> float:
    """ADAPTIVE's total over that of the best other policy, or of no slices."""
    costs, times = costs_of(truth), times_of_others(load, truth)
    adaptive = simulate(load, SliceAllocationPolicy.ADAPTIVE, costs, ERRORS[error](costs))
    ours, totals = sum(adaptive), {name: sum(steps) for name, steps in times.items()}
    best = min(totals, key=totals.__getitem__)
    worst = max(a - b for a, b in zip(adaptive, times[best], strict=True)) / totals[best]
    print(f"\n{truth}, {error}, {load.name}: {ours / totals[best]:.4f} of {best}, worst step {worst:+.2%}", end="")
    return ours / totals[best]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("truth", TRUTHS)
def test_adaptive_stays_within_two_percent_of_the_best_other_over_a_shifting_load(truth, error):
    for load in LOADS:
        assert over_the_best(load, truth, error) <= ALLOWED, load.name


@given(st.integers(3, 1 << 20), st.sampled_from(sorted(TRUTHS)), st.sampled_from(sorted(ERRORS)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_shifts_that_nothing_foretells_cost_adaptive_little(seed, truth, error):
    assert over_the_best(random_load(seed), truth, error) <= ALLOWED_UNFORESEEN


def test_without_slices_that_pay_nobody_pays_for_them():
    """On the costs recorded on an H200 every split loses; ADAPTIVE leaves the whole GPU to everybody but to explore."""
    load, costs = LOADS[0], recorded_costs()
    adaptive, whole = simulate(load, SliceAllocationPolicy.ADAPTIVE, costs, costs), unsliced_ms(load, costs)
    assert sum(a == pytest.approx(b) for a, b in zip(adaptive, whole, strict=True)) >= 0.95 * len(whole)
    assert min(sum(simulate(load, policy, costs, costs)) for policy in list(SliceAllocationPolicy)[:3]) > sum(whole)
