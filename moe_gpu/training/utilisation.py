"""What a run takes of a GPU: its work over what the data sheet promises (MFU), and its memory."""

from __future__ import annotations

import torch

from moe_gpu.training.config import TrainConfig

# Dense bf16 FLOP/s of NVIDIA's data sheets; the first part that a device's name contains decides.
_PEAK_BF16 = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)


def peak_bf16_flops(name: str) -> float | None:
    """Of a whole GPU by its name; None for one that is not listed, and for a MIG instance, which is a part of one."""
    if "MIG" in name:
        return None
    return next((peak for part, peak in _PEAK_BF16 if part in name), None)


def model_flops_utilisation(config: TrainConfig, tokens_per_s: float) -> float | None:
    """Between 0 and 1; None on a CPU, on a GPU without a known peak, and in fp32, which has no one peak."""
    device = torch.device(config.device)
    if device.type != "cuda" or config.dtype != "bf16":
        return None
    peak = peak_bf16_flops(torch.cuda.get_device_properties(device).name)
    return None if peak is None else config.flops_per_token * tokens_per_s / peak


def peak_memory_bytes(config: TrainConfig) -> int | None:
    """Most memory that PyTorch had in use at once on the run's GPU; None on a CPU, where it is not measured."""
    return torch.cuda.max_memory_allocated(config.device) if torch.device(config.device).type == "cuda" else None
