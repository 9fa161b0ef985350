"""Energy that can be believed: windows on the GPU's counter, samples of its power, and comparisons with intervals."""

from moe_gpu.energy_monitor.monitor import EnergyMonitor, EnergyUnavailableError, Window
from moe_gpu.energy_monitor.sampler import PowerSampler
from moe_gpu.energy_monitor.ticks import Clock
from moe_gpu.energy_monitor.trials import (
    EnergyTrials,
    PerformanceComparator,
    PerformanceComparison,
    Ratio,
    SliceChoice,
    measure_energy,
    measure_interleaved,
    select_sm_slice,
)

__all__ = [
    "Clock",
    "EnergyMonitor",
    "EnergyTrials",
    "EnergyUnavailableError",
    "PerformanceComparator",
    "PerformanceComparison",
    "PowerSampler",
    "Ratio",
    "SliceChoice",
    "Window",
    "measure_energy",
    "measure_interleaved",
    "select_sm_slice",
]
