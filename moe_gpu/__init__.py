"""Mixture-of-Experts on NVIDIA GPUs: fast, visible, sliced, and every number measured. Names load when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "chrome_trace": ("add_expert_counters",),
    "config": ("Activation", "MoEConfig", "PRESETS", "RouterConfig"),
    "cuda_graph_manager": ("BatchScheduler", "CUDAGraphManager", "StreamManager"),
    "energy_model": ("EnergyModel", "EnergyReport"),
    "energy_monitor": (
        "EnergyMonitor",
        "EnergyUnavailableError",
        "PerformanceComparator",
        "PowerSampler",
        "measure_energy",
        "select_sm_slice",
    ),
    "expert_cache": ("ExpertCache",),
    "expert_slices": ("ExpertSlices",),
    "gpu_slice_manager": ("AdvancedGPUSliceManager", "GPUSliceOptimizer"),
    "live.publisher": ("Publisher", "publish"),
    "live.status": ("JobStatus", "Progress"),
    "model": ("AdvancedMoELayer", "set_hbm_budget"),
    "moe_layer": ("Expert", "MoELayer", "MoEStats"),
    "profiler": ("ExpertProfiler", "ExpertSnapshot", "RoutingTrace"),
    "reference": ("ExpertWeights", "Routing"),
    "results": ("EnergyMeasurement",),
    "slices.costs": ("CostTable",),
    "slices.device": ("DeviceDescription",),
    "slices.mig": ("MIGManager",),
    "slices.plan": ("ExpertAllocation", "GPUSlice", "SlicePlan"),
    "slices.policies": ("LoadProfile", "SliceAllocationPolicy"),
    "triton_kernels.ops": ("TritonExpertOps",),
    "huggingface": ("CoverageReport", "disable", "enable"),
    "benchmark": ("MoEBenchmark", "run_full_benchmark", "run_quick_benchmark"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from moe_gpu.benchmark import MoEBenchmark, run_full_benchmark, run_quick_benchmark
    from moe_gpu.chrome_trace import add_expert_counters
    from moe_gpu.config import PRESETS, Activation, MoEConfig, RouterConfig
    from moe_gpu.cuda_graph_manager import BatchScheduler, CUDAGraphManager, StreamManager
    from moe_gpu.energy_model import EnergyModel, EnergyReport
    from moe_gpu.energy_monitor import (
        EnergyMonitor,
        EnergyUnavailableError,
        PerformanceComparator,
        PowerSampler,
        measure_energy,
        select_sm_slice,
    )
    from moe_gpu.expert_cache import ExpertCache
    from moe_gpu.expert_slices import ExpertSlices
    from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager, GPUSliceOptimizer
    from moe_gpu.huggingface import CoverageReport, disable, enable
    from moe_gpu.live.publisher import Publisher, publish
    from moe_gpu.live.status import JobStatus, Progress
    from moe_gpu.model import AdvancedMoELayer, set_hbm_budget
    from moe_gpu.moe_layer import Expert, MoELayer, MoEStats
    from moe_gpu.profiler import ExpertProfiler, ExpertSnapshot, RoutingTrace
    from moe_gpu.reference import ExpertWeights, Routing
    from moe_gpu.results import EnergyMeasurement
    from moe_gpu.slices.costs import CostTable
    from moe_gpu.slices.device import DeviceDescription
    from moe_gpu.slices.mig import MIGManager
    from moe_gpu.slices.plan import ExpertAllocation, GPUSlice, SlicePlan
    from moe_gpu.slices.policies import LoadProfile, SliceAllocationPolicy
    from moe_gpu.triton_kernels.ops import TritonExpertOps


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_gpu' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moe_gpu.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
