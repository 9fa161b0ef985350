"""The only importer of pynvml: what the driver says, or None where it does not say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
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
