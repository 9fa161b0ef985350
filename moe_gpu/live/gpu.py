"""One reading of everything that the driver says of a GPU."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Protocol

from moe_gpu.live.status import GpuReading
from moe_gpu.nvml import SLOWED, GpuLostError, NvmlError, Sample


class Meter(Protocol):
    """What `nvml.Device` offers of this."""

    uuid: str
    name: str
    scope: str

    def sample(self, timestamp_ns: int) -> Sample: ...

    def memory_bytes(self) -> tuple[int, int]: ...


def read_gpu(meter: Meter) -> GpuReading:
    """The GPU as it is now; None for what the driver does not say, and `error` says why. Never raises NvmlError."""
    try:
        sample = meter.sample(time.time_ns())
    except GpuLostError as error:
        return GpuReading(meter.uuid, meter.name, meter.scope, error=str(error))
    memory: tuple[int | None, int | None] = (None, None)
    with suppress(NvmlError):
        memory = meter.memory_bytes()
    reasons = sample.clocks_event_reasons
    return GpuReading(
        uuid=meter.uuid,
        name=meter.name,
        scope=meter.scope,
        power_w=sample.power_instant_w if sample.power_instant_w is not None else sample.power_average_w,
        energy_counter_mj=sample.energy_counter_mj,
        temperature_c=sample.temperature_c,
        sm_clock_mhz=sample.sm_clock_mhz,
        mem_clock_mhz=sample.mem_clock_mhz,
        gpu_util_pct=sample.gpu_util_pct,
        mem_util_pct=sample.mem_util_pct,
        memory_used_bytes=memory[0],
        memory_total_bytes=memory[1],
        slowed=None if reasons is None else bool(reasons & SLOWED),
        error=sample.error,
    )
