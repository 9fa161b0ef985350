"""AdvancedGPUSliceManager: who holds which slice of a GPU, and when that changes. GPUSliceOptimizer: keeps it going.

Policies (`slices/policies.py`) only say what would be best; here tenants come, go and are evicted, a plan is kept until
another is better by more than a margin, backends carry plans out, and a log says why.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from moe_gpu.profiler import ExpertProfiler
from moe_gpu.slices.backends import ENFORCEMENT, PlanningBackend, SliceRun, entered, make_backend
from moe_gpu.slices.costs import CostTable, cached_costs
from moe_gpu.slices.device import DeviceDescription, find_device
from moe_gpu.slices.forecast import LoadForecaster
from moe_gpu.slices.plan import (
    ExpertAllocation,
    GPUSlice,
    PlanError,
    SliceError,
    SlicePlan,
    SliceUnavailableError,
    unsliced,
)
from moe_gpu.slices.policies import (
    SLICING_GAIN,
    Choice,
    LoadProfile,
    Setting,
    SliceAllocationPolicy,
    TenantLoad,
    choose_plan,
    plan_static,
    predict_ms,
    pressure,
)

MIN_GAIN = 0.1  # of pressure: a plan by load that promises less than this is not worth a change
MIN_PREDICTED_GAIN = 0.01  # of predicted time
LEARNT = 0.3  # of what a measured time says about a correction
MOST_CHANGE = 2.0  # of a correction by one measured time: one hiccup must not condemn a plan


@dataclass(frozen=True)
class Decision:
    """One entry of the log: what was proposed, whether the plan changed, and why. Times in seconds of `time.monotonic`.

    predicted_ms: of every candidate that ADAPTIVE compared. pressure: largest share of load over share of SMs.
    """

    at_s: float
    changed: bool
    reason: str
    rule: str
    sms: tuple[int, ...]
    pressure_before: float | None = None
    pressure_after: float | None = None
    predicted_ms: Mapping[str, float | None] | None = None
    explored: bool = False


class AdvancedGPUSliceManager:
    """Slices of one GPU among experts, or groups of experts, by a policy; at most `total_slices`.

    device: a DeviceDescription, "cuda", or a GPU's name; by default the GPU that is here, and on a machine without one
    a described H200, where plans are made and nothing is carried out (`get_stats()["simulated"]`). backend: `cta`,
    `green_context` or `device` (not sliced). costs: what ADAPTIVE predicts with, by default
    what `moe-gpu slices bench` left for this GPU model, if anything. seed: of its exploration.
    carry_out=False only plans, also on a GPU that is here.
    Raises SliceError or ValueError for what cannot be; a refused call changes nothing.
    """

    def __init__(
        self,
        total_slices: int = 8,
        policy: SliceAllocationPolicy = SliceAllocationPolicy.DYNAMIC,
        device: DeviceDescription | str | None = None,
        backend: str = "cta",
        *,
        costs: CostTable | None = None,
        seed: int = 0,
        log_size: int = 256,
        carry_out: bool = True,
    ) -> None:
        if not isinstance(policy, SliceAllocationPolicy):
            names = ", ".join(known.name for known in SliceAllocationPolicy)
            raise ValueError(f"policy={policy!r} must be a SliceAllocationPolicy, one of {names}")
        if not isinstance(total_slices, int) or total_slices < 1:
            raise ValueError(f"total_slices={total_slices!r} must be an integer of at least 1")
        self.device = device if isinstance(device, DeviceDescription) else find_device(device)
        if total_slices > self.device.num_sms:
            raise SliceError(
                f"total_slices={total_slices} exceeds the {self.device.num_sms} SMs of {self.device.name}; use fewer"
            )
        self.policy, self.total_slices = policy, total_slices
        self.setting = Setting(self.device, backend, total_slices)
        self._backend = make_backend(backend, self.device) if carry_out else PlanningBackend(backend)
        if costs is None and policy is SliceAllocationPolicy.ADAPTIVE:
            costs = cached_costs(self.device.name)
        self.costs = costs
        if costs is not None and costs.machine.device != self.device.name:
            raise SliceError(
                f"the costs are of {costs.machine.device}, the device is {self.device.name}; measure them there"
            )
        self._allocations: dict[int, ExpertAllocation] = {}
        self._utilization: dict[int, float] = {}
        self._rows: dict[int, tuple[float, float]] = {}  # rows and active experts a call, as last seen
        self._unassigned_share: float | None = None
        self._forecaster = LoadForecaster()
        self._corrections: dict[str, float] = {}
        self._random = random.Random(seed)
        self.log: deque[Decision] = deque(maxlen=log_size)
        self.reallocations = self.evictions = 0
        first = unsliced(self.device, "nobody asks for a slice")
        self.plan = replace(first, slices=self._backend.carry_out(first))

    @property
    def slices(self) -> tuple[GPUSlice, ...]:
        """The slices as they are now, with what the device gave."""
        return self.plan.slices

    @property
    def allocations(self) -> tuple[ExpertAllocation, ...]:
        """Who is entitled to slices, in the order of arrival."""
        return tuple(self._allocations.values())

    @property
    def free_slices(self) -> int:
        return self.total_slices - sum(held.required_slices for held in self._allocations.values())

    def allocate_slices(
        self, expert_id: int, required_slices: int = 1, priority: int = 0, experts: Sequence[int] | None = None
    ) -> ExpertAllocation:
        """Entitle an expert, or `experts` as a group under the name `expert_id`, to some of the slices.

        Where too few are free, holders of lower priority are evicted: the lowest first, of these the least busy, and no
        more than needed. Raises SliceUnavailableError where even that does not do, SliceError for a wrong request.
        """
        group = (expert_id,) if experts is None else tuple(experts)
        if expert_id < 0 or not group or min(group) < 0:
            raise SliceError(f"expert_id={expert_id} and experts={group} must name experts from 0 on")
        if expert_id in self._allocations:
            held = self._allocations[expert_id].required_slices
            raise SliceError(f"expert {expert_id} already holds {held} slices; release them first")
        owned = {expert: held.expert_id for held in self.allocations for expert in held.experts}
        taken = [expert for expert in group if expert in owned]
        if taken or len(set(group)) < len(group):
            owner = f"already belongs to {owned[taken[0]]}" if taken else "is named twice"
            raise SliceError(f"expert {(taken or group)[0]} {owner}; an expert is in one slice")
        if required_slices < 1:
            raise SliceError(f"required_slices={required_slices} must be at least 1")
        if required_slices > self.total_slices:
            raise SliceError(
                f"required_slices={required_slices} exceeds total_slices={self.total_slices}; ask for fewer"
            )
        victims = self._victims(required_slices - self.free_slices, priority)
        wanted = ExpertAllocation(expert_id, required_slices, priority, group)
        kept = {name: held for name, held in self._allocations.items() if name not in victims}
        allocations = {**kept, expert_id: wanted}
        evicted = f", evicting {', '.join(map(str, victims))}" if victims else ""
        self._replan(allocations, f"{expert_id} asked for {required_slices} slices at priority {priority}{evicted}")
        self.evictions += len(victims)
        return wanted

    def _victims(self, missing: int, priority: int) -> list[int]:
        """Who must go for `missing` slices; SliceUnavailableError where nobody may."""
        if missing <= 0:
            return []
        lower = [held for held in self._allocations.values() if held.priority < priority]
        lower.sort(key=lambda held: (held.priority, self._utilization.get(held.expert_id, 0.0), held.expert_id))
        chosen: list[ExpertAllocation] = []
        for held in lower:
            if sum(victim.required_slices for victim in chosen) < missing:
                chosen.append(held)
        found = sum(held.required_slices for held in chosen)
        if found < missing:
            raise SliceUnavailableError(
                f"{missing} of the {self.total_slices} slices are missing and {found} are held at a priority below "
                f"{priority}; release some, ask for fewer or at a higher priority"
            )
        for held in sorted(chosen, key=lambda held: -held.priority):  # spare whoever is not needed after all
            if found - held.required_slices >= missing:
                found -= held.required_slices
                chosen.remove(held)
        return [held.expert_id for held in chosen]

    def release_slices(self, expert_id: int) -> int:
        """Give back what an expert holds; returns how many slices. SliceError where it holds none."""
        if expert_id not in self._allocations:
            raise SliceError(
                f"expert {expert_id} holds no slice; these do: {', '.join(map(str, self._allocations)) or 'none'}"
            )
        allocations = {name: held for name, held in self._allocations.items() if name != expert_id}
        held = self._allocations[expert_id].required_slices
        self._replan(allocations, f"{expert_id} released {held} slices")
        return held

    def _replan(self, allocations: dict[int, ExpertAllocation], why: str) -> None:
        """Take on other tenants, in the slices that they asked for; the policy resizes them at its next turn."""
        profile = LoadProfile(tuple(TenantLoad(held) for held in allocations.values()))
        if self.setting.backend == "device" or not allocations:
            plan = unsliced(self.device, why)
        else:
            plan = replace(plan_static(profile, self.setting), reason=why)
        self._adopt(plan, Decision(time.monotonic(), True, why, plan.rule, plan.sms))
        self._allocations = allocations
        self._utilization = {name: value for name, value in self._utilization.items() if name in allocations}
        self._rows = {name: value for name, value in self._rows.items() if name in allocations}

    def _adopt(self, plan: SlicePlan, decision: Decision) -> None:
        self.plan = replace(plan, slices=self._backend.carry_out(plan))  # first what may fail
        self.log.append(decision)

    def update_slice_utilization(self, expert_id: int, utilization: float) -> None:
        """Report how busy a tenant kept its slice of late, 0 to 1; DYNAMIC and evictions go by it."""
        if expert_id not in self._allocations:
            raise SliceError(f"expert {expert_id} holds no slice; allocate one first")
        if not 0 <= utilization <= 1:
            raise SliceError(f"utilization={utilization} must lie between 0 and 1")
        self._utilization[expert_id] = utilization

    def profile(self, forecast: bool = True) -> LoadProfile:
        """The tenants with their last known loads and, for ADAPTIVE, forecasts."""
        foreseen = forecast and self.policy is SliceAllocationPolicy.ADAPTIVE
        expected = (self._forecaster.forecast() if foreseen else None) or {}
        tenants = []
        for name, held in self._allocations.items():
            rows, active = self._rows.get(name, (None, None))
            busy = self._utilization.get(name)
            tenants.append(TenantLoad(held, rows, active, busy, expected.get(name)))
        return LoadProfile(tuple(tenants), self._forecaster.shift_share if foreseen else 0.0)

    def optimize_allocations(self, rows_E: Sequence[float] | None = None) -> Decision:
        """Let the policy size the slices anew and adopt its plan if it is better by more than a margin.

        rows_E: rows a call of every expert in the last window; without it the last known ones serve.
        """
        learnt = (self._rows, self._unassigned_share, self._forecaster.copy(), self._random.getstate())
        try:
            if rows_E is not None:
                self.observe(rows_E)
            return self._optimize()
        except BaseException:
            self._rows, self._unassigned_share, self._forecaster, drawn = learnt
            self._random.setstate(drawn)
            raise

    def _optimize(self) -> Decision:
        profile = self.profile()
        draw = self._random.random() if self.policy is SliceAllocationPolicy.ADAPTIVE else 1.0
        if self.setting.backend == "device":
            choice = Choice(unsliced(self.device, "backend=device does not slice"))
        else:
            choice = choose_plan(self.policy, profile, self.setting, self.plan, self.costs, self._corrections, draw)
        changed, reason = self._worth(choice, profile)
        decision = Decision(
            time.monotonic(),
            changed,
            reason,
            choice.plan.rule,
            choice.plan.sms if changed else self.plan.sms,
            pressure(self.plan, profile) if profile.tenants else None,
            pressure(choice.plan if changed else self.plan, profile) if profile.tenants else None,
            choice.predicted_ms or None,
            choice.explored,
        )
        if changed:
            self._adopt(choice.plan, decision)
            self.reallocations += 1
        else:
            self.log.append(decision)
        return decision

    def observe(self, rows_E: Sequence[float]) -> None:
        """Take in the last window: rows a call of every expert. `optimize_allocations(rows_E)` does both."""
        needed = max((expert for held in self.allocations for expert in held.experts), default=-1)
        if needed >= len(rows_E):
            raise SliceError(
                f"loads of {len(rows_E)} experts were given, expert {needed} holds a slice; give all loads"
            )
        if min(rows_E, default=0) < 0:
            raise SliceError(f"a load of {min(rows_E)} rows is below 0")
        self._rows = {
            name: (float(sum(rows_E[e] for e in held.experts)), float(sum(rows_E[e] > 0 for e in held.experts)))
            for name, held in self._allocations.items()
        }
        total = sum(rows_E)
        self._unassigned_share = 1 - sum(rows for rows, _ in self._rows.values()) / total if total else None
        self._forecaster.observe({name: rows for name, (rows, _) in self._rows.items()})

    def _worth(self, choice: Choice, profile: LoadProfile) -> tuple[bool, str]:
        """Whether to change to the chosen plan, and why or why not."""
        plan, now = choice.plan, self.plan
        if plan.sms == now.sms and plan.sliced == now.sliced:
            return False, f"stays at {_shown(now)}: {plan.reason}"
        if choice.explored:
            return True, f"to {_shown(plan)}: {plan.reason}"
        if plan.predicted_ms is not None:
            before = None if self.costs is None else predict_ms(now, profile, self.costs, self._corrections)
            if before is not None:
                gain = 1 - plan.predicted_ms / before if before else 0.0
                if gain <= (MIN_PREDICTED_GAIN if plan.sliced else MIN_PREDICTED_GAIN - SLICING_GAIN):
                    return False, f"stays at {_shown(now)}: {_shown(plan)} would gain {gain:.1%}; {plan.reason}"
        elif self.policy is SliceAllocationPolicy.PROPORTIONAL:
            before, after = pressure(now, profile), pressure(plan, profile)
            if now.sliced and before and after and 1 - after / before < MIN_GAIN:
                return False, f"stays at {_shown(now)}: {_shown(plan)} would even the load by {1 - after / before:.0%}"
        return True, f"to {_shown(plan)}: {plan.reason}"

    def record_time(self, time_ms: float) -> None:
        """Report a call's measured milliseconds under the present plan and the load last observed.

        ADAPTIVE corrects its predictions by it: those of sliced plans together, and those of "not sliced".
        """
        if not time_ms > 0:
            raise SliceError(f"time_ms={time_ms} must be above 0")
        predicted = self.predict_ms(self.plan, self.profile(forecast=False))
        if predicted:
            old = self._corrections.get(self.plan.kind)
            change = min(max(time_ms / predicted / (old or 1.0), 1 / MOST_CHANGE), MOST_CHANGE)
            self._corrections[self.plan.kind] = change if old is None else old * change**LEARNT

    def predict_ms(self, plan: SlicePlan, profile: LoadProfile) -> float | None:
        """Milliseconds of a call under a plan by the measured costs; None without them, or beyond them."""
        return None if self.costs is None else predict_ms(plan, profile, self.costs)

    def apply_plan(self, plan: SlicePlan) -> None:
        """Carry out a plan, such as one from a file, for the tenants it names. PlanError for one of another GPU."""
        plan.check(self.device)
        if plan.sliced and plan.backend != self.setting.backend:
            raise PlanError(f"the plan is for {plan.backend}, this manager's backend is {self.setting.backend}")
        names = [item.tenant for item in plan.slices]
        if plan.sliced and names != list(self._allocations):
            raise PlanError(f"the plan is of tenants {names}, here are {list(self._allocations)}; allocate them first")
        self._adopt(plan, Decision(time.monotonic(), True, f"plan given: {plan.reason}", plan.rule, plan.sms))

    def budget(self, expert_id: int | None = None) -> int | None:
        """SMs that a tenant's launches may use (`TritonExpertOps(device, sm_budget=...)`); None: every one."""
        item = self._slice_of(expert_id)
        return None if not self.plan.sliced else item.got_sms or item.asked_sms

    def _slice_of(self, expert_id: int | None) -> GPUSlice:
        if not self.plan.sliced:
            return self.plan.slices[0]
        for item in self.plan.slices:
            if item.tenant == expert_id:
                return item
        raise SliceError(f"expert {expert_id} holds no slice; allocate one first")

    @contextmanager
    def enter(self, expert_id: int | None = None) -> Iterator[SliceRun]:
        """Launch in a tenant's slice, after what the current stream holds; `join` waits for what was launched."""
        item = self._slice_of(expert_id)
        with entered(SliceRun(self.budget(expert_id), self._backend.stream(item.index))) as run:
            yield run

    def join(self) -> None:
        """Let the current stream wait for everything launched in the slices."""
        for item in self.plan.slices:
            stream = self._backend.stream(item.index)
            if stream is not None:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    def close(self) -> None:
        """Give partitions back to the device."""
        self._backend.close()

    def get_stats(self) -> dict[str, object]:
        """What was asked, what the device gave, how busy it is, and what changed; None where it is not known."""
        simulated = isinstance(self._backend, PlanningBackend)
        return {
            "device": self.device.name,
            "simulated": simulated,
            "note": "planned on a described device: nothing is carried out" if simulated else None,
            "policy": self.policy.value,
            "backend": self.plan.backend,
            "enforced_by": None if simulated else ENFORCEMENT[self.plan.backend],
            "rule": self.plan.rule,
            "reason": self.plan.reason,
            "total_slices": self.total_slices,
            "free_slices": self.free_slices,
            "slices": [
                {
                    "tenant": item.tenant,
                    "asked_sms": item.asked_sms,
                    "got_sms": item.got_sms,
                    "enforced": item.enforced,
                    "priority": item.priority,
                    "utilization": None if item.tenant is None else self._utilization.get(item.tenant),
                }
                for item in self.plan.slices
            ],
            "unassigned_load_share": self._unassigned_share,
            "reallocations": self.reallocations,
            "evictions": self.evictions,
            "forecast_by": self._forecaster.method if self.policy is SliceAllocationPolicy.ADAPTIVE else None,
        }


