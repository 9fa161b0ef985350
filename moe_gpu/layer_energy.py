"""What a layer says of its energy: joules since it was last asked, and what each expert is modelled to take.

Nothing is read and no thread runs while the layer computes: the GPU's counter keeps counting by itself, and is read
when the statistics are asked for. The joules are the whole GPU's, whatever else ran on it.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from moe_gpu.config import MoEConfig
from moe_gpu.energy_model import CalibrationError, EnergyModel, EnergyReport
from moe_gpu.energy_monitor import EnergyUnavailableError
from moe_gpu.energy_monitor.monitor import open_meter
from moe_gpu.energy_monitor.ticks import Meter
from moe_gpu.energy_work import LayerWork
from moe_gpu.nvml import NvmlError
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.results import EnergyMeasurement

TICK_S = 0.1  # of the counter: either end of an interval is cut by up to one
SHORT_S = 2.0


@dataclass(frozen=True)
class LayerEnergyStats:
    """`measurement`: the whole GPU's joules since the last reading. `experts`: this layer's, as calibration predicts.

    None where `reason` says why.
    """

    measurement: EnergyMeasurement | None
    experts: EnergyReport | None
    reason: str | None


class EnergyReader:
    """The whole GPU's joules since it was last asked: a mark of plain numbers, so that its owner copies and pickles."""

    def __init__(self) -> None:
        self._mark: tuple[int, int] | None = None  # when, and the counter

    def since(self, meter: Meter) -> EnergyMeasurement:
        """What the counter counted since the last reading."""
        begin, now = self._mark, None
        common: dict[str, Any] = dict(run_id="layer", window="layer", duration_s=0.0, gpu_uuid=meter.uuid)
        try:
            now = (time.monotonic_ns(), meter.energy_mj())
        except NvmlError as error:
            return EnergyMeasurement(**common, reason=str(error))
        self._mark = now
        common.update(source="counter", scope=meter.scope, driver=meter.driver_version())
        if begin is None:
            return EnergyMeasurement(**common, reason="the first reading: there is energy from the next one on")
        common["duration_s"] = seconds = (now[0] - begin[0]) / 1e9
        joules = (now[1] - begin[1]) / 1000
        if joules <= 0:
            why = "went backwards" if joules < 0 else f"did not tick in {seconds:.3g} s"
            return EnergyMeasurement(**common, reason=f"the energy counter {why}")
        # Each end lies evenly somewhere in a tick.
        stderr_j = joules / seconds * TICK_S * (2 / 12) ** 0.5
        quality = "ok" if seconds >= SHORT_S else "short"
        return EnergyMeasurement(**common, energy_j=joules, stderr_j=stderr_j, quality=quality)


class LayerEnergy:
    """One layer's calls and counts, for its experts' share; plain numbers too."""

    def __init__(self) -> None:
        self.calls = self.tokens = 0
        self._reader = EnergyReader()
        self._counts: list[int] | None = None

    def note(self, num_tokens: int) -> None:
        """Count a call on the host."""
        self.calls += 1
        self.tokens += num_tokens

    def stats(
        self,
        config: MoEConfig,
        device: torch.device,
        dtype: torch.dtype,
        profiler: ExpertProfiler | None,
        layer_index: int,
        sm_budget: int | None = None,
        measurement: EnergyMeasurement | None = None,
    ) -> LayerEnergyStats:
        """Joules since the last call of this; by expert where there are a profiler and a calibration. Never waits.

        measurement: the joules, where they have just been read for several layers at once.
        """
        meter, why = meter_of(device)
        if meter is None:
            return LayerEnergyStats(None, None, why)
        measurement = measurement or self._reader.since(meter)
        counts_LE = None if profiler is None else profiler.counts_LE()
        counts = None if counts_LE is None else counts_LE[layer_index].tolist()
        before, self._counts = self._counts, counts
        if measurement.energy_j is None:
            return LayerEnergyStats(measurement, None, measurement.reason)
        if counts is None or before is None:
            return LayerEnergyStats(measurement, None, "experts' counts come from a profiler: pass profiler=")
        delta = [now - then for now, then in zip(counts, before, strict=True)]
        if not self.calls or not sum(delta):
            return LayerEnergyStats(
                measurement, None, "no eager call of the layer has been counted since the last time"
            )
        per_call = self.tokens / self.calls
        calls = sum(delta) / config.top_k / per_call
        try:
            work = work_of(device, config, round(per_call), dtype, sm_budget=sm_budget)
            model = EnergyModel.load(meter.uuid, meter.driver_version(), work.dtype)
            mean = [count / calls for count in delta]
            # The joules are those of everything that ran, other layers too: they are not this one's to share out.
            report = model.attribute(mean, measurement, work, layer=layer_index, calls=calls, alone=False)
        except ValueError as error:
            return LayerEnergyStats(measurement, None, str(error))
        return LayerEnergyStats(measurement, report, None)


def meter_of(device: torch.device) -> tuple[Meter | None, str]:
    """The open meter of a layer's device, or None, and in words what reads it or why nothing does."""
    if device.type != "cuda":
        return None, f"energy is read from the NVIDIA driver, and the layer is on {device.type}"
    meter, why = _open(os.getpid(), str(device))
    return meter, why


@functools.cache
def _open(process: int, device: str) -> tuple[Meter | None, str]:
    try:
        meter = open_meter(device)
    except EnergyUnavailableError as error:
        return None, str(error)
    return meter, f"the energy counter of {meter.uuid} ({meter.scope}), read when statistics are asked for"


def feature_reason(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a layer's energy can be read, and in words by what, or why not; says too what is missing for experts."""
    meter, why = meter_of(device)
    if meter is None:
        return False, why
    try:
        EnergyModel.load(meter.uuid, meter.driver_version(), str(dtype).removeprefix("torch."))
    except CalibrationError as error:
        why = f"{why}; not by expert: {error}"
    return True, why


def work_of(
    device: torch.device,
    config: MoEConfig,
    num_tokens: int,
    dtype: torch.dtype,
    mode: str = "forward",
    sm_budget: int | None = None,
) -> LayerWork:
    """What a call of a layer on this device executes, with the padding of the tiles that serve it there."""
    from moe_gpu.explain import layer_work, present_gpu
    from moe_gpu.triton_kernels.ops import choose_backend

    served = choose_backend(device.type, device.index).name == "triton" and device.type == "cuda"
    return layer_work(present_gpu() if served else None, config, num_tokens, dtype, mode, sm_budget)
