"""MIGManager: a GPU's MIG instances, which job goes on which, and layouts planned for loads, shown before applied.

MIG divides a GPU before a program starts: an instance is a device of its own, chosen by CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_gpu import nvml
from moe_gpu.slices.device import KNOWN_DEVICES, DeviceDescription, MigProfile
from moe_gpu.slices.plan import SliceError

COMPUTE_SLICES, MEMORY_SLICES = 7, 8


class MIGError(SliceError):
    """MIG cannot do this here; the message says why and the remedy."""


@dataclass(frozen=True)
class MIGInstance:
    """An instance that exists: a device of its own under its UUID."""

    uuid: str
    sms: int
    memory_bytes: int


@dataclass(frozen=True)
class Placement:
    """An instance of a layout: what it is, where it begins, and the load (by its number) that it is for."""

    profile: MigProfile
    start: int
    load_index: int


@dataclass(frozen=True)
class MIGLayout:
    """Instances for given loads. pressure: largest share of load over share of the layout's SMs."""

    device: str
    loads: tuple[float, ...]
    placements: tuple[Placement, ...]

    @property
    def sms(self) -> int:
        return sum(placed.profile.sms for placed in self.placements)

    @property
    def pressure(self) -> float:
        total = sum(self.loads)
        return max(self.loads[p.load_index] / total * self.sms / p.profile.sms for p in self.placements)

    def commands(self, index: int, enable: bool = True) -> list[str]:
        """What makes this layout by hand; `enable`: MIG is off yet."""
        instances = ",".join(f"{placed.profile.profile_id}:{placed.start}" for placed in self.placements)
        return [f"nvidia-smi -i {index} -mig 1"] * enable + [f"nvidia-smi mig -i {index} -cgi {instances} -C"]


def plan_layout(
    device: str, profiles: Sequence[MigProfile], loads: Sequence[float], memory_bytes: Sequence[int] | None = None
) -> MIGLayout:
    """The layout, an instance a load, whose most pressed instance has the most SMs for its load.

    memory_bytes: what each load needs at least. Raises MIGError for loads that do not fit any layout.
    """
    if not profiles:
        raise MIGError(f"{device} offers no MIG; it takes an A100, H100, H200 or B200")
    if not loads or min(loads) < 0 or sum(loads) <= 0:
        raise MIGError(f"loads={list(loads)} must be numbers from 0 on, not all 0")
    if len(loads) > COMPUTE_SLICES:
        raise MIGError(f"{len(loads)} loads exceed the {COMPUTE_SLICES} instances that MIG offers; put some together")
    needed = list(memory_bytes or [0] * len(loads))
    if len(needed) != len(loads):
        raise MIGError(f"{len(needed)} memory sizes were given for {len(loads)} loads; give one for each")
    order = sorted(range(len(loads)), key=lambda index: -loads[index])
    best: list[tuple[MigProfile, int]] = []
    best_score = (float("inf"), 0)

    def extend(chosen: list[tuple[MigProfile, int]], used: int) -> None:
        nonlocal best, best_score
        if len(chosen) == len(order):
            pressed = max(loads[index] / profile.sms for index, (profile, _) in zip(order, chosen, strict=True))
            score = (pressed, -sum(profile.sms for profile, _ in chosen))
            if score < best_score:
                best, best_score = list(chosen), score
            return
        index = order[len(chosen)]
        compute = COMPUTE_SLICES - sum(profile.compute_slices for profile, _ in chosen)
        for profile in profiles:
            if profile.compute_slices > compute or profile.memory_bytes < needed[index]:
                continue
            if loads[index] / profile.sms > best_score[0]:
                continue  # already more pressed than the best layout's worst
            for start in profile.starts:
                mask = ((1 << profile.memory_slices) - 1) << start
                if not mask & used:
                    extend([*chosen, (profile, start)], used | mask)

    extend([], 0)
    if not best:
        most = max(profile.memory_bytes for profile in profiles)
        raise MIGError(
            f"{len(loads)} loads of {[size >> 30 for size in needed]} GiB fit no MIG layout of {device} (largest "
            f"instance {most >> 30} GiB, {MEMORY_SLICES} parts of memory); ask for less or for fewer"
        )
    best.sort(key=lambda item: -item[0].sms)  # no worse, and the heavier load never has fewer SMs
    placements = [Placement(profile, start, index) for index, (profile, start) in zip(order, best, strict=True)]
    return MIGLayout(device, tuple(loads), tuple(sorted(placements, key=lambda placed: placed.start)))


