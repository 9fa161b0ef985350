"""What `moe-gpu slices` does: plan slices for loads, show a device or a plan, simulate the policies on a trace, MIG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.profiler import RoutingTrace
from moe_gpu.slices.backends import availability
from moe_gpu.slices.costs import CostTable, cached_costs
from moe_gpu.slices.device import DeviceDescription, described_device, find_device
from moe_gpu.slices.mig import MIGError, MIGManager
from moe_gpu.slices.plan import SliceError, SlicePlan, groups_of
from moe_gpu.slices.policies import SliceAllocationPolicy, pressure


def costs_for(device: DeviceDescription, path: Path | None) -> CostTable | None:
    """The table in a file, else the one that `moe-gpu slices bench` left for this GPU model."""
    return cached_costs(device.name) if path is None else CostTable.load(path, device.name)


def _manager(
    policy: SliceAllocationPolicy,
    device: DeviceDescription,
    backend: str,
    total_slices: int,
    groups: Sequence[tuple[int, ...]],
    costs: CostTable | None,
    seed: int = 0,
    priorities: Sequence[int] | None = None,
) -> AdvancedGPUSliceManager:
    """A manager that carries nothing out, with a tenant for each group of experts and all slices handed out."""
    if len(groups) > total_slices:
        raise SliceError(f"{len(groups)} tenants exceed total_slices={total_slices}; use fewer groups or more slices")
    manager = AdvancedGPUSliceManager(
        total_slices, policy, device, backend, costs=costs, seed=seed, log_size=1 << 16, carry_out=False
    )
    for number, group in enumerate(groups):
        slices = total_slices * (number + 1) // len(groups) - total_slices * number // len(groups)
        manager.allocate_slices(group[0], slices, priorities[number] if priorities else 0, group)
    return manager


def _trace_loads(path: Path, layer: int, tokens: int) -> tuple[RoutingTrace, Any]:
    """A trace and its rows a call of each expert of a layer, (calls, E)."""
    trace = RoutingTrace.load(path)
    if not 0 <= layer < trace.num_layers:
        raise ValueError(f"layer={layer} is outside the trace's {trace.num_layers} layers")
    calls_CE = trace.calls_LCE(tokens)[layer]
    if not len(calls_CE):
        raise ValueError(f"the routing trace {path} holds no tokens")
    return trace, calls_CE


def run_plan(
    *,
    loads: Sequence[float] | None = None,
    trace: Path | None = None,
    layer: int = 0,
    tokens: int = 256,
    groups: int = 4,
    utilization: Sequence[float] | None = None,
    policy: str = "proportional",
    device: str | None = None,
    backend: str = "green_context",
    total_slices: int = 8,
    costs: Path | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Plan slices for loads, a tenant each, or for the experts of a trace in groups; print, save and return it."""
    if (loads is None) == (trace is None):
        raise ValueError("give the loads of the tenants with --load, or a routing trace with --trace")
    found = find_device(device)
    if loads is not None:
        rows_E = list(loads)
        tenants = groups_of(len(rows_E), len(rows_E))
    else:
        assert trace is not None
        recorded, calls_CE = _trace_loads(trace, layer, tokens)
        rows_E = calls_CE.double().mean(0).tolist()
        tenants = groups_of(recorded.num_experts, groups)
    parsed = SliceAllocationPolicy.parse(policy)
    manager = _manager(parsed, found, backend, total_slices, tenants, costs_for(found, costs))
    if utilization is not None:
        if len(utilization) != len(tenants):
            raise ValueError(
                f"{len(utilization)} utilisations were given for {len(tenants)} tenants; give one for each"
            )
        for group, value in zip(tenants, utilization, strict=True):
            manager.update_slice_utilization(group[0], value)
    decision = manager.optimize_allocations(rows_E)
    plan = manager.plan
    if output is not None:
        plan.save(output)
    held = [sum(rows_E[expert] for expert in group) for group in tenants]
    print_plan(plan, found, held if plan.sliced else None)
    print(f"{parsed.value}: {decision.reason}")
    if output is not None:
        print(f"plan: {output}")
    return {**asdict(plan), "policy": parsed.value, "decision": decision.reason, "present": found.present}


