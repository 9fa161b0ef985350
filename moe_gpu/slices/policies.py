"""Policies: pure functions from a load profile and a device to a plan. They keep nothing and touch no device.

STATIC gives each tenant the slices that it asked for. DYNAMIC moves one step of SMs at a time from tenants that idle to
tenants that are busy. PROPORTIONAL shares all SMs by load. ADAPTIVE compares these and "not sliced" by a table of
measured costs; without one it does not slice.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_gpu.slices.costs import CostTable
from moe_gpu.slices.device import DeviceDescription
from moe_gpu.slices.plan import ExpertAllocation, SliceError, SlicePlan, plan_of, unsliced

BUSY, IDLE = 0.85, 0.5  # DYNAMIC: utilisation above which a tenant gains SMs, below which it gives some up
SLICING_GAIN = 0.02  # ADAPTIVE: of predicted time that slicing must promise; what was not foreseen costs it more
EXPLORE = 0.02  # ADAPTIVE: share of decisions, at most, that try a candidate other than the best,
EXPLORE_COST = 0.0005  # so rarely that each of them is expected to add this share of time


class SliceAllocationPolicy(enum.Enum):
    """How SMs are shared among tenants; the slice manager carries it out."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    PROPORTIONAL = "proportional"
    ADAPTIVE = "adaptive"

    @classmethod
    def parse(cls, name: str) -> SliceAllocationPolicy:
        """The policy of this name; ValueError for another."""
        try:
            return cls(name.lower())
        except ValueError:
            names = ", ".join(policy.value for policy in cls)
            raise ValueError(f"policy={name!r} is not one of {names}; give one of these") from None


@dataclass(frozen=True)
class TenantLoad:
    """What a tenant does. rows, active_experts: a call, on average; None where not measured yet.

    utilization: busy share of its slice, 0 to 1, as reported to the manager. forecast_rows: of the next window.
    """

    allocation: ExpertAllocation
    rows: float | None = None
    active_experts: float | None = None
    utilization: float | None = None
    forecast_rows: float | None = None

    @property
    def expected_rows(self) -> float | None:
        return self.rows if self.forecast_rows is None else self.forecast_rows

    @property
    def work(self) -> tuple[float, float]:
        """Experts and rows that are expected; all its experts where it is not known how many are active.

        Less than a row is what a moving average has left of a load that ended.
        """
        rows, all_experts = self.expected_rows or 0.0, float(len(self.allocation.experts))
        return (min(self.active_experts or all_experts, rows), rows) if rows >= 1 else (0.0, 0.0)


@dataclass(frozen=True)
class LoadProfile:
    """The tenants of a device and their loads, in the order of their slices.

    shift_share: how likely the next window is nothing like its forecast.
    """

    tenants: tuple[TenantLoad, ...]
    shift_share: float = 0.0

    @property
    def allocations(self) -> tuple[ExpertAllocation, ...]:
        return tuple(tenant.allocation for tenant in self.tenants)

    def weights(self) -> list[float] | None:
        """Expected rows of each tenant; None where one is not known or there are none at all."""
        rows = [tenant.expected_rows for tenant in self.tenants]
        if any(value is None for value in rows) or not sum(filter(None, rows)):
            return None
        return [float(value or 0.0) for value in rows]

    def shifted_works(self) -> list[list[tuple[float, float]]]:
        """What tenants may have to do after a shift, of which nothing is known: each load moved on to another."""
        works = [tenant.work for tenant in self.tenants]
        return [works[first:] + works[:first] for first in range(len(works))]


