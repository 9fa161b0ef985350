"""Weights whose home is host memory, while the module that holds them goes to another device or dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from moe_gpu.expert_cache.cache import LayerCache


def apply_around_weights(
    module: nn.Module,
    weights: Mapping[str, nn.Parameter],
    hbm: LayerCache,
    fn: Callable[[torch.Tensor], torch.Tensor],
    apply: Callable[[], object],
) -> torch.device:
    """`apply()`, a module's own `_apply(fn)`, without some weights: they stay on the host and take the new dtype there.

    Returns the device that they would have gone to. Raises ValueError for the meta device and HbmBudgetError for a
    dtype too wide for the budget, and changes nothing.
    """
    probes = {name: fn(torch.empty(0, dtype=p.dtype, device=p.device)) for name, p in weights.items()}
    devices = [probe.device for probe in probes.values()]
    if any(device.type == "meta" for device in devices):
        raise ValueError(
            "a layer with an hbm_budget cannot go to the meta device; take the budget away first, by "
            "set_hbm_budget(None) or moe_gpu.disable(model)"
        )
    hbm.cache.synchronize()
    hbm.resize(sum(p[0].numel() * probes[name].element_size() for name, p in weights.items()))
    try:
        module._parameters.update(dict.fromkeys(weights))
        apply()
    finally:
        module._parameters.update(weights)
    for name, parameter in weights.items():
        parameter.data = parameter.data.to(probes[name].dtype)
    return devices[0]
