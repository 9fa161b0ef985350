"""The only importer of pynvml: what the driver says, or None where it does not say.

Functions ask once; a `Device` stays open for readings over and over. NVML's own codes become the errors below; no
reading is ever 0 because it is unknown.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


class NvmlUnavailableError(RuntimeError):
    """NVML cannot be used here; the message names the cause."""


class NvmlError(RuntimeError):
    """The driver refused a reading; `name` is NVML's word for why, such as TIMEOUT."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{what}: {name}")
        self.name = name


class NotSupportedError(NvmlError):
    """This GPU, driver or nvidia-ml-py has no such reading."""


class NoPermissionError(NvmlError):
    """This process may not have the reading."""


class GpuLostError(NvmlError):
    """The GPU has fallen off the bus or needs a reset: no reading will succeed again."""


_KINDS: dict[str, type[NvmlError]] = {
    "NOT_SUPPORTED": NotSupportedError,
    "FUNCTION_NOT_FOUND": NotSupportedError,
    "ARGUMENT_VERSION_MISMATCH": NotSupportedError,
    "NO_PERMISSION": NoPermissionError,
    "GPU_IS_LOST": GpuLostError,
    "RESET_REQUIRED": GpuLostError,
    "GPU_NOT_FOUND": GpuLostError,
}

# Bits of the clocks-event reasons that mean a clock held below what the load would take: slowed by the hardware, by
# heat or by a brake on the supply. The software power cap is not among them: a dense product runs at it all the time.
SLOWED = 0x08 | 0x20 | 0x40 | 0x80