class MIGManager:
    """MIG of one GPU (`index` as NVML counts), or of a described device, for which layouts are planned and no more.

    Raises MIGError, with the remedy, where the GPU or the driver has no MIG.
    """

    def __init__(self, index: int = 0, device: DeviceDescription | None = None) -> None:
        self.index, self.described = index, device
        self._jobs: dict[str, tuple[str, float]] = {}  # job -> instance's UUID and load

    def _facts(self) -> nvml.MigFacts:
        if self.described is not None:
            raise MIGError(f"{self.described.name} is described, not present: its layouts can be planned, no more")
        try:
            return nvml.mig_facts(self.index)
        except (nvml.NvmlError, nvml.NvmlUnavailableError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: nvml.NvmlError | nvml.NvmlUnavailableError) -> MIGError:
        gpu, name = f"GPU {self.index}", getattr(error, "name", None)
        if name == "IN_USE":
            return MIGError(f"{gpu} is in use ({error}); end what runs on it and try again")
        if name == "RESET_REQUIRED":
            return MIGError(f"{gpu}: {error}; an administrator runs: nvidia-smi -i {self.index} --gpu-reset")
        if isinstance(error, nvml.NoPermissionError):
            return MIGError(f"{gpu}: no permission for MIG ({error}); run as root, or ask an administrator")
        if isinstance(error, (nvml.NotSupportedError, nvml.NvmlUnavailableError)):
            return MIGError(f"{gpu} offers no MIG ({error}); it takes an A100, H100, H200 or B200 and its driver")
        return MIGError(f"{gpu}: NVML refused ({error}); see nvidia-smi mig -i {self.index} -lgi")

    @property
    def name(self) -> str:
        return self.described.name if self.described is not None else self._facts().name

    def enabled(self) -> bool:
        return self._facts().enabled

    def profiles(self) -> tuple[MigProfile, ...]:
        """Sizes that this GPU offers, as NVML says; those known of its model while MIG is off and NVML says none."""
        if self.described is not None:
            return self.described.mig_profiles
        facts = self._facts()
        found = tuple(
            MigProfile(name, number, sms, compute, starts[0][1], size, tuple(start for start, _ in starts))
            for name, number, sms, compute, size, starts in facts.profiles
            if starts and "+" not in name  # "+me" and the like: the same size with video engines
        )
        known = KNOWN_DEVICES.get(facts.name)
        return found or (known.mig_profiles if known else ())

    def instances(self) -> tuple[MIGInstance, ...]:
        """The instances that exist now."""
        return tuple(MIGInstance(*instance) for instance in self._facts().instances)

    def plan(self, loads: Sequence[float], memory_bytes: Sequence[int] | None = None) -> MIGLayout:
        """As `plan_layout`, for this GPU."""
        return plan_layout(self.name, self.profiles(), loads, memory_bytes)

    def place(self, job: str, load: float, memory_bytes: int = 0) -> MIGInstance:
        """The instance on which a job keeps the highest load per SM lowest, among those with the memory.

        Start the job with CUDA_VISIBLE_DEVICES set to its UUID. Raises MIGError where none will do.
        """
        if job in self._jobs:
            raise MIGError(f"job {job!r} is placed already, on {self._jobs[job][0]}; remove it first")
        if load <= 0:
            raise MIGError(f"load={load} must be above 0")
        instances = self.instances()
        fitting = [instance for instance in instances if instance.memory_bytes >= memory_bytes]
        if not fitting:
            largest = max((instance.memory_bytes for instance in instances), default=0)
            raise MIGError(
                f"no MIG instance of GPU {self.index} has {memory_bytes / 2**30:.1f} GiB (the largest of "
                f"{len(instances)} has {largest / 2**30:.1f}); plan a layout with `moe-gpu slices mig`"
            )
        held = {instance.uuid: 0.0 for instance in instances}
        for uuid, other in self._jobs.values():
            held[uuid] = held.get(uuid, 0.0) + other
        chosen = min(fitting, key=lambda instance: ((held[instance.uuid] + load) / instance.sms, instance.sms))
        self._jobs[job] = (chosen.uuid, load)
        return chosen

    def remove(self, job: str) -> None:
        """Forget a job that has ended."""
        if job not in self._jobs:
            raise MIGError(f"job {job!r} is not placed; these are: {', '.join(self._jobs) or 'none'}")
        del self._jobs[job]

    def apply(self, layout: MIGLayout) -> tuple[MIGInstance, ...]:
        """Create a layout's instances on an idle GPU without any; all of them or, after a refusal, none."""
        facts = self._facts()
        if layout.device != facts.name:
            raise MIGError(f"the layout is of {layout.device}, GPU {self.index} is {facts.name}; plan it again")
        if facts.processes:
            raise MIGError(f"GPU {self.index} is busy: {facts.processes} processes compute on it; end them first")
        if facts.instances:
            raise MIGError(
                f"GPU {self.index} has {len(facts.instances)} instances already; an administrator removes them: "
                f"nvidia-smi mig -i {self.index} -dci && nvidia-smi mig -i {self.index} -dgi"
            )
        turned_on = False
        try:
            if not facts.enabled:
                nvml.set_mig_mode(self.index, True)
                turned_on = True
            wanted = [(p.profile.profile_id, p.start, p.profile.memory_slices) for p in layout.placements]
            nvml.create_mig_instances(self.index, wanted)
        except nvml.NvmlError as error:
            if turned_on:
                nvml.set_mig_mode(self.index, False)
            raise self._refusal(error) from error
        return self.instances()
