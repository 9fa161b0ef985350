"""The only importer of pynvml: what the driver says, or None where it does not say."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class NvmlUnavailableError(RuntimeError):
    """NVML cannot be used here; the message names the cause."""


@contextmanager
def session():
    """NVML initialised, as the `pynvml` module; NvmlUnavailableError where there is no library or driver."""
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailableError("the Python package nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(f"NVML does not start: {error}") from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _ask(question: Callable[[Any], Any]) -> Any | None:
    try:
        with session() as library:
            try:
                return question(library)
            except library.NVMLError:
                return None
    except NvmlUnavailableError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    return _ask(lambda library: library.nvmlSystemGetDriverVersion())


def device_count() -> int | None:
    """GPUs that NVML sees, None where NVML cannot be used."""
    return _ask(lambda library: library.nvmlDeviceGetCount())


def mig_mode(index: int) -> bool | None:
    """Whether MIG is on for GPU `index`; None where the GPU has none or NVML cannot be used."""

    def question(library: Any) -> bool:
        handle = library.nvmlDeviceGetHandleByIndex(index)
        return library.nvmlDeviceGetMigMode(handle)[0] == library.NVML_DEVICE_MIG_ENABLE

    return _ask(question)


def sm_clock_mhz(uuid: str) -> int | None:
    """SM clock of the GPU with this UUID now, MHz."""
    return _ask(
        lambda library: library.nvmlDeviceGetClockInfo(library.nvmlDeviceGetHandleByUUID(uuid), library.NVML_CLOCK_SM)
    )


def power_w(uuid: str) -> float | None:
    """Board power of the GPU with this UUID, W; a 1 s average on Hopper."""
    milliwatts = _ask(lambda library: library.nvmlDeviceGetPowerUsage(library.nvmlDeviceGetHandleByUUID(uuid)))
    return None if milliwatts is None else milliwatts / 1000


# MIG: these raise NvmlError instead of answering None, since the caller must know why.


class NvmlError(RuntimeError):
    """NVML refused. kind: `permission`, `busy`, `unsupported`, `reset` or `other`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def _gpu(index: int) -> Iterator[tuple[Any, Any]]:
    """`pynvml` and the handle of a GPU; every refusal inside becomes an NvmlError."""
    try:
        with session() as library:
            kinds = {
                library.NVML_ERROR_NO_PERMISSION: "permission",
                library.NVML_ERROR_IN_USE: "busy",
                library.NVML_ERROR_NOT_SUPPORTED: "unsupported",
                library.NVML_ERROR_RESET_REQUIRED: "reset",
            }
            try:
                yield library, library.nvmlDeviceGetHandleByIndex(index)
            except library.NVMLError as error:
                raise NvmlError(kinds.get(error.value, "other"), str(error)) from error
    except NvmlUnavailableError as error:
        raise NvmlError("unsupported", str(error)) from error


@dataclass(frozen=True)
class MigFacts:
    """What NVML says of a GPU's MIG. A profile: name, id, SMs, compute slices, bytes, placements (start, size).

    An instance: UUID, SMs, bytes. processes: those that compute on the GPU now.
    """

    name: str
    enabled: bool
    pending: bool
    processes: int
    profiles: tuple[tuple[str, int, int, int, int, tuple[tuple[int, int], ...]], ...]
    instances: tuple[tuple[str, int, int], ...]


def mig_facts(index: int) -> MigFacts:
    """MIG mode, profiles and instances of a GPU."""
    with _gpu(index) as (library, handle):
        enabled, pending = library.nvmlDeviceGetMigMode(handle)
        return MigFacts(
            library.nvmlDeviceGetName(handle),
            bool(enabled),
            bool(pending),
            len(library.nvmlDeviceGetComputeRunningProcesses(handle)),
            tuple(_mig_profiles(library, handle)),
            tuple(_mig_instances(library, handle)) if enabled else (),
        )


def _mig_profiles(library: Any, handle: Any) -> Iterator[tuple]:
    for number in range(library.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            info = library.nvmlDeviceGetGpuInstanceProfileInfo(handle, number)
        except library.NVMLError as error:
            if error.value in (library.NVML_ERROR_NOT_SUPPORTED, library.NVML_ERROR_INVALID_ARGUMENT):
                continue  # a size that this GPU has not got
            raise
        name = info.name.decode() if isinstance(info.name, bytes) else info.name
        count = ctypes.c_uint(64)
        places = (library.c_nvmlGpuInstancePlacement_t * count.value)()
        library.nvmlDeviceGetGpuInstancePossiblePlacements(handle, info.id, places, ctypes.byref(count))
        starts = tuple((place.start, place.size) for place in places[: count.value])
        size = info.memorySizeMB << 20
        yield name.removeprefix("MIG "), info.id, info.multiprocessorCount, info.sliceCount, size, starts


def _mig_instances(library: Any, handle: Any) -> Iterator[tuple[str, int, int]]:
    for number in range(library.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = library.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except library.NVMLError as error:
            if error.value == library.NVML_ERROR_NOT_FOUND:
                continue
            raise
        attributes = library.nvmlDeviceGetAttributes(instance)
        size = attributes.memorySizeMB << 20
        yield library.nvmlDeviceGetUUID(instance), attributes.multiprocessorCount, size


def set_mig_mode(index: int, enabled: bool) -> None:
    """Turn MIG on or off; NvmlError of kind `reset` where it takes effect only when the GPU has been reset."""
    with _gpu(index) as (library, handle):
        before = library.nvmlDeviceGetMigMode(handle)[0]
        library.nvmlDeviceSetMigMode(handle, int(enabled))
        if library.nvmlDeviceGetMigMode(handle)[0] != int(enabled):
            library.nvmlDeviceSetMigMode(handle, before)
            raise NvmlError("reset", "the mode is pending until the GPU is reset")


def create_mig_instances(index: int, wanted: Sequence[tuple[int, int, int]]) -> None:
    """Create (profile id, start, size) instances, each with one compute instance over all of it; all or none."""
    with _gpu(index) as (library, handle):
        made: list[tuple[Any, Any]] = []
        try:
            for profile, start, size in wanted:
                place = library.c_nvmlGpuInstancePlacement_t(start, size)
                instance = library.nvmlDeviceCreateGpuInstanceWithPlacement(handle, profile, ctypes.byref(place))
                made.append((instance, None))
                whole = _whole_compute_profile(library, instance)
                made[-1] = (instance, library.nvmlGpuInstanceCreateComputeInstance(instance, whole))
        except BaseException:
            for instance, compute in reversed(made):
                if compute is not None:
                    library.nvmlComputeInstanceDestroy(compute)
                library.nvmlGpuInstanceDestroy(instance)
            raise


def _whole_compute_profile(library: Any, instance: Any) -> int:
    """The id of the compute instance profile that takes a whole GPU instance: the one with the most slices."""
    found: dict[int, int] = {}
    for number in range(library.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            info = library.nvmlGpuInstanceGetComputeInstanceProfileInfo(
                instance, number, library.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
            )
        except library.NVMLError as error:
            if error.value in (library.NVML_ERROR_NOT_SUPPORTED, library.NVML_ERROR_INVALID_ARGUMENT):
                continue
            raise
        found.setdefault(info.sliceCount, info.id)
    if not found:
        raise NvmlError("unsupported", "this instance offers no compute instance")
    return found[max(found)]