@contextmanager
def session():
    """NVML initialised, as the `pynvml` module; NvmlUnavailableError where there is no library or driver."""
    library = _start()
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _start() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailableError("the Python package nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(f"NVML does not start: {error}") from error
    return pynvml


def _refusals(library: Any) -> tuple[type[Exception], ...]:
    """What nvidia-ml-py raises: NVML's codes, and since release 13 a driver too old for a call's newest form."""
    mismatch = getattr(library, "NVMLLibraryMismatchError", None)
    return (library.NVMLError,) if mismatch is None else (library.NVMLError, mismatch)


def _typed(library: Any, error: Any, what: str) -> NvmlError:
    """The error class of a refusal."""
    code = getattr(error, "value", library.NVML_ERROR_FUNCTION_NOT_FOUND)
    names = (name for name in vars(library) if name.startswith("NVML_ERROR_") and getattr(library, name) == code)
    name = next(names, f"NVML_ERROR_{code}").removeprefix("NVML_ERROR_")
    return _KINDS.get(name, NvmlError)(name, what)


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


@dataclass(frozen=True)
class Sample:
    """Everything that a GPU says of itself at one moment; None for what it does not say, and `error` says why."""

    timestamp_ns: int
    gpu_uuid: str
    scope: str
    power_instant_w: float | None = None
    power_average_w: float | None = None
    memory_power_w: float | None = None
    energy_counter_mj: int | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    mem_clock_mhz: int | None = None
    gpu_util_pct: int | None = None
    mem_util_pct: int | None = None
    clocks_event_reasons: int | None = None
    error: str | None = None


class Device:
    """A GPU kept open by UUID. Readings raise NvmlError; `sample` has None in their place.

    A MIG device is read through its GPU, which is what the counters cover: `scope` is then `parent_gpu`, else `gpu`.
    uuid: `GPU-...` or `MIG-...`; None takes the first GPU that NVML lists. Raises NvmlUnavailableError where there is
    no NVML or no such GPU.
    """

    def __init__(self, uuid: str | None = None) -> None:
        self._library = library = _start()
        try:
            if uuid is None:
                handle = library.nvmlDeviceGetHandleByIndex(0)
            else:
                handle = library.nvmlDeviceGetHandleByUUID(uuid)
            self.scope = "gpu"
            if (uuid or "").startswith("MIG-") or self._is_mig(handle):
                handle = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
                self.scope = "parent_gpu"
            self._handle = handle
            self.uuid: str = library.nvmlDeviceGetUUID(handle)
            self.name: str = library.nvmlDeviceGetName(handle)
            if self.scope == "gpu" and self._mig_enabled():
                self.scope = "parent_gpu"
        except _refusals(library) as error:
            library.nvmlShutdown()
            named = _typed(library, error, f"NVML finds no GPU {uuid or 'at index 0'}")
            raise NvmlUnavailableError(str(named)) from error

    def _is_mig(self, handle: Any) -> bool:
        try:
            return bool(self._library.nvmlDeviceIsMigDeviceHandle(handle).value)
        except self._library.NVMLError:
            return False

    def _mig_enabled(self) -> bool:
        try:
            return self._library.nvmlDeviceGetMigMode(self._handle)[0] == self._library.NVML_DEVICE_MIG_ENABLE
        except self._library.NVMLError:
            return False

    def close(self) -> None:
        """Let NVML go; no reading may follow."""
        with suppress(self._library.NVMLError):  # the driver may have gone first
            self._library.nvmlShutdown()

    def _read(self, what: str, call: Callable[[Any, Any], Any]) -> Any:
        try:
            return call(self._library, self._handle)
        except _refusals(self._library) as error:
            raise _typed(self._library, error, what) from error

    def driver_version(self) -> str | None:
        """Version of the driver, None where it does not say."""
        try:
            return self._read("driver version", lambda library, _: library.nvmlSystemGetDriverVersion())
        except NvmlError:
            return None

    def energy_mj(self) -> int:
        """Millijoules since the driver was loaded; a counter that ticks about every 100 ms."""
        value = self._read("total energy", lambda library, handle: library.nvmlDeviceGetTotalEnergyConsumption(handle))
        if value == 0:  # some boards answer 0 in place of NOT_SUPPORTED
            raise NotSupportedError("NOT_SUPPORTED", "total energy (reported as 0)")
        return value

    def power_limit_w(self) -> float | None:
        """Watts that the board is kept below, or None where it does not say."""
        try:
            limit = self._read("power limit", lambda library, handle: library.nvmlDeviceGetEnforcedPowerLimit(handle))
        except NvmlError:
            return None
        return limit / 1000 if limit else None

    def powers_w(self) -> dict[str, float | NvmlError]:
        """Watts by `instant`, `average` (both of the GPU) and `memory`; the error where one is not to be had."""
        fields = {"instant": (186, 0), "average": (185, 0), "memory": (186, 2)}
        values = self._read(
            "power", lambda library, handle: library.nvmlDeviceGetFieldValues(handle, list(fields.values()))
        )
        found: dict[str, float | NvmlError] = {}
        for name, value in zip(fields, values, strict=True):
            if value.nvmlReturn != self._library.NVML_SUCCESS:
                found[name] = _typed(self._library, self._library.NVMLError(value.nvmlReturn), f"{name} power")
            elif value.value.uiVal == 0:
                found[name] = NotSupportedError("NOT_SUPPORTED", f"{name} power (reported as 0)")
            else:
                found[name] = value.value.uiVal / 1000
        return found

    def power_instant_w(self) -> float:
        """Watts now; where the driver has no such field, its average of the last second."""
        try:
            watts = self.powers_w()["instant"]
        except NotSupportedError as error:
            watts = error
        if isinstance(watts, NotSupportedError):
            watts = self._read("power", lambda library, handle: library.nvmlDeviceGetPowerUsage(handle)) / 1000
            if watts == 0:
                raise NotSupportedError("NOT_SUPPORTED", "power (reported as 0)")
        if isinstance(watts, NvmlError):
            raise watts
        return watts

    def temperature_c(self) -> int:
        return self._read(
            "temperature",
            lambda library, handle: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU),
        )

    def clock_mhz(self, name: str) -> int:
        """The clock `SM` or `MEM`, MHz."""
        return self._read(
            f"{name} clock",
            lambda library, handle: library.nvmlDeviceGetClockInfo(handle, getattr(library, f"NVML_CLOCK_{name}")),
        )

    def utilisation_pct(self) -> tuple[int, int]:
        """Share of the last sampling period in which a kernel ran, and in which memory was read or written."""
        rates = self._read("utilisation", lambda library, handle: library.nvmlDeviceGetUtilizationRates(handle))
        return rates.gpu, rates.memory

    def memory_bytes(self) -> tuple[int, int]:
        """Bytes of device memory in use by everybody, and in all."""
        found = self._read("memory", lambda library, handle: library.nvmlDeviceGetMemoryInfo(handle))
        return found.used, found.total

    def clocks_event_reasons(self) -> int:
        """Bits that say what holds the clocks where they are; `SLOWED` picks the throttling ones."""
        return self._read(
            "clocks event reasons", lambda library, handle: library.nvmlDeviceGetCurrentClocksEventReasons(handle)
        )

    def processes(self) -> list[int]:
        """Process ids that compute on the GPU, as the host counts them (not as a container does)."""
        found = self._read("processes", lambda library, handle: library.nvmlDeviceGetComputeRunningProcesses(handle))
        return [process.pid for process in found]

    def shared_with_others(self) -> bool | None:
        """Whether another process computes on the GPU; None where the driver does not say."""
        try:
            pids = set(self.processes())
        except NvmlError:
            return None
        if os.getpid() in pids:
            return len(pids) > 1
        # In a container the ids are the host's, so one of them may be ours; some list none at all, not even ours.
        return len(pids) > 1 if pids else None

    def sample(self, timestamp_ns: int) -> Sample:
        """All readings now. Raises GpuLostError alone."""
        values: dict[str, Any] = {}
        errors: list[str] = []

        def read(names: tuple[str, ...], call: Callable[[], Any]) -> None:
            try:
                found = call()
            except GpuLostError:
                raise
            except NvmlError as error:
                if not isinstance(error, NotSupportedError):
                    errors.append(str(error))
                return
            for name, value in zip(names, found, strict=True):
                if not isinstance(value, NvmlError):
                    values[name] = value
                elif isinstance(value, GpuLostError):
                    raise value
                elif not isinstance(value, NotSupportedError):
                    errors.append(str(value))

        read(("power_instant_w", "power_average_w", "memory_power_w"), lambda: self.powers_w().values())
        read(("energy_counter_mj",), lambda: (self.energy_mj(),))
        read(("temperature_c",), lambda: (self.temperature_c(),))
        read(("sm_clock_mhz",), lambda: (self.clock_mhz("SM"),))
        read(("mem_clock_mhz",), lambda: (self.clock_mhz("MEM"),))
        read(("gpu_util_pct", "mem_util_pct"), self.utilisation_pct)
        read(("clocks_event_reasons",), lambda: (self.clocks_event_reasons(),))
        return Sample(timestamp_ns, self.uuid, self.scope, **values, error="; ".join(errors) or None)


# MIG: these raise NvmlError instead of answering None, since the caller must know why.


@contextmanager
def _gpu(index: int) -> Iterator[tuple[Any, Any]]:
    """`pynvml` and the handle of a GPU; every refusal inside becomes an NvmlError, no NVML a NvmlUnavailableError."""
    with session() as library:
        try:
            yield library, library.nvmlDeviceGetHandleByIndex(index)
        except _refusals(library) as error:
            raise _typed(library, error, f"MIG of GPU {index}") from error


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
    """Turn MIG on or off; NvmlError named RESET_REQUIRED where it takes effect only when the GPU has been reset."""
    with _gpu(index) as (library, handle):
        before = library.nvmlDeviceGetMigMode(handle)[0]
        library.nvmlDeviceSetMigMode(handle, int(enabled))
        if library.nvmlDeviceGetMigMode(handle)[0] != int(enabled):
            library.nvmlDeviceSetMigMode(handle, before)
            raise NvmlError("RESET_REQUIRED", "the mode is pending until the GPU is reset")


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
        raise NotSupportedError("NOT_SUPPORTED", "compute instances")
    return found[max(found)]
