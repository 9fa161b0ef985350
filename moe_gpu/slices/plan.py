"""SlicePlan: how a GPU's SMs are divided, checked against the device, written to a file and read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_gpu.files import write_atomically
from moe_gpu.slices.device import DeviceDescription

SCHEMA = 1
BACKENDS = ("device", "cta", "green_context", "mig")


class SliceError(ValueError):
    """A slice cannot be had as asked; the message names the value, the limit and the remedy."""


class SliceUnavailableError(SliceError):
    """No slice is free and none may be evicted."""


class BackendUnavailableError(SliceError):
    """This device or software cannot carry out such slices."""


class PlanError(SliceError):
    """A plan does not fit its device, or its file cannot be used."""


@dataclass(frozen=True)
class GPUSlice:
    """A part of a GPU that a tenant holds.

    got_sms: what the device gave, as read back from it or set as a launch limit; None until carried out. enforced: the
    hardware keeps the tenant to these SMs (a green context or MIG instance, never a budget of thread blocks).
    """

    index: int
    tenant: int | None  # the expert, or first of a group of experts, that holds it; None: everybody
    asked_sms: int
    backend: str
    priority: int = 0
    got_sms: int | None = None
    enforced: bool = False


@dataclass(frozen=True)
class ExpertAllocation:
    """Slices that an expert, or a group of experts under its first one's name, is entitled to."""

    expert_id: int
    required_slices: int
    priority: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class SlicePlan:
    """The slices of one device at one time, and why they are so. `rule` names what sized them, such as "static"."""

    device: str
    num_sms: int
    backend: str
    rule: str
    slices: tuple[GPUSlice, ...]
    reason: str
    predicted_ms: float | None = None

    @property
    def sliced(self) -> bool:
        return self.rule != "not sliced"

    @property
    def kind(self) -> str:
        """What predictions err by alike: "sliced" or "not sliced"."""
        return "sliced" if self.sliced else "not sliced"

    @property
    def sms(self) -> tuple[int, ...]:
        return tuple(item.asked_sms for item in self.slices)

    def check(self, device: DeviceDescription) -> None:
        """Raise PlanError unless the device can be cut in this way."""
        if self.device != device.name:
            raise PlanError(
                f"the plan is of {self.device}, this is {device.name}; make one with `moe-gpu slices plan --device`"
            )
        if self.backend not in BACKENDS:
            raise PlanError(f"backend={self.backend!r} is not one of {', '.join(BACKENDS)}; plan again")
        if self.num_sms != device.num_sms:
            raise PlanError(f"the plan is for {self.num_sms} SMs, {device.name} has {device.num_sms}; plan again")
        if not self.slices:
            raise PlanError("the plan has no slice; plan again")
        if sum(self.sms) > device.num_sms:
            raise PlanError(
                f"the slices ask for {sum(self.sms)} SMs, {device.name} has {device.num_sms}; ask for fewer"
            )
        if not self.sliced:
            return
        for item in self.slices:
            check_sms(item.asked_sms, device, self.backend)

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False)
        write_atomically(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> SlicePlan:
        """Read a plan; PlanError, in one line with the remedy, for a file that is missing, damaged or newer."""
        remedy = "make one with `moe-gpu slices plan --output FILE`"
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read plan {path}: {error.strerror}; {remedy}") from error
        except ValueError as error:
            raise PlanError(f"plan {path} is not JSON; {remedy}") from error
        schema = values.pop("schema", None) if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise PlanError(f"plan {path} has schema {schema!r}, this version reads {SCHEMA}; {remedy}")
        try:
            slices = tuple(_slice(item) for item in values.pop("slices"))
            plan = cls(slices=slices, **values)
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"plan {path} is damaged ({type(error).__name__}: {error}); {remedy}") from error
        sizes = [plan.num_sms, *plan.sms]
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise PlanError(f"plan {path} is damaged (sizes {sizes}); {remedy}")
        return plan


def _slice(values: dict[str, Any]) -> GPUSlice:
    # What a device gave in another process says nothing about this one.
    return replace(GPUSlice(**values), got_sms=None, enforced=False)


def groups_of(num_experts: int, groups: int) -> list[tuple[int, ...]]:
    """Experts in consecutive groups of about the same size, as expert parallelism places them."""
    if not 1 <= groups <= num_experts:
        raise ValueError(f"groups={groups} must lie between 1 and the {num_experts} experts")
    ends = [num_experts * (number + 1) // groups for number in range(groups)]
    return [tuple(range(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def check_sms(sms: int, device: DeviceDescription, backend: str) -> None:
    """Raise SliceError unless a slice of this many SMs exists on the device."""
    smallest, step = device.limits(backend)
    if sms > device.num_sms:
        raise SliceError(f"a slice of {sms} SMs exceeds the {device.num_sms} SMs of {device.name}; ask for fewer")
    if sms < smallest:
        raise SliceError(
            f"a slice of {sms} SMs is below the smallest {backend} slice of {device.name}, {smallest} SMs; ask for more"
        )
    if sms % step:
        raise SliceError(f"a slice of {sms} SMs is no multiple of {step}, the granularity of {device.name}; round it")


def plan_of(
    device: DeviceDescription,
    backend: str,
    rule: str,
    allocations: Sequence[ExpertAllocation],
    sms: Sequence[int],
    reason: str,
) -> SlicePlan:
    """A checked plan that gives each allocation its SMs."""
    slices = tuple(
        GPUSlice(index, held.expert_id, size, backend, held.priority)
        for index, (held, size) in enumerate(zip(allocations, sms, strict=True))
    )
    plan = SlicePlan(device.name, device.num_sms, backend, rule, slices, reason)
    plan.check(device)
    return plan


def unsliced(device: DeviceDescription, reason: str) -> SlicePlan:
    """The whole device for everybody."""
    whole = GPUSlice(0, None, device.num_sms, "device")
    return SlicePlan(device.name, device.num_sms, "device", "not sliced", (whole,), reason)
