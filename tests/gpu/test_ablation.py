"""The ablation on a GPU: every part is measured, right, and launched as it says."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.benchmark.ablation import Ablation
from moe_gpu.config import MoEConfig
from moe_gpu.results import ABLATION, BenchmarkRow, select

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]


def test_every_part_is_measured():
    run = Ablation(MoEConfig(512, 512, 256, 16, 4), batch_sizes=(64, 1024), expert_counts=(4, 8), num_iterations=5)
    rows = select(run.run(), BenchmarkRow)
    for row in rows:
        if row.scope != ABLATION:
            assert row.status in ("ok", "unavailable"), row.reason
            continue
        if row.provider == "all but Triton kernels":
            assert row.status == "unavailable"
            continue
        assert row.status == "ok", f"{row.provider}: {row.reason}"
        if row.provider in ("+ load-aware tiles", "+ slices", "all but CUDA graphs"):
            assert "smaller_ms=(16, 64)" in row.backend
        if row.provider in ("+ slices", "all but streams"):
            assert any(f"shared expert: {name}" in row.backend for name in ("cta", "green_context"))
        if row.provider == "all but slices":
            assert "shared expert: streams" in row.backend
