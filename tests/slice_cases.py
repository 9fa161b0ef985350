"""What the tests of slices share: a device, costs that none has, and profiles."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from moe_gpu.results import Machine
from moe_gpu.slices.costs import CostPoint, CostTable
from moe_gpu.slices.device import described_device
from moe_gpu.slices.plan import ExpertAllocation
from moe_gpu.slices.policies import LoadProfile, SliceAllocationPolicy, TenantLoad

H200 = described_device("H200")
POLICIES = list(SliceAllocationPolicy)
STATIC, DYNAMIC, PROPORTIONAL, ADAPTIVE = POLICIES
MACHINE = Machine("NVIDIA H200", "cuda", "3.12", "2.11", "Linux", "2026-11-24", compute_capability="9.0", num_sms=132)
BACKENDS = st.sampled_from(["cta", "green_context"])


def synthetic_costs(launch_ms: float = 0.01, slowdown: float = 1.05, floor: float = 0.05, scale: float = 0.9):
    """Costs that no device has: a floor, weights that need few SMs, and products that need many."""
    points = [
        CostPoint(experts, rows, sms, floor + experts * 0.02 / min(sms, 48) + rows * 2e-3 / sms**scale)
        for experts in (1, 8, 64)
        for rows in (1, 64, 4096, 65536)
        for sms in (8, 16, 32, 64, 96, 132)
    ]
    return CostTable(MACHINE, "synthetic", "bfloat16", "green_context", tuple(points), slowdown, launch_ms)


def profile_of(rows, *, priorities=None, utilization=None, required=None) -> LoadProfile:
    count = len(rows)
    priorities, required = priorities or [0] * count, required or [1] * count
    utilization = utilization or [None] * count
    return LoadProfile(
        tuple(
            TenantLoad(ExpertAllocation(index, required[index], priorities[index], (index,)), row, 1.0, busy)
            for index, (row, busy) in enumerate(zip(rows, utilization, strict=True))
        )
    )


@pytest.fixture(autouse=True)
def no_costs_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path / "cache"))
