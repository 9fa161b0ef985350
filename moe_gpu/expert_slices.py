"""ExpertSlices: the routed experts of one layer in groups, each group computed in its own slice of the GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.reference import ExpertWeights, Routing
from moe_gpu.slices.plan import ExpertAllocation, SliceError
from moe_gpu.slices.policies import SliceAllocationPolicy
from moe_gpu.triton_kernels.ops import TritonExpertOps

MEASURED_EVERY_S = 0.1  # at most so often an eager call's slices are timed: two events each

Run = tuple[int, int]
"""Experts from the first to before the second: their weights lie together."""


@dataclass
class _Timing:
    """Events around a call and around each tenant's part of it; they are read once they have passed."""

    plan_sms: tuple[int, ...]
    begin: torch.cuda.Event
    spans: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=dict)
    end: torch.cuda.Event | None = None


class ExpertSlices:
    """Computes a layer's routed experts by the tenants of a slice manager: each tenant's in its slice, side by side.

    Experts that no tenant holds, evicted ones among them, may use every SM meanwhile. A row's additions are those of
    the undivided layer where the same kernel and tile serve it. Now and then an eager call is timed on the device, and
    what it took is told to the manager: how busy each tenant kept its slice, for DYNAMIC and for evictions, and the
    time of the whole, for ADAPTIVE. Raises SliceError for tenants with experts that the layer has not.
    """

    def __init__(self, manager: AdvancedGPUSliceManager, num_experts: int) -> None:
        self.manager, self.num_experts = manager, num_experts
        self._known: tuple[tuple[ExpertAllocation, ...], list[list[Run]], list[Run]] | None = None
        self._timing: _Timing | None = None
        self._timed_at = -float("inf")
        self._runs()

    def __str__(self) -> str:
        plan = self.manager.plan
        held = sum(len(allocation.experts) for allocation in self.manager.allocations)
        sizes = "/".join(str(item.got_sms or item.asked_sms) for item in plan.slices)
        return f"{held} of {self.num_experts} experts in {len(plan.slices)} slices of {sizes} SMs by {plan.backend}"

    def __deepcopy__(self, memo: object) -> ExpertSlices:
        """A copied layer's: in the same slices."""
        return ExpertSlices(self.manager, self.num_experts)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None where it is unpickled: another process has slices of its own."""
        return type(None), ()

    def facts(self) -> tuple[object, ...]:
        """What a graph of the layer depends on here."""
        plan = self.manager.plan
        return id(self.manager), plan.sliced, plan.backend, plan.sms, self.manager.allocations

    def why_not(self, ops: TritonExpertOps, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the experts are computed undivided, or None where they are divided."""
        plan, here = self.manager.plan, self.manager.device
        if not plan.sliced:
            return f"not sliced: {plan.reason}"
        if device.type != "cuda":
            return None  # in turn: nothing is enforced, and `enforced` says so
        if not here.present:
            return f"the slices are planned for {here.name}, which is only described"
        if device.index is not None and device.index != here.index:
            return f"the slices are of GPU {here.index}, the layer is on {device}"
        backend = ops.backend_for(dtype)
        return None if backend.name == "triton" else f"plain PyTorch serves and keeps to no slice: {backend.reason}"

    def _runs(self) -> tuple[list[list[Run]], list[Run]]:
        """The runs of each tenant's experts, in the manager's order, and those of experts that nobody holds."""
        allocations = self.manager.allocations
        if self._known is None or self._known[0] != allocations:
            held = {expert for allocation in allocations for expert in allocation.experts}
            if max(held, default=-1) >= self.num_experts:
                raise SliceError(
                    f"expert {max(held)} holds a slice and the layer has {self.num_experts} experts; release it"
                )
            tenants = [runs_of(allocation.experts) for allocation in allocations]
            self._known = allocations, tenants, runs_of(set(range(self.num_experts)) - held)
        return self._known[1:]

    def run(
        self, x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str, ops: TritonExpertOps
    ) -> torch.Tensor:
        """The routed experts' weighted output, (T, O), as `ops.experts`; inference only."""
        tenants, others = self._runs()
        y_RO: torch.Tensor | None = None
        decoding = False
        if x_TH.device.type == "cuda":  # before streams part: all of them write into it
            decoding = _may_decode(routing)
            num_rows, width = routing.row_route_R.shape[0], weights.down_EOI.shape[1]
            # Kernels for decoding leave rows in float32.
            y_RO = x_TH.new_empty(num_rows, width, dtype=torch.float32 if decoding else x_TH.dtype)

        def compute(runs: list[Run], with_ops: TritonExpertOps) -> None:
            nonlocal y_RO
            for first, end in runs:
                some = weights.some(first, end)
                y_RO = with_ops.expert_rows(x_TH, routing, some, activation, first, self.num_experts, y_RO)

        timing = self._begin_timing(x_TH.device)
        slices = {item.tenant: item for item in self.manager.plan.slices}
        try:
            for allocation, runs in zip(self.manager.allocations, tenants, strict=True):
                with self.manager.enter(allocation.expert_id) as entered:
                    start = None if timing is None else _now()
                    # Triton's kernels for decoding take no budget; in a partition the hardware keeps them to it.
                    unlimited = decoding and slices[allocation.expert_id].enforced
                    compute(runs, ops.with_budget(None if unlimited else entered.sm_budget))
                    if timing is not None and start is not None:
                        timing.spans[allocation.expert_id] = start, _now()
            compute(others, ops)
        finally:
            self.manager.join()
        if timing is not None:
            timing.end = _now()
            self._timing = timing
        assert y_RO is not None
        return ops.combine_rows(y_RO, routing, x_TH.dtype)

    def _begin_timing(self, device: torch.device) -> _Timing | None:
        """Events for this call, if it is time for them and none are under way; tells the manager what has passed."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        self.report()
        if self._timing is not None or time.monotonic() - self._timed_at < MEASURED_EVERY_S:
            return None
        self._timed_at = time.monotonic()
        return _Timing(self.manager.plan.sms, _now())

    def report(self) -> None:
        """Tell the manager what the last timed call took, once its events have passed; waits for nothing."""
        timing = self._timing
        if timing is None or timing.end is None or not timing.end.query():
            return
        self._timing = None
        if timing.plan_sms != self.manager.plan.sms:
            return
        whole_ms = timing.begin.elapsed_time(timing.end)
        holders = {allocation.expert_id for allocation in self.manager.allocations}
        for tenant, (start, end) in timing.spans.items():
            if tenant in holders and whole_ms > 0:
                self.manager.update_slice_utilization(tenant, min(1.0, start.elapsed_time(end) / whole_ms))
        if whole_ms > 0:
            self.manager.record_time(whole_ms)


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _may_decode(routing: Routing) -> bool:
    """Whether there are so few rows that kernels for decoding serve, where they are asked without a budget."""
    from moe_gpu.triton_kernels.decode import DECODE_MAX_ROWS_PER_EXPERT

    return routing.row_route_R.shape[0] <= DECODE_MAX_ROWS_PER_EXPERT * routing.num_experts


def runs_of(experts: Iterable[int]) -> list[Run]:
    """Experts as runs of neighbours, in order."""
    runs: list[Run] = []
    for expert in sorted(experts):
        if runs and runs[-1][1] == expert:
            runs[-1] = runs[-1][0], expert + 1
        else:
            runs.append((expert, expert + 1))
    return runs


def equal_groups(
    num_experts: int, groups: int, total_slices: int, policy: SliceAllocationPolicy, backend: str, device: torch.device
) -> AdvancedGPUSliceManager:
    """A manager of the device's GPU whose tenants are `groups` equal runs of experts, with equal slices at first.

    Raises SliceError for other than 2 to `total_slices` groups, and more than there are experts.
    """
    if not 2 <= groups <= min(total_slices, num_experts):
        raise SliceError(
            f"groups={groups} must be from 2 to {min(total_slices, num_experts)}: total_slices={total_slices}, "
            f"{num_experts} experts"
        )
    gpu = str(device) if device.type == "cuda" else None
    manager = AdvancedGPUSliceManager(total_slices, policy, gpu, backend)
    bounds = [num_experts * number // groups for number in range(groups + 1)]
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        share = total_slices * (number + 1) // groups - total_slices * number // groups
        manager.allocate_slices(first, share, experts=range(first, end))
    return manager
