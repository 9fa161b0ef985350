"""DeviceDescription: what a GPU can be cut into, read from the GPU that is present or described by its name."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MigProfile:
    """A size that MIG offers. starts: the memory slices (of the GPU's eight) at which an instance of it may begin.

    memory_bytes: as the driver says, or of a described GPU its share of the nominal memory.
    """

    name: str  # "2g.35gb"
    profile_id: int
    sms: int
    compute_slices: int  # of seven
    memory_slices: int  # of eight
    memory_bytes: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class DeviceDescription:
    """A GPU as policies see it. `index` is its CUDA ordinal, None for one that is only described.

    min_slice_sms, sm_granularity: the smallest green context and the step between sizes.
    """

    name: str
    num_sms: int
    capability: tuple[int, int]
    memory_bytes: int
    mig_profiles: tuple[MigProfile, ...] = ()
    index: int | None = None

    def __post_init__(self) -> None:
        if self.num_sms < 1 or self.memory_bytes < 1:
            raise ValueError(f"num_sms={self.num_sms} and memory_bytes={self.memory_bytes} must be at least 1")

    @property
    def present(self) -> bool:
        return self.index is not None

    @property
    def sm_granularity(self) -> int:
        """SMs by which green contexts differ: 8 from compute capability 9.0, 2 below (CUDA's driver API)."""
        return 8 if self.capability >= (9, 0) else 2

    @property
    def min_slice_sms(self) -> int:
        return 8 if self.capability >= (9, 0) else 4

    def limits(self, backend: str) -> tuple[int, int]:
        """The smallest slice and the step between sizes, in SMs; a budget of thread blocks may be any number."""
        return (self.min_slice_sms, self.sm_granularity) if backend == "green_context" else (1, 1)

    def usable_sms(self, backend: str) -> int:
        """SMs that slices can hold: all, or on a green context whole steps of them."""
        _, step = self.limits(backend)
        return self.num_sms // step * step


def _mig(memory_bytes: int, sms: tuple[int, ...], gigabytes: tuple[int, ...]) -> tuple[MigProfile, ...]:
    """The six common profiles: their SMs and the sizes in their names differ by GPU, ids and placements do not."""
    shapes = (
        (19, 1, 1, (0, 1, 2, 3, 4, 5, 6)),
        (15, 1, 2, (0, 2, 4, 6)),
        (14, 2, 2, (0, 2, 4)),
        (9, 3, 4, (0, 4)),
        (5, 4, 4, (0,)),
        (0, 7, 8, (0,)),
    )
    return tuple(
        MigProfile(f"{compute}g.{size}gb", number, count, compute, memory, memory_bytes * memory // 8, starts)
        for (number, compute, memory, starts), count, size in zip(shapes, sms, gigabytes, strict=True)
    )


_GIB = 1 << 30
_A100 = _mig(80 * _GIB, (14, 14, 28, 42, 56, 98), (10, 20, 20, 40, 40, 80))
_H100 = _mig(80 * _GIB, (16, 26, 32, 60, 64, 132), (10, 20, 20, 40, 40, 80))
_H200 = _mig(141 * 10**9, (16, 26, 32, 60, 64, 132), (18, 35, 35, 71, 71, 141))
KNOWN_DEVICES = {
    device.name: device
    for device in (
        DeviceDescription("NVIDIA A100-SXM4-80GB", 108, (8, 0), 80 * _GIB, _A100),
        DeviceDescription("NVIDIA H100 80GB HBM3", 132, (9, 0), 80 * _GIB, _H100),
        DeviceDescription("NVIDIA H200", 132, (9, 0), 141 * 10**9, _H200),
    )
}


def described_device(name: str) -> DeviceDescription:
    """A known GPU by its name or a part of it, such as `H200`; ValueError for another."""
    found = KNOWN_DEVICES.get(name)
    if found is None:
        matches = [device for known, device in KNOWN_DEVICES.items() if name and name.lower() in known.lower()]
        if len(matches) != 1:
            raise ValueError(f"device={name!r} is not known: give cuda or one of {', '.join(KNOWN_DEVICES)}")
        found = matches[0]
    return found


def present_device(index: int | None = None) -> DeviceDescription:
    """The GPU that is here (the current one by default); ValueError where there is none."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"this machine has no GPU; describe one by its name: {', '.join(KNOWN_DEVICES)} (see `moe-gpu doctor`)"
        )
    if index is not None and not 0 <= index < torch.cuda.device_count():
        raise ValueError(f"GPU {index} does not exist: this machine has {torch.cuda.device_count()}")
    index = torch.cuda.current_device() if index is None else index
    properties = torch.cuda.get_device_properties(index)
    known = KNOWN_DEVICES.get(properties.name)
    return DeviceDescription(
        properties.name,
        properties.multi_processor_count,
        (properties.major, properties.minor),
        properties.total_memory,
        () if known is None else known.mig_profiles,
        index,
    )


def find_device(name: str | None) -> DeviceDescription:
    """`cuda`, `cuda:1` or None: the GPU that is here; else a known GPU, as described, even if one like it is here.

    None on a machine without a GPU describes an H200, which `present` gives away.
    """
    if name is None:
        return present_device() if torch.cuda.is_available() else described_device("NVIDIA H200")
    if name == "cuda" or name.startswith("cuda:"):
        return present_device(torch.device(name).index)
    return described_device(name)