def print_plan(plan: SlicePlan, device: DeviceDescription, loads: Sequence[float] | None = None) -> None:
    where = "" if device.present else " (described, not present: planned only)"
    print(f"{plan.device}, {plan.num_sms} SMs{where}; {plan.backend}, {plan.rule}")
    for item in plan.slices:
        who = "everybody" if item.tenant is None else f"tenant {item.tenant}"
        load = "" if loads is None else f", load {loads[item.index]:g}"
        got = "not carried out" if item.got_sms is None else f"got {item.got_sms}"
        print(f"  {who}: asks for {item.asked_sms} SMs, {got}{load}")
    left = plan.num_sms - sum(plan.sms)
    if left:
        print(f"  in no slice: {left} SMs")


def run_show(plan_file: Path | None, *, device: str | None = None) -> dict[str, Any]:
    """Show what a device offers, or check a plan file against it; PlanError for a plan of another GPU."""
    found = find_device(device)
    if plan_file is not None:
        plan = SlicePlan.load(plan_file)
        plan.check(found)
        print_plan(plan, found)
        print(f"why: {plan.reason}")
        return {**asdict(plan), "present": found.present}
    offered = availability(found)
    costs = cached_costs(found.name)
    where = "present" if found.present else "described, not present"
    print(
        f"{found.name} ({where}): {found.num_sms} SMs, compute capability {found.capability[0]}.{found.capability[1]}"
    )
    smallest, step = found.limits("green_context")
    print(
        f"green contexts: {smallest} SMs or more, steps of {step}, {found.usable_sms('green_context')} in whole steps"
    )
    for name, state in offered.items():
        print(f"  {name}: {state}")
    measured = (
        "not measured (`moe-gpu slices bench`)" if costs is None else f"{len(costs.points)} points of {costs.model}"
    )
    print(f"costs: {measured}")
    print(f"MIG profiles: {', '.join(f'{p.name} ({p.sms} SMs)' for p in found.mig_profiles) or 'none known'}")
    return {
        **asdict(found),
        "present": found.present,
        "sm_granularity": found.sm_granularity,
        "backends": offered,
        "cost_points": None if costs is None else len(costs.points),
    }


