"""What carries a plan out: nothing (`device`), a limit of thread blocks (`cta`), or partitions (`green_context`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from moe_gpu.slices.device import DeviceDescription
from moe_gpu.slices.green import GreenPartitions, keep_partitions, take_partitions
from moe_gpu.slices.plan import BACKENDS, BackendUnavailableError, GPUSlice, SlicePlan

ENFORCEMENT = {
    "device": "nothing: every kernel may use every SM",
    "cta": "a limit on thread blocks that our kernels keep to; nothing keeps other kernels off these SMs",
    "green_context": "the hardware: SMs of its own; L2 and memory bandwidth are shared",
    "mig": "the hardware: SMs, L2 and memory of its own",
}


@dataclass(frozen=True)
class SliceRun:
    """What work inside a slice needs: its budget for `TritonExpertOps(device, sm_budget=...)` and its stream.

    sm_budget is None where every SM may be used; stream is None on a device that is only described.
    """

    sm_budget: int | None
    stream: torch.cuda.Stream | None


class SliceBackend(Protocol):
    """Carries out the plans of one device. `carry_out` returns the slices with what the device gave."""

    name: str

    def carry_out(self, plan: SlicePlan) -> tuple[GPUSlice, ...]: ...

    def stream(self, index: int) -> torch.cuda.Stream | None: ...

    def close(self) -> None: ...


class PlanningBackend:
    """Carries nothing out: the device is only described, or plans stay plans. What a slice gets is not known."""

    def __init__(self, name: str) -> None:
        self.name = name

    def carry_out(self, plan: SlicePlan) -> tuple[GPUSlice, ...]:
        return plan.slices

    def stream(self, index: int) -> torch.cuda.Stream | None:
        return None

    def close(self) -> None:
        pass


class BudgetBackend:
    """`cta` and `device`: a stream for each slice, and a budget for the launches in it."""

    def __init__(self, name: str, device: DeviceDescription) -> None:
        self.name, self._device = name, device
        self._streams: list[torch.cuda.Stream] = []

    def carry_out(self, plan: SlicePlan) -> tuple[GPUSlice, ...]:
        while len(self._streams) < len(plan.slices):
            self._streams.append(torch.cuda.Stream(self._device.index))
        return tuple(replace(item, got_sms=item.asked_sms) for item in plan.slices)

    def stream(self, index: int) -> torch.cuda.Stream | None:
        return self._streams[index]

    def close(self) -> None:
        self._streams.clear()


class GreenContextBackend:
    """`green_context`: disjoint partitions of the SMs, a stream in each; sizes are read back from the driver.

    `torch.cuda.green_contexts` cuts every context from the whole device, so that two of them share SMs; hence the
    driver's own functions. New partitions are taken before old ones are left; work in the old ones is waited for.
    """

    name = "green_context"

    def __init__(self, device: DeviceDescription) -> None:
        self._device = device
        self._partitions: GreenPartitions | None = None
        self._streams: list[torch.cuda.Stream] = []
        GreenPartitions.require()

    def carry_out(self, plan: SlicePlan) -> tuple[GPUSlice, ...]:
        index = self._device.index
        assert index is not None
        torch.zeros(1, device=f"cuda:{index}")  # the driver wants the device's context current
        made = take_partitions(index, plan.sms) if plan.sliced else None
        self.close()
        self._partitions = made
        if made is None:
            self._streams = [torch.cuda.Stream(index)]
            return tuple(replace(item, got_sms=item.asked_sms) for item in plan.slices)
        parts = made.in_order_of(plan.sms)
        self._streams = [torch.cuda.ExternalStream(handle, device=index) for _, handle in parts]
        return tuple(
            replace(item, got_sms=sms, enforced=True) for item, (sms, _) in zip(plan.slices, parts, strict=True)
        )

    def stream(self, index: int) -> torch.cuda.Stream | None:
        return self._streams[index]

    def close(self) -> None:
        self._streams.clear()
        if self._partitions is not None:
            keep_partitions(self._partitions)
            self._partitions = None


def make_backend(name: str, device: DeviceDescription) -> SliceBackend:
    """The backend of this name for a device. BackendUnavailableError, naming the remedy, where there is none."""
    if name not in BACKENDS:
        raise BackendUnavailableError(f"backend={name!r} is not one of {', '.join(BACKENDS)}; give one of these")
    if name == "mig":
        raise BackendUnavailableError(
            "MIG instances cannot change between steps: plan them with MIGManager or `moe-gpu slices mig`"
        )
    if not device.present:
        return PlanningBackend(name)
    return GreenContextBackend(device) if name == "green_context" else BudgetBackend(name, device)


@contextmanager
def entered(run: SliceRun) -> Iterator[SliceRun]:
    """Launch on the slice's stream, after what the current stream holds; that one does not wait for the slice."""
    if run.stream is None:
        yield run
        return
    run.stream.wait_stream(torch.cuda.current_stream(run.stream.device))
    with torch.cuda.stream(run.stream):
        yield run


def availability(device: DeviceDescription) -> dict[str, str]:
    """Each backend: `ok` or why it cannot serve on this device."""
    found: dict[str, str] = {}
    for name in BACKENDS:
        if not device.present:
            found[name] = "planned only: the device is described, not present"
            continue
        try:
            make_backend(name, device)
            found[name] = "ok"
        except BackendUnavailableError as error:
            found[name] = str(error)
    return found