@dataclass(frozen=True)
class Setting:
    """What plans are made for: a device in at most `total_slices` slices by one backend.

    Raises SliceError where an equal slice would be smaller than the device can give.
    """

    device: DeviceDescription
    backend: str
    total_slices: int

    def __post_init__(self) -> None:
        smallest, step = self.device.limits(self.backend)
        if self.unit_sms < smallest:
            most = self.device.usable_sms(self.backend) // max(smallest, step)
            raise SliceError(
                f"total_slices={self.total_slices} leaves {self.device.num_sms // self.total_slices} SMs a slice of "
                f"{self.device.name}, below the smallest {self.backend} slice of {smallest}; use at most {most}"
            )

    @property
    def unit_sms(self) -> int:
        """SMs of one of `total_slices` equal slices."""
        _, step = self.device.limits(self.backend)
        return self.device.num_sms // self.total_slices // step * step


@dataclass(frozen=True)
class Choice:
    """A policy's plan. predicted_ms: of each candidate that was compared, None where its cost is not measured."""

    plan: SlicePlan
    predicted_ms: Mapping[str, float | None] = field(default_factory=dict)
    explored: bool = False


def share_out(weights: Sequence[float], total: int, smallest: int = 1, ranks: Sequence[int] = ()) -> list[int]:
    """`total` whole units by weight, at least `smallest` each: shares by weight, then largest remainders.

    A tie goes to the higher rank, then to the earlier. More weight never gives fewer units. Raises SliceError where
    `total` cannot give everybody the smallest.
    """
    count = len(weights)
    if count * smallest > total:
        raise SliceError(f"{count} slices of at least {smallest} units exceed {total} units; use fewer slices")
    if not count:
        return []
    if sum(weights) <= 0:
        weights = [1.0] * count
    fixed: set[int] = set()
    while True:  # those whose share would be too small get the smallest; the others share the rest
        rest = total - smallest * len(fixed)
        free_weight = sum(weight for index, weight in enumerate(weights) if index not in fixed)
        small = {
            index
            for index, weight in enumerate(weights)
            if index not in fixed and (free_weight <= 0 or weight * rest < smallest * free_weight)
        }
        if not small:
            break
        fixed |= small
    quotas = [smallest if index in fixed else weight * rest / free_weight for index, weight in enumerate(weights)]
    units = [max(smallest, int(quota)) for quota in quotas]
    ranks = ranks or [0] * count
    order = sorted(range(count), key=lambda index: (units[index] - quotas[index], -ranks[index], index))
    for index in order[: total - sum(units)]:
        units[index] += 1
    return units


def plan_static(profile: LoadProfile, setting: Setting) -> SlicePlan:
    """The slices that were asked for, whatever the load."""
    sms = [setting.unit_sms * held.required_slices for held in profile.allocations]
    reason = f"equal slices of {setting.unit_sms} SMs, as many as each asked for"
    return plan_of(setting.device, setting.backend, "static", profile.allocations, sms, reason)


def plan_dynamic(profile: LoadProfile, setting: Setting, current: SlicePlan | None) -> SlicePlan:
    """One step of SMs from each idle tenant, the idlest first, to a busy one, the busiest first."""
    held = None if current is None else {item.tenant: item.asked_sms for item in current.slices}
    ids = [held_.expert_id for held_ in profile.allocations]
    if held is None or list(held) != ids or not (current and current.sliced and current.backend == setting.backend):
        plan = plan_static(profile, setting)
        return plan_of(
            setting.device, setting.backend, "dynamic", profile.allocations, plan.sms, f"begins with {plan.reason}"
        )
    smallest, step = setting.device.limits(setting.backend)
    step = max(step, setting.device.sm_granularity)
    sms = [held[tenant] for tenant in ids]
    load = [tenant.utilization for tenant in profile.tenants]
    busy = [index for index, value in enumerate(load) if value is not None and value > BUSY]
    idle = [index for index, value in enumerate(load) if value is not None and value < IDLE]
    idle = [index for index in idle if sms[index] - step >= smallest]
    busy.sort(key=lambda index: (-(load[index] or 0), -profile.tenants[index].allocation.priority, index))
    idle.sort(key=lambda index: ((load[index] or 0), profile.tenants[index].allocation.priority, index))
    moves = list(zip(idle, busy, strict=False))
    for giver, taker in moves:
        sms[giver] -= step
        sms[taker] += step
    if moves:
        reason = "; ".join(f"{step} SMs from {ids[giver]} to {ids[taker]}" for giver, taker in moves)
    elif any(value is None for value in load):
        reason = "stays: the utilisation of a slice is not known"
    else:
        reason = f"stays: no slice is above {BUSY:.0%} while another is below {IDLE:.0%}"
    return plan_of(setting.device, setting.backend, "dynamic", profile.allocations, sms, reason)


