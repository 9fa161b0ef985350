"""The table `adaptive`: every policy, and no slices, over the same load that shifts, step by step in one run.

Each policy has a manager that carries its plans out. A tenant's work is a graph captured in its slice before the step
is timed. A step's time is the caller's, from the first replay until the last slice is done: the median of repeats in
each of which every policy has one turn, so that all meet the same clocks. The order is drawn anew for each: with one
order throughout, the same graphs took 3 % longer for one policy than for another. Before the first step each has
decided once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.results import SliceSeries, percentile
from moe_gpu.slice_bench.bench import Part, SliceBench
from moe_gpu.slice_bench.loads import ShiftingLoad, groups_of_experts, recorded_load, unequal_jobs
from moe_gpu.slices.costs import CostTable, cached_costs
from moe_gpu.slices.device import DeviceDescription, described_device, present_device
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy

TOTAL_SLICES = 8
UNSLICED = "not sliced"

Launch = tuple[Part, Callable[[], Any]]


@dataclass
class _Arm:
    """One policy over the load: its manager (None: never sliced), and what was seen so far."""

    name: str
    manager: AdvancedGPUSliceManager | None
    why_changed: str | None = None
    sms: list[list[int] | None] = field(default_factory=list)
    time_ms: list[float] = field(default_factory=list)
    samples_ms: list[float] = field(default_factory=list)
    changes: list[str | None] = field(default_factory=list)
    prepare_ms: list[float] = field(default_factory=list)

    @property
    def plan_sms(self) -> list[int] | None:
        """What each slice got, or on a described device would be asked for; None while not sliced."""
        if self.manager is None or not self.manager.plan.sliced:
            return None
        return [item.got_sms or item.asked_sms for item in self.manager.slices]

    def decide(self, rows_E: Sequence[float], time_ms: float | None = None) -> None:
        """Tell the manager what came and how long it took, and let it decide on the next step."""
        if self.manager is None:
            return
        self.manager.observe(rows_E)
        if time_ms is not None:
            self.manager.record_time(time_ms)
        decision = self.manager.optimize_allocations()
        self.why_changed = decision.reason[:300] if decision.changed else None


class _Steps:
    """The work of one load in slices: graphs by stream, tenant and rows, made once and kept until the end."""

    def __init__(self, bench: SliceBench, load: ShiftingLoad) -> None:
        self._bench, self._load = bench, load
        self._plain = [bench.whole() for _ in load.groups]
        self._made: dict[tuple[object, ...], Callable[[], Any]] = {}

    def prepare(self, arm: _Arm, step: int) -> list[Launch]:
        """What an arm launches in a step; milliseconds of what had to be captured for it go to `arm.prepare_ms`."""
        begin, made = time.perf_counter(), len(self._made)
        rows = self._load.steps[step]
        everybody = tuple(range(len(rows)))
        if arm.plan_sms is not None:
            assert arm.manager is not None
            launches = []
            for tenant, item in enumerate(arm.manager.slices):
                with arm.manager.enter(item.tenant) as run:
                    part = Part(run.sm_budget or self._bench.num_sms, run.stream)
                launches += self._launch(part, (tenant,), rows)
        elif self._load.merged:
            launches = self._launch(self._plain[0], everybody, rows)
        else:
            launches = [one for n in everybody for one in self._launch(self._plain[n], (n,), rows)]
        if len(self._made) > made:
            arm.prepare_ms.append((time.perf_counter() - begin) * 1e3)
        return launches

    def _launch(self, part: Part, tenants: tuple[int, ...], rows: tuple[int, ...]) -> list[Launch]:
        if not any(rows[tenant] for tenant in tenants):
            return []
        stream = None if part.stream is None else part.stream.cuda_stream
        key = (stream, part.sms, tenants, tuple(rows[tenant] for tenant in tenants))
        if key not in self._made:
            ids = torch.cat([self._ids(tenant, rows[tenant]) for tenant in tenants])
            self._made[key] = self._bench.graphed(self._bench.products(ids, part.sms), part)
        return [(part, self._made[key])]

    def _ids(self, tenant: int, rows: int) -> torch.Tensor:
        group = self._load.groups[tenant]
        return torch.arange(rows, device=self._bench.device, dtype=torch.int32) % len(group) + group[0]

    def busy_ms(self, launches: Sequence[Launch]) -> list[float]:
        """Each launch's own milliseconds while all run side by side; not timed as a step."""
        if not self._bench.on_gpu:
            return [_timed(launch) for launch in launches]
        marks = []
        for part, replay in launches:
            with part.current():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replay()
                end.record()
            marks.append((begin, end))
        for part, _ in launches:
            part.wait()
        return [begin.elapsed_time(end) for begin, end in marks]


def _timed(*launches: Launch) -> float:
    """Milliseconds from the first launch until the last part is done."""
    begin = time.perf_counter()
    for part, replay in launches:
        with part.current():
            replay()
    for part, _ in launches:
        part.wait()
    return (time.perf_counter() - begin) * 1e3