def _shown(plan: SlicePlan) -> str:
    return f"{plan.rule} {'/'.join(map(str, plan.sms))}" if plan.sliced else "not sliced"


class GPUSliceOptimizer:
    """Runs a manager's policy on a profiler's loads, at most once every `update_interval_s` seconds.

    Call `step()` between two steps of the model: it never waits for the device.
    """

    def __init__(
        self, manager: AdvancedGPUSliceManager, profiler: ExpertProfiler, update_interval_s: float = 1.0, layer: int = 0
    ) -> None:
        if update_interval_s < 0:
            raise ValueError(f"update_interval_s={update_interval_s} must not be negative")
        if not 0 <= layer < profiler.num_layers:
            raise ValueError(f"layer={layer} is outside the profiler's {profiler.num_layers} layers")
        self.manager, self.profiler = manager, profiler
        self.update_interval_s, self.layer = update_interval_s, layer
        self._last = -float("inf")

    def step(self) -> Decision | None:
        """The decision, if the interval has passed and the profiler's window holds calls; else None."""
        if time.monotonic() - self._last < self.update_interval_s:
            return None
        snapshot = self.profiler.snapshot(self.layer)
        if snapshot is None or snapshot.rows_per_call_E is None:
            return None
        self._last = time.monotonic()
        return self.manager.optimize_allocations(snapshot.rows_per_call_E)
