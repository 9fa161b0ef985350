"""The profiler's kernel compiles for real GPUs without spills."""

from __future__ import annotations

import pytest

from moe_gpu.triton_kernels.load_counts import _count_load_kernel
from tests.aot.compiling import compile_for


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("block", [8, 256, 1024])
def test_it_compiles_without_spills(arch, block):
    constants = {"TILES": 4, "SMALLEST": 16, "BLOCK": block, "PDL": arch == 90}
    types = {"state_ptr": "*i64", "demand_ptr": "*i32", "E": "i32"}
    assert compile_for(_count_load_kernel, arch, types, constants, num_warps=4).spills == 0