def measure_adaptive(bench: SliceBench) -> None:
    """Every policy and no slices over loads that shift: times, plan changes, and a series for the report."""
    costs, device = _costs(bench), _device(bench)
    sizes, experts = bench.sizes, bench.config.num_experts
    loads = [groups_of_experts(experts, sizes.quiet_rows, sizes.phase_steps)]
    loads.append(unequal_jobs(experts, sizes.quiet_rows // 2, sizes.phase_steps))
    if bench.trace is not None:
        loads.append(recorded_load(*bench.trace))
    for load in loads:
        try:
            _measure(bench, load, costs, device)
        finally:
            bench.release_graphs()


def _costs(bench: SliceBench) -> CostTable:
    """Measured in this run, else left by an earlier one for the same work."""
    costs = bench.costs or cached_costs(bench.machine.device)
    if costs is None or (costs.model, costs.dtype) != (bench.preset, str(bench.dtype)[6:]):
        found = "there are none" if costs is None else f"those found are of {costs.model} in {costs.dtype}"
        raise BackendUnavailableError(f"ADAPTIVE needs costs of {bench.preset}, {found}; measure the table cost first")
    return costs


def _device(bench: SliceBench) -> DeviceDescription:
    if bench.on_gpu:
        return present_device(bench.device.index)
    return replace(described_device("NVIDIA H200"), name=bench.machine.device)


def _arms(load: ShiftingLoad, costs: CostTable, device: DeviceDescription) -> list[_Arm]:
    arms = [_Arm(UNSLICED, None)]
    for policy in SliceAllocationPolicy:
        manager = AdvancedGPUSliceManager(TOTAL_SLICES, policy, device, "green_context", costs=costs)
        for group in load.groups:
            manager.allocate_slices(group[0], TOTAL_SLICES // len(load.groups), experts=group)
        arms.append(_Arm(policy.value, manager))
    return arms


def _measure(bench: SliceBench, load: ShiftingLoad, costs: CostTable, device: DeviceDescription) -> None:
    arms, steps = _arms(load, costs, device), _Steps(bench, load)
    try:
        for arm in arms:
            arm.decide(load.rows_E(0, bench.config.num_experts))
            arm.why_changed = None
        for step in range(len(load.steps)):
            if time.monotonic() > bench.deadline:
                break
            _run_step(bench, load, steps, arms, step)
    finally:
        for arm in arms:
            if arm.manager is not None:
                arm.manager.close()
    _add_rows(bench, load, arms)


def _run_step(bench: SliceBench, load: ShiftingLoad, steps: _Steps, arms: Sequence[_Arm], step: int) -> None:
    launches = [steps.prepare(arm, step) for arm in arms]
    samples: list[list[float]] = [[] for _ in arms]
    for arm, own in zip(arms, launches, strict=True):
        busy_ms = steps.busy_ms(own)  # also the first run of a new graph
        if arm.manager is not None and arm.plan_sms is not None:
            active = [group[0] for group, rows in zip(load.groups, load.steps[step], strict=True) if rows]
            shares = {tenant: time_ms / max(busy_ms) for tenant, time_ms in zip(active, busy_ms, strict=True)}
            for group in load.groups:
                arm.manager.update_slice_utilization(group[0], min(1.0, shares.get(group[0], 0.0)))
    chance = random.Random(step)
    for _ in range(bench.sizes.step_repeats):
        for index in chance.sample(range(len(arms)), len(arms)):
            samples[index].append(_timed(*launches[index]))
    rows_E = load.rows_E(step, bench.config.num_experts)
    for arm, times in zip(arms, samples, strict=True):
        time_ms = percentile(times, 0.5)
        arm.samples_ms += times
        arm.time_ms.append(time_ms)
        arm.sms.append(arm.plan_sms)
        arm.changes.append(arm.why_changed)
        arm.decide(rows_E, time_ms)


def _add_rows(bench: SliceBench, load: ShiftingLoad, arms: Sequence[_Arm]) -> None:
    done = len(arms[0].time_ms)
    what = f"{load.name}, {done} of {len(load.steps)} steps"
    tenants = [f"experts {group[0]} to {group[-1]}" for group in load.groups]
    for arm in arms:
        total = sum(arm.time_ms)
        facts: dict[str, Any] = dict(samples=len(arm.samples_ms), value=total, unit="ms")
        if done:
            facts |= {f"p{share}_ms": percentile(arm.samples_ms, share / 100) for share in (50, 99)}
        bench.add("adaptive", arm.name, what, **facts)
        others = [sum(other.time_ms) for other in arms if other is not arm]
        if done:
            bench.add("adaptive", arm.name, f"{what}: over the best other", value=total / min(others), unit="ratio")
        changes = float(sum(why is not None for why in arm.changes))
        bench.add("adaptive", arm.name, f"{what}: plan changes", value=changes, unit="changes")
        if arm.prepare_ms:
            facts = dict(
                samples=len(arm.prepare_ms), p50_ms=percentile(arm.prepare_ms, 0.5), max_ms=max(arm.prepare_ms)
            )
            bench.add("adaptive", arm.name, f"{what}: graphs captured before a step", **facts)
        bench.add_series(
            SliceSeries(
                load.name, arm.name, "ok", None, tenants, [list(rows) for rows in load.steps[:done]],
                arm.sms, arm.time_ms, arm.changes,
            )
        )  # fmt: skip
    splits = {tuple(sms) for arm in arms for sms in arm.sms if sms is not None}
    bench.add("adaptive", "-", f"{what}: different splits", value=float(len(splits)), unit="splits")