def run_simulate(
    trace: Path,
    *,
    layer: int = 0,
    tokens: int = 256,
    calls: int = 8,
    groups: int = 4,
    device: str | None = None,
    backend: str = "green_context",
    total_slices: int = 8,
    costs: Path | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Replay a trace's load under every policy, a decision after each window of `calls` calls; print and return them.

    What is in effect in a window was decided by the windows before it. Milliseconds are predictions from measured
    costs, None without them. A tenant's utilisation is modelled: its time, or load per SM, over the slowest tenant's.
    """
    found = find_device(device)
    recorded, calls_CE = _trace_loads(trace, layer, tokens)
    tenants = groups_of(recorded.num_experts, groups)
    table = costs_for(found, costs)
    if calls < 1:
        raise ValueError(f"calls={calls} must be at least 1")
    windows = [part.double().mean(0).tolist() for part in calls_CE.split(calls)]
    results = [
        simulate_policy(_manager(policy, found, backend, total_slices, tenants, table, seed), windows)
        for policy in SliceAllocationPolicy
    ]
    _print_simulation(results, found, recorded, len(windows), table)
    return results


def simulate_policy(manager: AdvancedGPUSliceManager, windows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What a manager decides over windows of rows a call of each expert."""
    pressures, predicted = [], []
    for rows_E in windows:
        before = manager.plan
        manager.observe(rows_E)
        now = manager.profile(forecast=False)
        pressures.append(pressure(before, now))
        predicted.append(manager.predict_ms(before, now))
        for tenant, busy in _modelled_utilization(manager, before, now).items():
            manager.update_slice_utilization(tenant, busy)
        manager.optimize_allocations()
    known = [value for value in pressures[1:] if value is not None]
    times = [value for value in predicted[1:] if value is not None]
    decisions = list(manager.log)[-len(windows) :]
    return {
        "policy": manager.policy.value,
        "device": manager.device.name,
        "simulated": True,
        "windows": len(windows),
        "changes": manager.reallocations,
        "explored": sum(entry.explored for entry in decisions),
        "final": {"rule": manager.plan.rule, "sms": list(manager.plan.sms)},
        "mean_pressure": sum(known) / len(known) if known else None,
        "max_pressure": max(known, default=None),
        "mean_predicted_ms": sum(times) / len(times) if len(times) == len(predicted) - 1 and times else None,
        "forecast_by": manager.get_stats()["forecast_by"],
        "decisions": [
            {"window": number, "changed": entry.changed, "sms": list(entry.sms), "reason": entry.reason}
            for number, entry in enumerate(decisions)
        ],
    }


def _modelled_utilization(manager: AdvancedGPUSliceManager, plan: SlicePlan, now: Any) -> dict[int, float]:
    """Each tenant's time over the slowest one's, by measured costs or else by load per SM; none while not sliced."""
    if not plan.sliced:
        return {}
    spent = []
    for tenant, sms in zip(now.tenants, plan.sms, strict=True):
        rows, active = tenant.rows or 0.0, tenant.active_experts or 0.0
        time_ms = None if manager.costs is None else manager.costs.time_ms(active, rows, sms)
        spent.append(rows / sms if time_ms is None else time_ms)
    slowest = max(spent) or 1.0
    return {held.expert_id: value / slowest for held, value in zip(now.allocations, spent, strict=True)}


def _print_simulation(
    results: Sequence[dict[str, Any]],
    device: DeviceDescription,
    trace: RoutingTrace,
    windows: int,
    table: CostTable | None,
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"Simulated on {device.name}, {windows} windows of {trace.source}: nothing was run"
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for name in ("policy", "changes", "explored", "mean pressure", "worst", "predicted ms", "at the end"):
        grid.add_column(name, justify="left" if name in ("policy", "at the end") else "right", no_wrap=True)
    for result in results:
        final = result["final"]
        grid.add_row(
            result["policy"],
            str(result["changes"]),
            str(result["explored"]),
            _number(result["mean_pressure"], ".2f"),
            _number(result["max_pressure"], ".2f"),
            _number(result["mean_predicted_ms"], ".4f"),
            final["rule"] if final["rule"] == "not sliced" else f"{final['rule']} {'/'.join(map(str, final['sms']))}",
        )
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(grid)
    print("pressure: largest share of load over share of SMs of a slice; 1 is even")
    if table is None:
        print("predicted ms: not known, no costs are measured for this GPU (`moe-gpu slices bench`)")
    else:
        print(f"predicted ms: from costs of {table.model} measured on {table.machine.device}")
    for result in results:
        changed = [entry for entry in result["decisions"] if entry["changed"]]
        last = (changed or result["decisions"])[-1]
        print(f"{result['policy']}, window {last['window']}: {last['reason']}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def run_mig(
    *,
    gpu: int = 0,
    device: str | None = None,
    loads: Sequence[float] | None = None,
    memory_gib: Sequence[float] | None = None,
    apply: bool = False,
) -> dict[str, Any]:
    """Show a GPU's MIG, or plan a layout for loads and print its commands; `apply` creates it on an idle GPU."""
    if apply and not loads:
        raise ValueError("--apply needs the loads that a layout is for; give --load N,N")
    if apply and device is not None:
        raise MIGError(f"--apply changes a GPU that is present, and {device} is described; leave --device out")
    manager = MIGManager(gpu, None if device is None else described_device(device))
    described = manager.described is not None
    where = " (described, not present: planned only)" if described else ""
    if not loads:
        instances = () if described else manager.instances()
        state = "" if described else f", MIG is {'on' if manager.enabled() else 'off'}"
        print(f"{manager.name}{where}{state}")
        for profile in manager.profiles():
            starts = ", ".join(map(str, profile.starts))
            print(f"  {profile.name}: {profile.sms} SMs, {profile.memory_bytes / 2**30:.1f} GiB, begins at {starts}")
        for instance in instances:
            print(f"  instance {instance.uuid}: {instance.sms} SMs, {instance.memory_bytes / 2**30:.1f} GiB")
        return {
            "device": manager.name,
            "present": not described,
            "profiles": [asdict(profile) for profile in manager.profiles()],
            "instances": [asdict(instance) for instance in instances],
        }
    memory = None if memory_gib is None else [int(size * 2**30) for size in memory_gib]
    layout = manager.plan(loads, memory)
    enable = described or not manager.enabled()
    print(f"{layout.device}{where}: {layout.sms} SMs in {len(layout.placements)} instances")
    for placed in layout.placements:
        print(
            f"  load {loads[placed.load_index]:g}: {placed.profile.name} at {placed.start}, {placed.profile.sms} SMs, "
            f"{placed.profile.memory_bytes / 2**30:.1f} GiB"
        )
    commands = layout.commands(gpu, enable)
    print("as an administrator, on an idle GPU:\n  " + "\n  ".join(commands))
    made = manager.apply(layout) if apply else ()
    for instance in made:
        print(f"created {instance.uuid}: CUDA_VISIBLE_DEVICES={instance.uuid}")
    return {
        "device": layout.device,
        "present": not described,
        "layout": [asdict(placed) for placed in layout.placements],
        "commands": commands,
        "applied": [asdict(instance) for instance in made],
    }
