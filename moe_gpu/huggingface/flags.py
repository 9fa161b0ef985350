"""What an enabled model says of its flags, and its slices: AdvancedMoELayer's own words, by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_gpu.config import MoEConfig
from moe_gpu.expert_cache import ExpertCache, ExpertCacheStats
from moe_gpu.huggingface.attachment import Attachment
from moe_gpu.huggingface.forward import backend_of
from moe_gpu.huggingface.interface import NAME, register
from moe_gpu.huggingface.layout import ATTACHMENT, FP8, Conventions, Sizes, stored, up_name
from moe_gpu.layer_energy import EnergyReader, LayerEnergyStats, feature_reason, meter_of
from moe_gpu.model import Feature, slice_feature
from moe_gpu.results import EnergyMeasurement
from moe_gpu.slices.plan import GPUSlice


def enabled_modules(model: nn.Module) -> dict[str, Any]:
    """The served experts modules of a model by name. Raises ValueError where there is none."""
    found = {
        name: module for name, module in model.named_modules() if getattr(vars(module).get(ATTACHMENT), "served", False)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no module that moe_gpu.enable serves; call moe_gpu.enable(model)")
    return found


def device_of(experts: Any) -> torch.device:
    """Where a module computes: the device of its weights, or where they would be without a budget."""
    attachment = vars(experts).get(ATTACHMENT)
    host = None if attachment is None else attachment.host
    return stored(experts, up_name(experts)).device if host is None else host.device


def features_of(experts: Any) -> dict[str, Feature]:
    """What each flag of an enabled module came to, under the names of `AdvancedMoELayer.features`."""
    attachment: Attachment = vars(experts)[ATTACHMENT]
    device, dtype = device_of(experts), stored(experts, up_name(experts)).dtype
    backend, hbm = backend_of(experts), attachment.hbm
    features = {
        "triton": Feature(True, backend.name == "triton", backend.reason),
        "profiler": _flag(attachment.profiler is not None, "pass profiler=ExpertProfiler(...)"),
        "expert_cache": _flag(hbm is not None, "pass hbm_budget=..." if hbm is None else str(hbm)),
        "cuda_graphs": _graphs_feature(attachment, device),
        "slices": _flag(False, "no slice is held: moe_gpu.huggingface.use_slice(model, slice) gives one"),
        "energy": Feature(False, False, "enable_energy_monitoring=False"),
    }
    if attachment.slice is not None:
        features["slices"] = slice_feature(attachment.slice, backend.name)
    if attachment.energy is not None:
        features["energy"] = Feature(True, *feature_reason(device, dtype))
    chosen = experts.config._experts_implementation
    if chosen != NAME:
        why = f"the model's configuration names {chosen}: call moe_gpu.enable again"
        features = {name: Feature(feature.asked, False, why) for name, feature in features.items()}
    return features


def _flag(on: bool, reason: str) -> Feature:
    return Feature(on, on, reason)


def _graphs_feature(attachment: Attachment, device: torch.device) -> Feature:
    if attachment.graphs is None:
        return Feature(False, False, "use_cuda_graphs=False")
    reason = attachment.why_no_graph or attachment.graph_conflict()
    if device.type != "cuda":
        reason = f"CUDA graphs need an NVIDIA GPU, and the experts are on {device}"
    if reason is not None:
        return Feature(True, False, reason)
    return Feature(True, True, f"{attachment.graphs}, in eval mode without gradients")


def features(model: nn.Module) -> dict[str, dict[str, Feature]]:
    """What each flag of `enable` came to, by module, as `AdvancedMoELayer.features` says of a layer.

    Raises ValueError for a model that is not enabled.
    """
    return {name: features_of(experts) for name, experts in enabled_modules(model).items()}


def use_slice(model: nn.Module, held: GPUSlice | None) -> None:
    """Keep the products of an enabled model's experts to a slice's SMs from the next call on; None: to none.

    The budget alone leaves open which SMs serve: call the model inside `manager.enter(...)` for a green context. Raises
    ValueError for a model that is not enabled.
    """
    for experts in enabled_modules(model).values():
        vars(experts)[ATTACHMENT].slice = held


def get_performance_stats(model: nn.Module) -> dict[str, dict[str, object]]:
    """By module, what `AdvancedMoELayer.get_performance_stats` gives; modules share budget, graphs and joules.

    Joules are the whole GPU's since the last call of this, read once a device. Reads only what has already reached the
    host, and the driver's energy counter. Raises ValueError for a model that is not enabled.
    """
    conventions = register()
    measured: dict[torch.device, EnergyMeasurement | None] = {}
    caches: dict[int, ExpertCacheStats] = {}
    found: dict[str, dict[str, object]] = {}
    for name, experts in enabled_modules(model).items():
        attachment: Attachment = vars(experts)[ATTACHMENT]
        cache, profiler, device = attachment.expert_cache, attachment.profiler, device_of(experts)
        if attachment.energy is not None and device not in measured:
            measured[device] = _read(attachment, device)
        found[name] = {
            "features": features_of(experts),
            "experts": None if profiler is None else profiler.snapshot(attachment.layer_index),
            "energy": _energy(experts, attachment, conventions, device, measured.get(device)),
            "expert_cache": None if cache is None else _stats(cache, caches),
            "cuda_graphs": None if attachment.graphs is None else attachment.graphs.get_stats(),
        }
    return found


def _stats(cache: ExpertCache, known: dict[int, ExpertCacheStats]) -> ExpertCacheStats:
    if id(cache) not in known:
        known[id(cache)] = cache.stats()
    return known[id(cache)]


def _read(attachment: Attachment, device: torch.device) -> EnergyMeasurement | None:
    meter, _ = meter_of(device)
    return None if meter is None else attachment.readers.setdefault(device, EnergyReader()).since(meter)


def _energy(
    experts: Any,
    attachment: Attachment,
    conventions: Conventions,
    device: torch.device,
    measurement: EnergyMeasurement | None,
) -> LayerEnergyStats | None:
    if attachment.energy is None:
        return None
    activation, dtype = conventions.activation_of(experts), stored(experts, up_name(experts)).dtype
    reason = None
    if measurement is None:
        reason = meter_of(device)[1]
    elif attachment.top_k is None:
        reason = "no eager call of the module has been counted yet"
    elif dtype == FP8:
        reason = "not by expert: what dequantising its weights on every call takes is not modelled"
    elif activation is None:
        reason = "not by expert: what its own gate, activation or norm takes is not modelled"
    if reason is not None:
        return LayerEnergyStats(measurement, None, reason)
    assert activation is not None
    assert attachment.top_k is not None
    sizes = Sizes.of(experts)
    widths = sizes.inputs, sizes.outputs, sizes.inner, sizes.experts
    try:
        config = MoEConfig(*widths, attachment.top_k, activation=activation, bias=experts.has_bias)
    except ValueError as error:  # a rank that has fewer experts than a token chooses
        return LayerEnergyStats(measurement, None, f"not by expert: {error}")
    index, budget = attachment.layer_index, attachment.sm_budget
    return attachment.energy.stats(config, device, dtype, attachment.profiler, index, budget, measurement)
