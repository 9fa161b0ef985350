"""Layers whose experts are divided among slices, beside the same layers undivided."""

from __future__ import annotations

import torch

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.slices.policies import SliceAllocationPolicy

SIZES = dict(input_dim=12, expert_dim=12, hidden_dim=8, num_experts=9, top_k=3)
SCATTERED = {4: (4, 0, 7), 1: (1, 2, 3)}  # tenant -> experts; 5, 6 and 8 belong to nobody


def manager_of(
    groups: dict[int, tuple[int, ...]],
    policy: SliceAllocationPolicy = SliceAllocationPolicy.PROPORTIONAL,
    device: str | None = "NVIDIA H200",
    backend: str = "cta",
) -> AdvancedGPUSliceManager:
    manager = AdvancedGPUSliceManager(8, policy, device, backend)
    for tenant, experts in groups.items():
        manager.allocate_slices(tenant, 8 // len(groups), experts=experts)
    return manager


def twins(dtype: torch.dtype, **changes) -> tuple[AdvancedMoELayer, AdvancedMoELayer]:
    """Two layers of the same weights in eval mode: the first is to be divided, the second has no graphs."""
    torch.manual_seed(0)
    options = {**SIZES, "use_cuda_graphs": False, **changes}
    layer = AdvancedMoELayer(**options).to(dtype).eval()
    plain = AdvancedMoELayer(**{**options, "use_cuda_graphs": False}).to(dtype).eval()
    plain.load_state_dict(layer.state_dict())
    return layer, plain