def plan_proportional(profile: LoadProfile, setting: Setting) -> SlicePlan:
    """All SMs by load: largest remainder in whole steps, and nobody without a slice."""
    weights = profile.weights()
    smallest, step = setting.device.limits(setting.backend)
    total = setting.device.usable_sms(setting.backend) // step
    least = -(-smallest // step)
    ranks = [held.priority for held in profile.allocations]
    if weights is None:
        required: list[float] = [held.required_slices for held in profile.allocations]
        units, reason = share_out(required, total, least, ranks), "no load is known: by slices asked for"
    else:
        units = share_out(weights, total, least, ranks)
        reason = "by load, " + " : ".join(f"{weight:g}" for weight in weights)
    sms = [unit * step for unit in units]
    return plan_of(setting.device, setting.backend, "proportional", profile.allocations, sms, reason)


def plan_balanced(profile: LoadProfile, setting: Setting, costs: CostTable) -> SlicePlan | None:
    """Step by step to the tenant that would take longest by measured costs; None where they do not cover it."""
    smallest, step = setting.device.limits(setting.backend)
    step = max(step, setting.device.sm_granularity)
    sms = [-(-smallest // step) * step] * len(profile.tenants)

    def time_of(index: int) -> float | None:
        return costs.time_ms(*profile.tenants[index].work, sms[index])

    times = [time_of(index) for index in range(len(sms))]
    while sum(sms) + step <= setting.device.usable_sms(setting.backend):
        if any(time_ms is None for time_ms in times):
            return None
        slowest = max(range(len(sms)), key=lambda index: times[index] or 0.0)
        sms[slowest] += step
        times[slowest] = time_of(slowest)
    reason = "SMs to whoever would take longest by measured costs"
    return plan_of(setting.device, setting.backend, "balanced", profile.allocations, sms, reason)


def plan_adaptive(
    profile: LoadProfile,
    setting: Setting,
    current: SlicePlan | None,
    costs: CostTable | None,
    corrections: Mapping[str, float] | None = None,
    draw: float = 1.0,
) -> Choice:
    """The candidate with the least predicted time, "not sliced" being one of them.

    corrections: measured over predicted time of sliced plans, and of "not sliced", as seen so far. draw: a random
    number in [0, 1); one below EXPLORE may take another candidate instead. Without a table that covers the load nothing
    is sliced.
    """
    if costs is None:
        reason = "no costs are measured for this device: `moe-gpu slices bench` measures them on a GPU"
        return Choice(unsliced(setting.device, reason))
    if costs.backend != setting.backend:
        reason = f"the costs are of {costs.backend} slices, these would be of {setting.backend}"
        return Choice(unsliced(setting.device, reason))
    if profile.weights() is None:
        return Choice(unsliced(setting.device, "no load is known yet"))
    plans = [
        unsliced(setting.device, ""),
        plan_static(profile, setting),
        plan_dynamic(profile, setting, current),
        plan_proportional(profile, setting),
        plan_balanced(profile, setting, costs),
    ]
    candidates = {plan.rule: plan for plan in plans if plan is not None}
    predicted = {name: predict_ms(plan, profile, costs, corrections) for name, plan in candidates.items()}
    known = {name: time_ms for name, time_ms in predicted.items() if time_ms is not None}
    if not known or "not sliced" not in known:
        reason = "the measured costs do not cover this load; measure larger sizes with `moe-gpu slices bench`"
        return Choice(unsliced(setting.device, reason), predicted)
    # The first of equals, so that "not sliced" wins a tie.
    best = min(known, key=lambda name: known[name] * (1.0 if candidates[name].sliced else 1 - SLICING_GAIN))
    tried = _explored(known, best, draw)
    shown = ", ".join(f"{other} {time_ms:.4g} ms" for other, time_ms in known.items())
    reason = f"{'tried, to learn: ' if tried else 'least predicted time: '}{shown}"
    plan = candidates[tried or best]
    return Choice(replace(plan, reason=reason, predicted_ms=known[plan.rule]), predicted, tried is not None)


def _explored(known: Mapping[str, float], best: str, draw: float) -> str | None:
    """Which candidate a draw tries instead of the best, if any: the more it is expected to cost, the more rarely."""
    if draw >= EXPLORE:  # the shares below sum to no more, but for rounding
        return None
    for name, time_ms in known.items():
        if name == best:
            continue
        excess = time_ms / known[best] - 1 if known[best] > 0 else 1.0
        draw -= min(EXPLORE / (len(known) - 1), EXPLORE_COST / max(excess, 1e-9))
        if draw < 0:
            return name
    return None


def choose_plan(
    policy: SliceAllocationPolicy,
    profile: LoadProfile,
    setting: Setting,
    current: SlicePlan | None = None,
    costs: CostTable | None = None,
    corrections: Mapping[str, float] | None = None,
    draw: float = 1.0,
) -> Choice:
    """What a policy chooses; pure. Without tenants nothing is sliced."""
    if not profile.tenants:
        return Choice(unsliced(setting.device, "nobody asks for a slice"))
    if policy is SliceAllocationPolicy.ADAPTIVE:
        return plan_adaptive(profile, setting, current, costs, corrections, draw)
    if policy is SliceAllocationPolicy.STATIC:
        return Choice(plan_static(profile, setting))
    if policy is SliceAllocationPolicy.DYNAMIC:
        return Choice(plan_dynamic(profile, setting, current))
    return Choice(plan_proportional(profile, setting))


def predict_ms(
    plan: SlicePlan, profile: LoadProfile, costs: CostTable, corrections: Mapping[str, float] | None = None
) -> float | None:
    """Milliseconds of a call under a plan, by measured costs; None where they do not cover it.

    The expectation over the forecast and, as often as the load shifts, the same load in other places: a plan that is
    good for this load alone is paid for at the next shift.
    """
    time_ms = _time_ms(plan, [tenant.work for tenant in profile.tenants], costs)
    if time_ms is None:
        return None
    if profile.shift_share and len(profile.tenants) > 1:
        shifted = [_time_ms(plan, works, costs) for works in profile.shifted_works()]
        shifted_ms = [time_ms if value is None else value for value in shifted]
        time_ms += profile.shift_share * (sum(shifted_ms) / len(shifted_ms) - time_ms)
    return time_ms * (corrections or {}).get(plan.kind, 1.0)


def _time_ms(plan: SlicePlan, work: Sequence[tuple[float, float]], costs: CostTable) -> float | None:
    if not plan.sliced:
        experts, rows = (sum(column) for column in zip(*work, strict=True))
        return costs.time_ms(experts, rows, plan.num_sms)
    return costs.sliced_ms([(*item, sms) for item, sms in zip(work, plan.sms, strict=True)])


def pressure(plan: SlicePlan, profile: LoadProfile) -> float | None:
    """Largest share of load over share of SMs among the slices, 1 when even or not sliced; None without loads."""
    weights = profile.weights()
    if weights is None:
        return None
    if not plan.sliced:
        return 1.0
    total = sum(weights)
    return max(weight / total * plan.num_sms / sms for weight, sms in zip(weights, plan.sms, strict=True))
